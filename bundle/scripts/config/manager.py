"""The configuration of a run: sections checked, the data's own facts detected, everything written back.

`ConfigManager` is what the bundle's YAML refers to as `@config`. It holds one frozen dataclass per section and
answers, lazily, what follows from them and from the data: cases, targets, patch size, network plan, split.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.config.experiment_file import check_section_names, refuse_code
from volumen.config.sections import UNSET, TargetConfig
from volumen.config.targets import Target, inject_auxiliary_tasks, make_target, read_target
from volumen.config.validation import check_sections, retired_keys
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import check_names
from volumen.utils.suggest import closest
from volumen.utils.verbatim import reveal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from volumen.config.detection import LabelReading
    from volumen.data.datalist import CaseItems
    from volumen.data.label_channels import LabelRule
    from volumen.data.layout import Layout, OpenCase
    from volumen.data.pairing import Case
    from volumen.data.sampling.split import Split
    from volumen.networks.planning import NetworkPlan

logger = logging.getLogger(__name__)

FEWEST_FINAL_WINDOWS = 2000
"""So many windows the last and the best epoch may be scored on, however short the training is."""

# Answers that are kept once found, and the sections that each follows from. Those that are not listed stay in a
# variant: what is opened, what is in it, and where it runs.
_FOLLOWS_FROM: dict[str, set[str]] = {
    "requested_patch_size": {"tr_config"},
    "workers": {"tr_config"},
    "search_cases": {"dataset_config"},
    "labelled_profiles": {"tr_setup"},
    "plan": {"tr_setup", "tr_config", "model_config"},
    "split": {"tr_setup", "tr_config", "model_config"},
    "intensity_properties": {"tr_setup", "tr_config", "model_config", "dataset_config"},
    "trained_intensities": {"tr_setup", "tr_config", "model_config", "dataset_config"},
    "_sampled_intensities": {"tr_setup", "tr_config", "model_config", "dataset_config"},
    "primary_targets": {"tr_config", "model_config"},
    "targets": {"tr_config", "model_config", "auxiliary_tasks"},
    "derived_tasks": {"tr_config", "model_config", "auxiliary_tasks"},
    "halo": {"tr_config", "model_config", "auxiliary_tasks"},
    "network_config": {"tr_setup", "tr_config", "model_config", "auxiliary_tasks"},
}


class ConfigManager:
    """The experiment's sections, checked, and what the data add to them.

    Args:
        tr_setup: training setup; see `volumen.config.sections.TrainingSetup`.
        tr_config: training parameters.
        model_config: network settings.
        dataset_config: data settings.
        inference_config: prediction settings.
        auxiliary_tasks: derived targets by name.
        dataset_dir: data folder; goes before `dataset_config.data_path`.
        output_dir: output folder; goes before `tr_setup.ckpt_out_base`.
        device: where the network runs: `auto`, `cpu`, `cuda`, `cuda:N`, or a device of torch.
        origin: name of the file the sections come from, for errors.

    Raises:
        VolumenError: for an unknown key or a wrong value, naming file, key and remedy.
    """

    def __init__(
        self,
        *,
        tr_setup: Mapping[str, Any] | None = None,
        tr_config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
        dataset_config: Mapping[str, Any] | None = None,
        inference_config: Mapping[str, Any] | None = None,
        auxiliary_tasks: Mapping[str, Any] | None = None,
        dataset_dir: str | None = None,
        output_dir: str | None = None,
        device: str | torch.device = "auto",
        origin: str = "configuration",
    ) -> None:
        given = {
            "tr_setup": tr_setup,
            "tr_config": tr_config,
            "model_config": model_config,
            "dataset_config": dataset_config,
            "inference_config": inference_config,
        }
        given, auxiliary_tasks = reveal(given), reveal(auxiliary_tasks)
        dataset_dir, output_dir = reveal(dataset_dir), reveal(output_dir)
        device, origin = reveal(device), reveal(origin)
        check_section_names({**given, "auxiliary_tasks": auxiliary_tasks}, origin)
        refuse_code({**given, "auxiliary_tasks": auxiliary_tasks}, origin)
        self.origin = origin
        #: Keys by section that are null by default and that somebody gave a value.
        self.given = {
            name: frozenset(key for key in keys if (given[name] or {}).get(key) is not None)
            for name, keys in UNSET.items()
        }
        checked = check_sections(given, origin)
        for line in retired_keys(given, origin):
            logger.warning("%s", line)
        self.tr_setup = checked["tr_setup"]
        self.tr_config = checked["tr_config"]
        self.model_config = checked["model_config"]
        self.dataset_config = checked["dataset_config"]
        self.inference_config = checked["inference_config"]
        self.auxiliary_tasks = dict(auxiliary_tasks or {})
        self.dataset_dir = dataset_dir or self.dataset_config.data_path
        self.output_dir = output_dir or self.tr_setup.ckpt_out_base
        self.device_name = str(device)
        self.target_configs = self._read_targets()
        self._validation_cases: tuple[str, ...] | None = None

    # -- where things are ---------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """Folder of this run: `<output>/<model_name>`."""
        if not self.output_dir:
            raise VolumenError(
                "-o/--output", "no output folder is given", remedy="give -o or tr_setup.ckpt_out_base"
            )
        return Path(self.output_dir) / self.tr_setup.model_name

    @cached_property
    def device(self) -> torch.device:
        """Device on which the network runs; with several processes, this one's own. Joins their group."""
        from volumen.utils.device import choose_device
        from volumen.utils.distributed import initialize

        return initialize(choose_device(self.device_name))

    @property
    def has_device(self) -> bool:
        """Whether the device was chosen yet, and with it the group of processes joined."""
        return "device" in self.__dict__

    def variant(self, **sections: Any) -> ConfigManager:
        """The same experiment on the same opened data with other sections; only what follows from them is made anew.

        The data stay as they were opened and read, whatever `dataset_config` says of that.

        Args:
            sections: checked sections by name, such as `tr_config`.
        """
        other = copy.copy(self)
        for answer, follows_from in _FOLLOWS_FROM.items():
            if not follows_from.isdisjoint(sections):
                other.__dict__.pop(answer, None)
        other.__dict__.update(sections)
        return other

    # -- data ---------------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> Layout:
        """Which images, labels and masks there are."""
        from volumen.data.layout import discover

        if not self.dataset_dir:
            raise VolumenError(
                "-i/--input", "no data folder is given", remedy="give -i or dataset_config.data_path"
            )
        layout = discover(
            self.dataset_dir,
            format=self.dataset_config.format,
            targets=list(self.target_configs) or None,
            allow_unlabeled=self.dataset_config.allow_unlabeled_data,
        )
        return _chosen(layout, self.dataset_config.volumes, self.origin)

    @cached_property
    def cases(self) -> list[OpenCase]:
        """The opened volumes, checked against each other."""
        from volumen.data.block_cache import BLOCKS
        from volumen.data.layout import log_remarks, open_cases

        BLOCKS.resize(self.dataset_config.chunk_cache_mib * 2**20)
        cases = open_cases(
            self.layout,
            axes=self.dataset_config.axes,
            level=self.dataset_config.ome_zarr_resolution,
            spacing=self.dataset_config.spacing,
            rules=self.label_rules,
        )
        log_remarks(cases)
        return cases

    @property
    def label_rules(self) -> dict[str, LabelRule]:
        """What the settings say of how the labels of each target are stored."""
        from volumen.data.label_channels import label_rule

        names = {*self.target_configs, *self.layout.targets}
        return {name: label_rule(name, vars(self._target_config(name))) for name in names}

    @property
    def has_data(self) -> bool:
        """Whether there are data to train on: a folder, a list, or volumes that are open already."""
        return bool(self.dataset_dir) or "layout" in self.__dict__

    def items(self, part: str) -> CaseItems:
        """The images of a part with their labels, as MONAI lists them; found when they are first asked for.

        Args:
            part: `train` or `val`; an image that the split divides is in both.
        """
        from volumen.data.datalist import CaseItems

        def find() -> tuple[list[Case], list[str]]:
            boxes = self.split.train if part == "train" else self.split.val
            return [case for case in self.layout.cases if case.name in boxes], list(self.label_readings)

        return CaseItems(find)

    def with_lists(self, train: Sequence[Any], val: Sequence[Any] | None = None) -> ConfigManager:
        """Train on images that are listed one by one, in place of a folder.

        Args:
            train: what `items("train")` gave, for no change, or a list of {"image": path, "label": path}, see
                `volumen.data.datalist`. With one target in the settings, `label` is that target's.
            val: images that validate; what `items("val")` gave: a share of the listed ones validates
                (`tr_setup.tr_val_split`); an empty list: none.

        Returns:
            This experiment, or a copy with the listed images.

        Raises:
            VolumenError: an entry is no such dictionary, or only `val` is given.
        """
        from volumen.data.datalist import LABEL, CaseItems, layout_of

        by_split = val is None or isinstance(val, CaseItems)
        if isinstance(train, CaseItems):
            if not by_split:
                raise VolumenError(
                    "validate#dataset#data", "is a list and train#dataset#data is none", remedy="give both"
                )
            return self
        listed = [*train, *(() if by_split else val or ())]
        target = next(iter(self.target_configs)) if len(self.target_configs) == 1 else LABEL
        layout = layout_of(listed, root=self.dataset_dir, target=target, where="train#dataset#data")
        other = copy.copy(self)
        other.__dict__.update(layout=_chosen(layout, self.dataset_config.volumes, self.origin))
        if not by_split:
            held_out = layout.cases[len(train) :]
            other._validation_cases = tuple(case.name for case in held_out)
        return other

    def use_cases(self, cases: list[OpenCase], layout: Layout) -> None:
        """Take volumes that are open already, such as a viewer's layers, in place of a folder's.

        Args:
            cases: the volumes, checked against each other.
            layout: what they are called and which targets they have.
        """
        self.__dict__.update(cases=cases, layout=layout)

    def use_split(self, split: Split) -> None:
        """Take this division into training and validation parts in place of one made from the labels."""
        self.__dict__.update(split=split)

    @cached_property
    def spatial_dims(self) -> int:
        """2 or 3, by the data."""
        return len(self.cases[0].image.shape)

    @cached_property
    def in_channels(self) -> int:
        """Image channels: the setting, else the data's."""
        found = self.cases[0].image.channels
        configured = self.model_config.in_channels
        if configured is not None and configured != found:
            raise VolumenError(
                f"{self.origin}: model_config.in_channels",
                expected=f"{found}, the channels of {self.cases[0].image.path}",
                found=configured,
                remedy="leave it out, or set dataset_config.axes",
            )
        return found

    @cached_property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size per spatial axis that the network is planned for: the median over the volumes."""
        from volumen.config.detection import median_spacing

        return median_spacing(self.cases)

    @property
    def _spacing_is_told(self) -> bool:
        """Whether the settings or a file say the voxel size, so that it is not assumed."""
        return bool(self.dataset_config.spacing) or any(case.image.spacing is not None for case in self.cases)

    @property
    def orientation(self) -> str | None:
        """Where the axes of the volumes run to, such as "SAR"; None where no file states it."""
        stated = (case.image.geometry.orientation for case in self.cases)
        return next((orientation for orientation in stated if orientation), None)

    @cached_property
    def split(self) -> Split:
        """Which regions train and which validate; when a run is resumed, its own whatever the settings say now."""
        from volumen.data.sampling.split import make_split, split_by_name
        from volumen.data.sampling.split_file import load_split

        shapes = {case.name: case.image.shape for case in self.cases}
        kept = self.resumed_file("split.json")
        if kept is not None:
            split = load_split(kept, shapes)
            if (split.fraction, split.seed) != (self.tr_setup.tr_val_split, self.tr_setup.seed):
                logger.warning(
                    "%s: the split of the resumed run stays, whatever tr_val_split and seed are now", kept
                )
            return split
        if self._validation_cases is not None:
            setup = self.tr_setup
            return split_by_name(shapes, self._validation_cases, setup.tr_val_split, setup.seed)
        return make_split(
            shapes, self.patch_size, self.tr_setup.tr_val_split, self.tr_setup.seed, self.labelled_profiles
        )

    @cached_property
    def labelled_profiles(self) -> dict[str, dict[str, list[np.ndarray]]]:
        """Labelled voxels in every slice across every axis, by case and target."""
        return self._profiles(self.tr_setup.compute_loss_on_labeled_only)

    @cached_property
    def object_profiles(self) -> dict[str, dict[str, list[np.ndarray]]]:
        """The same of voxels with a label other than 0: within a mask there may be labelled ones without."""
        masked = any(case.masks for case in self.cases)
        return self._profiles(True) if masked else self.labelled_profiles

    @cached_property
    def known_profiles(self) -> dict[str, dict[str, list[np.ndarray]]]:
        """The same of voxels whose label is known by a mask, whatever it is."""
        counts_all = not self.tr_setup.compute_loss_on_labeled_only
        return self.labelled_profiles if counts_all else self._profiles(False)

    def _profiles(self, objects_only: bool) -> dict[str, dict[str, list[np.ndarray]]]:
        from volumen.data.index.label_counts import default_threads
        from volumen.data.sampling.split import labelled_profiles

        return labelled_profiles(
            self.cases,
            list(self.label_readings),
            ignore_labels=self.ignore_labels,
            objects_only=objects_only,
            num_threads=default_threads(),
            cache_dir=self.cache_dir,
        )

    def resumed_file(self, ending: str) -> Path | None:
        """A file of the run that is resumed: beside the checkpoint, which may be of another folder, or this run's own.

        Args:
            ending: of its name, after the model's name, such as `split.json`.

        Returns:
            The file; None where no run is resumed or it has none.
        """
        if not self.resumes:
            return None
        checkpoint = self.tr_setup.checkpoint_path
        beside = (
            sorted(Path(checkpoint).parent.glob(f"*_{ending}"))
            if checkpoint and self.resume_from == checkpoint
            else []
        )
        kept = beside[0] if len(beside) == 1 else self.run_dir / f"{self.tr_setup.model_name}_{ending}"
        return kept if kept.is_file() else None

    @cached_property
    def intensity_properties(self) -> dict[str, Any]:
        """Statistics of the images for the normalisation: those given, else sampled from the training part."""
        from volumen.config.detection import check_finite

        if self.dataset_config.nonfinite == "refuse":
            check_finite([case.image for case in self.cases], cache_dir=self.cache_dir)
        if self.dataset_config.intensity_properties:
            return dict(self.dataset_config.intensity_properties)
        sampled = self._sampled_intensities
        by_volume = self.dataset_config.normalization_scheme == "unit" and sampled["per_volume"]
        if not (self._normalization_needs_samples or by_volume):
            return {}
        return {key: value for key, value in sampled.items() if key != "volumes"}

    @cached_property
    def trained_intensities(self) -> list[dict[str, Any]]:
        """Between which values the training volumes' intensities lie, whatever the normalisation, per channel."""
        return list(self.dataset_config.trained_intensities or self._sampled_intensities["volumes"])

    @property
    def _normalization_needs_samples(self) -> bool:
        from volumen.config.detection import needs_intensity_properties

        return needs_intensity_properties(self.dataset_config.normalization_scheme, self.cases)

    @cached_property
    def _sampled_intensities(self) -> dict[str, Any]:
        """Statistics sampled from the training part; less of it where they are only to be compared with."""
        from volumen.transforms.intensity_properties import sample_intensity_properties

        needed = self._normalization_needs_samples
        raw = self.dataset_config.normalization_scheme == "none"
        return sample_intensity_properties(
            self.cases,
            boxes=self.split.train,
            seed=self.tr_setup.seed,
            ignore_labels=self.ignore_labels,
            per_volume=False if raw else self.dataset_config.normalize_per_volume,
            foreground=needed,
            max_regions=128 if needed else 32,
            most_cases=None if needed else 256,
        )

    @cached_property
    def search_cases(self) -> list[OpenCase] | None:
        """The volumes at the coarser level at which patches are looked for; None to look at full resolution."""
        from volumen.data.formats.volumes import SingleLevelError
        from volumen.data.layout import open_cases

        level = self.dataset_config.valid_patch_find_resolution
        if level <= self.dataset_config.ome_zarr_resolution or not self.layout.cases:
            return None  # a viewer's layers have no path to open another level by
        try:
            return open_cases(
                self.layout,
                axes=self.dataset_config.axes,
                level=level,
                spacing=self.dataset_config.spacing,
                rules=self.label_rules,
            )
        except SingleLevelError as error:
            raise VolumenError(
                f"{self.origin}: dataset_config.valid_patch_find_resolution",
                str(error).partition(";")[0],
                remedy="set it to 0",
            ) from None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A digest of each volume's shape and a sample of its content, by name: of a copy it is the same."""
        from volumen.data.fingerprints import content_digests

        volumes = {}
        for case in self.cases:
            volumes[f"{case.name}/image"] = case.image
            volumes.update({f"{case.name}/label/{name}": volume for name, volume in case.labels.items()})
            volumes.update({f"{case.name}/mask/{name}": volume for name, volume in case.masks.items()})
        return content_digests(volumes)

    @property
    def fingerprint(self) -> str:
        """A digest of all of them."""
        from volumen.data.fingerprints import joined_digest

        return joined_digest(self.fingerprints)

    @property
    def cache_dir(self) -> Path | None:
        """The user's cache folder for indices of valid patches; None for no cache."""
        from volumen.data.index_cache import default_cache_dir

        return default_cache_dir() if self.dataset_config.cache_valid_patches else None

    # -- targets ------------------------------------------------------------------------------------------

    def _read_targets(self) -> dict[str, TargetConfig]:
        here, there = self.dataset_config.targets, self.model_config.targets
        twice = sorted(name for name in set(here) & set(there) if here[name] != there[name])
        if twice:
            raise VolumenError(
                f"{self.origin}: targets.{twice[0]}",
                "dataset_config.targets and model_config.targets contradict each other",
                remedy="keep one of them",
            )
        return {name: read_target(name, entry, self.origin) for name, entry in {**there, **here}.items()}

    @cached_property
    def label_readings(self) -> dict[str, LabelReading]:
        """How the labels of each labelled target are read: as configured, else as they say themselves."""
        from volumen.config.detection import check_classes, detect_label_kind

        readings = {
            name: detect_label_kind(
                name,
                self._target_config(name),
                self.cases,
                self.in_channels,
                self.origin,
                cache_dir=self.cache_dir,
            )
            for name in self.target_configs or self.layout.targets
        }
        if self._labels_are_read:
            for name, reading in readings.items():
                check_classes(name, reading, self._target_config(name), self.cases, cache_dir=self.cache_dir)
        return readings

    @property
    def _labels_are_read(self) -> bool:
        """Whether the labels are read as a whole before the training, which some settings avoid."""
        data = self.dataset_config
        return not data.skip_patch_validation and data.valid_patch_find_resolution <= data.ome_zarr_resolution

    def _target_config(self, name: str) -> TargetConfig:
        return self.target_configs.get(name) or TargetConfig()

    @cached_property
    def primary_targets(self) -> dict[str, Target]:
        """The labelled targets, with kind and channels as configured, else as the labels say."""
        return {
            name: make_target(
                self._target_config(name),
                name,
                kind=reading.kind,
                out_channels=reading.channels,
                instances=reading.instances,
                separate=self.model_config.separate_decoders,
                losses=self.tr_config.losses,
            )
            for name, reading in self.label_readings.items()
        }

    @cached_property
    def targets(self) -> dict[str, Target]:
        """All targets: labelled, then auxiliary."""
        check_names([*self.primary_targets, *self.auxiliary_tasks], self.origin)
        return inject_auxiliary_tasks(
            self.primary_targets,
            self.auxiliary_tasks,
            spatial_dims=self.spatial_dims,
            separate=self.model_config.separate_decoders,
            origin=self.origin,
        )

    @cached_property
    def derived_tasks(self) -> dict[str, dict[str, Any]]:
        """Parameters of every derived target, as `DeriveTargetsd` takes them."""
        return {
            name: {
                "type": target.task_type,
                "source_target": target.source_target,
                "out_channels": target.out_channels,
                **target.task_params,
            }
            for name, target in self.targets.items()
            if target.auxiliary_task
        }

    @cached_property
    def halo(self) -> tuple[int, ...]:
        """Voxels per axis that derived targets need around a patch, whichever volume it is from."""
        from volumen.derived.extents import in_voxels
        from volumen.derived.registry import derive_halo
        from volumen.transforms.instances import instance_halo

        spacings = {in_voxels(case.spacing) for case in self.cases}
        halos = [derive_halo(self.derived_tasks, spacing) for spacing in spacings]
        halos += [instance_halo(self.instances.values(), spacing) for spacing in spacings]
        return tuple(max(axis) for axis in zip(*halos, strict=True))

    @property
    def voxel_spacing(self) -> tuple[float, ...]:
        """Voxel size per axis in units of the smallest one: the unit of derived distances and their losses."""
        from volumen.derived.extents import in_voxels

        return in_voxels(self.spacing)

    @property
    def loss_sections(self) -> dict[str, dict[str, Any]]:
        """What `MultiTaskLoss` is built from."""
        return {name: target.loss_section() for name, target in self.targets.items()}

    @property
    def ignore_labels(self) -> dict[str, int]:
        """Label value that means unknown, for the targets that have one."""
        return {
            name: ignored
            for name in self.label_readings
            if (ignored := self._target_config(name).ignore_label) is not None
        }

    @property
    def label_channels(self) -> dict[str, int]:
        """Channels of the labels of every labelled target; a volume that lacks the label gets as many, unknown."""
        return {
            name: next((case.labels[name].channels for case in self.cases if name in case.labels), 1)
            for name in self.primary_targets
        }

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of every target."""
        return {name: target.kind for name, target in self.targets.items()}

    @property
    def labelled_kinds(self) -> dict[str, str]:
        """Kind of every labelled target: those that the mean Dice is of."""
        return {name: target.kind for name, target in self.primary_targets.items()}

    @property
    def relaxes_labeled_ratio(self) -> bool:
        """Whether nobody set the labelled ratio, so that it gives way where no patch reaches it."""
        return "min_labeled_ratio" not in self.given["dataset_config"]

    @property
    def label_classes(self) -> dict[str, int | None]:
        """Classes per labelled target, or None where every value but 0 means foreground; none for instances."""
        return {
            name: target.out_channels if target.kind == "multiclass" else None
            for name, target in self.primary_targets.items()
            if target.instances is None
        }

    @property
    def instances(self) -> dict[str, str]:
        """What the heads of targets learn whose labels number instances."""
        return {
            name: target.instances
            for name, target in self.primary_targets.items()
            if target.instances is not None
        }

    @property
    def derives_on_device(self) -> bool:
        """Whether derived targets are made on the training device, as far as their tasks can be."""
        setting = self.tr_config.derive_on_device
        return self.device.type == "cuda" if setting == "auto" else setting

    @property
    def device_tasks(self) -> dict[str, dict[str, Any]]:
        """The part of `derived_tasks` that is made on the training device, a batch at once."""
        from volumen.derived.registry import get_task

        if not self.derives_on_device:
            return {}
        return {name: task for name, task in self.derived_tasks.items() if get_task(task["type"]).on_device}

    @property
    def worker_tasks(self) -> dict[str, dict[str, Any]]:
        """The part of `derived_tasks` that the workers make, a patch at a time."""
        elsewhere = self.device_tasks
        return {name: task for name, task in self.derived_tasks.items() if name not in elsewhere}

    @property
    def device_sources(self) -> list[str]:
        """The labelled targets that go to the training device with their halo."""
        return sorted({task["source_target"] for task in self.device_tasks.values()})

    @property
    def worker_sources(self) -> dict[str, str]:
        """The labelled target of each one that the workers derive."""
        return {name: task["source_target"] for name, task in self.worker_tasks.items()}

    @property
    def sampled_classes(self) -> dict[str, list[int]]:
        """Label values by target whose presence in a patch is recorded, for sampling by class; any object of a target
        whose labels are no classes.
        """
        from volumen.data.index.label_counts import ANY_OBJECT

        if not self.dataset_config.class_oversampling:
            return {}
        return {
            name: list(range(1, target.out_channels)) if target.kind == "multiclass" else [ANY_OBJECT]
            for name, target in self.primary_targets.items()
        }

    # -- training -----------------------------------------------------------------------------------------

    @cached_property
    def workers(self) -> int:
        """Processes that prepare patches."""
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
        """Number of processes that train together."""
        from volumen.utils.distributed import world_size

        return world_size()

    @property
    def samples_per_epoch(self) -> int | None:
        """Training patches per epoch over all processes; None: each valid patch once."""
        steps = self.tr_config.max_steps_per_epoch
        return None if steps is None else steps * self.tr_config.batch_size * self.world_size

    @property
    def validation_windows(self) -> int | None:
        """Windows per validation; None: the whole validation part."""
        steps = self.tr_config.max_val_steps_per_epoch
        return None if steps is None else steps * self.tr_config.batch_size

    @property
    def final_validation_windows(self) -> int | None:
        """Windows with which the last and the best epoch are scored; None: the whole validation part.

        Without a setting it is the whole part unless that is larger than the whole training, as of a huge volume.
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
    def validation_names(self) -> list[str]:
        """The names of all metrics and losses that validation can measure, without "val/"."""
        from volumen.losses.multitask import component_labels
        from volumen.metrics.whole_regions import measured_names

        sections = self.loss_sections
        losses = [
            f"loss/{name}{part}"
            for name, section in sections.items()
            for part in ("", *(f"/{label}" for label in component_labels(section["losses"])))
        ]
        return [*measured_names(sections, self.tr_config.validation_metrics), "loss", *losses]

    @property
    def default_key_metric(self) -> str:
        """The metric that chooses the best epoch unless set; the loss where no labelled target has a Dice."""
        from volumen.metrics.target_metrics import metrics_of

        dice = any("dice" in metrics_of(kind) for kind in self.labelled_kinds.values())
        return "val/mean_dice" if dice else "val/loss"

    @property
    def validates(self) -> bool:
        """Whether there is a validation part."""
        return bool(self.split.val)

    @property
    def bg_to_fg_ratio(self) -> float:
        """Background patches per foreground patch."""
        return self.dataset_config.bg_to_fg_ratio if self.dataset_config.bg_sampling_enabled else 0.0

    @property
    def resume_from(self) -> str | None:
        """What the checkpoint handler resumes from: a file, `latest`, or None."""
        setup = self.tr_setup
        if setup.checkpoint_path and not setup.load_weights_only:
            return setup.checkpoint_path
        return "latest" if setup.resume else None

    @property
    def finetune_from(self) -> str | None:
        """A checkpoint to take weights alone from, or None."""
        return self.tr_setup.checkpoint_path if self.tr_setup.load_weights_only else None

    def split_text(self) -> str:
        """Return the text of the run's split file."""
        from volumen.data.sampling.split_file import split_text

        return split_text(self.split, self.fingerprint)

    @property
    def resumes(self) -> bool:
        """Whether an existing run is continued."""
        return self.resume_from is not None

    @property
    def rotation_axes(self) -> list[str] | None:
        """Axes that patches are rotated about; a 2D image turns about z alone."""
        axes = self.dataset_config.rotation_axes
        if axes is not None and self.spatial_dims == 2 and set(axes) - {"z"}:
            raise VolumenError(
                f"{self.origin}: dataset_config.rotation_axes",
                expected="[z] or [] for 2D images",
                found=f"[{', '.join(axes)}]",
                remedy="leave it out to rotate in the plane",
            )
        return list(axes) if axes is not None else None

    # -- network ------------------------------------------------------------------------------------------

    @cached_property
    def requested_patch_size(self) -> tuple[int, ...]:
        """The patch asked for, else one chosen from the data."""
        from volumen.config.detection import default_patch_size

        if self.tr_config.patch_size is None:
            return default_patch_size(self.cases, self.spacing, self.device.type)
        size = tuple(self.tr_config.patch_size)
        if len(size) != self.spatial_dims:
            raise VolumenError(
                f"{self.origin}: tr_config.patch_size",
                expected=f"{self.spatial_dims} numbers, as {self.cases[0].image.path} is {self.spatial_dims}D",
                found=list(size),
                remedy="give one size per spatial axis, (Z, Y, X) or (Y, X)",
            )
        return size

    @cached_property
    def plan(self) -> NetworkPlan:
        """The network's plan: planned, with what `model_config` fixes put in its place."""
        from volumen.networks.plan_settings import apply_settings
        from volumen.networks.planning import plan_network

        model = self.model_config
        patch_size = self.requested_patch_size  # its own errors say what to mend
        try:
            return apply_settings(
                plan_network(patch_size, self.spacing),
                features_per_stage=model.features_per_stage,
                strides=model.strides or model.pool_op_kernel_sizes,
                kernel_sizes=model.kernel_sizes,
                blocks_per_stage=model.n_blocks_per_stage,
                n_stages=model.n_stages,
                base_features=model.base_features,
                max_features=model.max_features,
                adjust_patch=self.tr_setup.autoconfigure,
            )
        except ValueError as error:
            raise VolumenError(
                f"{self.origin}: model_config", str(error), remedy="correct the setting"
            ) from None

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Patch in voxels that the network can take."""
        return tuple(self.plan.patch_size)

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """What `MultiHeadDynUNet.from_config` builds the network from."""
        model = self.model_config
        return {
            "spatial_dims": self.spatial_dims,
            "in_channels": self.in_channels,
            "heads": {
                name: {"out_channels": target.out_channels, "separate_decoder": target.separate_decoder}
                for name, target in self.targets.items()
            },
            "features_per_stage": list(self.plan.features_per_stage),
            "strides": [list(stride) for stride in self.plan.strides],
            "kernel_sizes": [list(kernel) for kernel in self.plan.kernel_sizes],
            "n_blocks_per_stage": list(self.plan.blocks_per_stage),
            "n_conv_per_stage_decoder": model.n_conv_per_stage_decoder,
            "norm_op": model.norm_op,
            "nonlin": model.nonlin,
            "dropout_op": model.dropout_op,
            "dropout_op_kwargs": {"p": model.dropout_p} if model.dropout_op else None,
            "conv_bias": model.conv_bias,
            "do_stem": model.do_stem,
            "stem_channels": model.stem_channels,
            "stochastic_depth_p": model.stochastic_depth_p,
            "squeeze_excitation": model.squeeze_excitation,
            "squeeze_excitation_reduction_ratio": model.squeeze_excitation_reduction_ratio,
            "pool_type": model.pool_type,
            "deep_supervision": self.tr_config.enable_deep_supervision,
        }

    # -- snapshot -----------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return every section with all values settled: plain data that trains the same model again."""
        model = self.network_config
        return {
            "tr_setup": {
                **asdict(self.tr_setup),
                "ckpt_out_base": _text(self.output_dir),
                "checkpoint_path": self.finetune_from,
                "resume": False,
            },
            "tr_config": {**asdict(self.tr_config), "patch_size": list(self.patch_size)},
            "model_config": {
                **asdict(self.model_config),
                "targets": {},
                "in_channels": self.in_channels,
                "features_per_stage": model["features_per_stage"],
                "n_blocks_per_stage": model["n_blocks_per_stage"],
                "kernel_sizes": model["kernel_sizes"],
                "strides": model["strides"],
                "pool_op_kernel_sizes": None,
            },
            "dataset_config": {
                **asdict(self.dataset_config),
                # A value here would be taken for one that somebody gave, which does not give way.
                **({"min_labeled_ratio": None} if self.relaxes_labeled_ratio else {}),
                "data_path": _text(self.dataset_dir),
                "format": self.layout.format,
                "targets": {name: target.snapshot() for name, target in self.primary_targets.items()},
                "spacing": list(self.spacing) if self.dataset_config.spacing else None,
                "trained_spacing": list(self.spacing) if self._spacing_is_told else None,
                "trained_unit": self.cases[0].unit,
                "trained_orientation": self.orientation,
                "intensity_properties": self.intensity_properties,
                "trained_intensities": self.trained_intensities,
            },
            "inference_config": asdict(self.inference_config),
            "auxiliary_tasks": {
                name: target.snapshot() for name, target in self.targets.items() if target.auxiliary_task
            },
        }


def _chosen(layout: Layout, volumes: list[str] | None, origin: str) -> Layout:
    """Keep the volumes named in `dataset_config.volumes`."""
    if volumes is None:
        return layout
    names = [case.name for case in layout.cases]
    if not volumes:
        raise VolumenError(
            f"{origin}: dataset_config.volumes", "names no image", remedy="leave it out to use all of them"
        )
    for name in volumes:
        if name not in names:
            raise VolumenError(
                f"{origin}: dataset_config.volumes",
                expected=f"names of images under {layout.root}",
                found=repr(name),
                remedy=closest(name, names) or f"known: {', '.join(names[:10])}",
            )
    return replace(layout, cases=tuple(case for case in layout.cases if case.name in volumes))


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
