"""The training of an experiment: the normalisation sampled from its split, and how long and how often."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from volumen.config.experiment_split import ExperimentSplit
from volumen.config.parts.unlabelled import UnlabelledConfig
from volumen.utils.errors import VolumenError

FEWEST_FINAL_WINDOWS = 2000
"""Number of windows that may always be used to score the last and the best epoch, even if training is short."""
TEACHER_DECAY = 0.99
"""Decay of a mean teacher's weights, unless `tr_config.ema_decay` states one (Tarvainen & Valpola 2017, ramp-up phase;
Yu et al. 2019)."""


class ExperimentTraining(ExperimentSplit):
    """An experiment whose split, statistics and numbers of steps follow from its sections, data and network."""

    @cached_property
    def intensity_properties(self) -> dict[str, Any]:
        """Statistics of the images for the normalisation: from the settings, else sampled from the training part."""
        from volumen.config.detection import check_finite
        from volumen.data.resampled import stored_volume

        scheme = self.dataset_config.normalization_scheme
        if not isinstance(scheme, str) and len(scheme) != self.in_channels:
            raise VolumenError(
                f"{self.origin}: dataset_config.normalization_scheme",
                expected=f"{self.in_channels} schemes, one for each channel of the images",
                found=", ".join(scheme),
                remedy="list one for each channel, or give one for all",
            )
        if self.dataset_config.nonfinite == "refuse":
            check_finite([stored_volume(case.image) for case in self.cases], cache_dir=self.cache_dir)
        if self.dataset_config.intensity_properties:
            return dict(self.dataset_config.intensity_properties)
        sampled = self._sampled_intensities
        by_volume = self.dataset_config.normalization_scheme == "unit" and sampled["per_volume"]
        if not (self._normalization_needs_samples or by_volume):
            return {}
        return {key: value for key, value in sampled.items() if key != "volumes"}

    @cached_property
    def trained_intensities(self) -> list[dict[str, Any]]:
        """Range of the training volumes' intensities per channel, independent of the normalisation."""
        return list(self.dataset_config.trained_intensities or self._sampled_intensities["volumes"])

    @property
    def _normalization_needs_samples(self) -> bool:
        from volumen.config.detection import needs_intensity_properties

        return needs_intensity_properties(self.dataset_config.normalization_scheme, self.cases)

    @cached_property
    def _sampled_intensities(self) -> dict[str, Any]:
        """Statistics sampled from the training part; from fewer regions if the normalisation does not need them."""
        from volumen.transforms.intensity_properties import sample_intensity_properties
        from volumen.transforms.normalize import schemes_of

        needed = self._normalization_needs_samples
        scheme, by_volume = self.dataset_config.normalization_scheme, self.dataset_config.normalize_per_volume
        raw = set(schemes_of(scheme)) == {"none"}
        return sample_intensity_properties(
            self.cases,
            boxes=self.split.train,
            seed=self.tr_setup.seed,
            ignore_labels=self.ignore_labels,
            per_volume=False if raw or not isinstance(scheme, str) else by_volume,
            foreground=needed,
            max_regions=128 if needed else 32,
            most_cases=None if needed else 256,
        )

    @property
    def relaxes_labeled_ratio(self) -> bool:
        """Whether the user left the labelled ratio unset, so that it is lowered if no patch reaches it."""
        return "min_labeled_ratio" not in self.given["dataset_config"]

    @property
    def rotation_axes(self) -> list[str] | None:
        """Axes about which patches are rotated; 2D images rotate about z only."""
        axes = self.dataset_config.rotation_axes
        if axes is not None and self.spatial_dims == 2 and set(axes) - {"z"}:
            raise VolumenError(
                f"{self.origin}: dataset_config.rotation_axes",
                expected="[z] or [] for 2D images",
                found=f"[{', '.join(axes)}]",
                remedy="leave it out to rotate in the plane",
            )
        return list(axes) if axes is not None else None

    @property
    def bg_to_fg_ratio(self) -> float:
        """Background patches per foreground patch."""
        return self.dataset_config.bg_to_fg_ratio if self.dataset_config.bg_sampling_enabled else 0.0

    @cached_property
    def workers(self) -> int:
        """Number of processes that prepare patches."""
        from volumen.utils.threads import cores

        configured = self.tr_config.num_dataloader_workers
        return min(8, max(0, cores() - 1)) if configured is None else configured

    @property
    def rank(self) -> int:
        """Number of this process."""
        from volumen.utils.distributed import rank

        return rank()

    @property
    def world_size(self) -> int:
        """Number of training processes."""
        from volumen.utils.distributed import world_size

        return world_size()

    @property
    def fused_optimizer(self) -> bool | None:
        """Whether the optimizer updates all weights in one kernel; None: if it has one."""
        setting = self.tr_config.fused_optimizer
        if setting == "auto":
            return None if self.device.type == "cuda" else False
        return setting

    @property
    def trains_decoders_first(self) -> bool:
        """Whether the encoder waits until the new decoders have learned something."""
        return self.tr_config.finetune_schedule == "sawtooth"

    @property
    def read_every(self) -> int:
        """Steps between two reads of losses from the device: a GPU waits while the host reads."""
        from volumen.utils.device import READ_EVERY

        return READ_EVERY if self.device.type == "cuda" else 1

    @property
    def samples_per_epoch(self) -> int | None:
        """Training patches per epoch, summed over all processes; None: each valid patch once."""
        steps = self.tr_config.max_steps_per_epoch
        return None if steps is None else steps * self.tr_config.batch_size * self.world_size

    @property
    def unlabelled(self) -> UnlabelledConfig:
        """How the network learns from unlabelled patches, if it does."""
        return self.tr_config.unlabelled or UnlabelledConfig()

    @property
    def unlabelled_per_batch(self) -> int:
        """Unlabelled patches in a batch of one process; 0 if the network learns from labels alone."""
        if self.tr_config.unlabelled is None:
            return 0
        return max(1, round(self.unlabelled.ratio * self.tr_config.batch_size))

    @property
    def has_teacher(self) -> bool:
        """Whether a mean teacher labels unlabelled patches; else they have pseudo-labels, or there are none."""
        return bool(self.unlabelled_per_batch) and self.unlabelled.pseudo_labels is None

    @property
    def ema_decay(self) -> float | None:
        """Decay of the moving average of the weights; a mean teacher needs one."""
        decay = self.tr_config.ema_decay
        return TEACHER_DECAY if decay is None and self.has_teacher else decay

    @property
    def taught_kinds(self) -> dict[str, str]:
        """Kinds of the targets whose heads learn from a mean teacher, as their losses see them."""
        from volumen.losses.multitask import trained_kind

        every = self.unlabelled.heads == "all"
        return {
            name: trained_kind(section)
            for name, section in self.loss_sections.items()
            if every or name in self.primary_targets
        }

    @property
    def validation_windows(self) -> int | None:
        """Windows per validation; None: the whole validation part."""
        steps = self.tr_config.max_val_steps_per_epoch
        return None if steps is None else steps * self.tr_config.batch_size

    @property
    def final_validation_windows(self) -> int | None:
        """Windows with which the last and the best epoch are scored; None: the whole validation part.

        Unless the setting states a number, at most as many windows are used as training has patches (at least
        `FEWEST_FINAL_WINDOWS`), since the validation part of a huge volume would take longer than training.
        """
        training, processes = self.tr_config, self.world_size
        if training.final_val_steps is not None:
            return training.final_val_steps * training.batch_size
        if training.max_steps_per_epoch is None:
            return None
        return max(
            FEWEST_FINAL_WINDOWS,
            training.max_epoch * training.max_steps_per_epoch * training.batch_size * processes,
        )

    @property
    def validation_metrics(self) -> list[str]:
        """The scores of labels that a validation measures: those of the setting, and the one that the key metric is."""
        from volumen.metrics.score_names import LABELS, family_of, is_validation_score

        names = list(self.tr_config.validation_metrics)
        part, *rest = (self.tr_config.key_metric or "").split("/")
        if part == "val" and len(rest) > 1 and is_validation_score(rest[1]) and rest[1] not in names:
            section = self.loss_sections.get(rest[0])
            if section is not None and family_of(section["kind"]) == LABELS:
                names.append(rest[1])
        return names

    @property
    def always_fused(self) -> list[str]:
        """The targets whose label is read from listed heads, whether or not that helps.

        Raises:
            VolumenError: there is nothing to fit a fusion on.
        """
        always = [name for name in self.fusions if self.primary_targets[name].fuse != "auto"]
        if always and not self.validates:
            raise VolumenError(
                f"{self.origin}: targets.{always[0]}.fuse",
                expected="a validation part, on which a fusion is fitted",
                found=f"tr_setup.tr_val_split {self.tr_setup.tr_val_split}",
                remedy="set tr_val_split below 1, or fuse: none",
            )
        return always

    @property
    def validation_names(self) -> list[str]:
        """Names of all metrics and losses that validation can measure, without "val/"."""
        from volumen.losses.multitask import component_labels
        from volumen.metrics.whole_regions import measured_names

        sections = self.loss_sections
        losses = [
            f"loss/{name}{part}"
            for name, section in sections.items()
            for part in ("", *(f"/{label}" for label in component_labels(section["losses"])))
        ]
        fused = [f"{name}/{what}" for name in self.fusions for what in ("fused_dice", "fused_gain")]
        return [*measured_names(sections, self.validation_metrics), *fused, "loss", *losses]

    @property
    def default_key_metric(self) -> str:
        """The metric that selects the best epoch by default; the loss if no labelled target has a Dice score."""
        from volumen.metrics.target_metrics import metrics_of

        dice = any("dice" in metrics_of(kind) for kind in self.labelled_kinds.values())
        return "val/mean_dice" if dice else "val/loss"
