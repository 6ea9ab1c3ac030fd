"""The targets of an experiment, and where its derived targets are computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from volumen.config.experiment_data import ExperimentData
from volumen.config.targets import Target, check_fields, inject_auxiliary_tasks, make_target
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import check_names

logger = logging.getLogger(__name__)


class ExperimentTargets(ExperimentData):
    """An experiment whose targets follow from its sections and its labels."""

    @cached_property
    def primary_targets(self) -> dict[str, Target]:
        """The labelled targets, with kind and channels as configured, else detected from the labels."""
        return {
            name: make_target(
                self.data.target_config(name),
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
        """All targets that the network predicts: labelled ones first, then derived ones."""
        return {name: target for name, target in self.learned_or_read.items() if target.head}

    @cached_property
    def learned_or_read(self) -> dict[str, Target]:
        """The targets, and the derived ones without a head, which losses of their sources read."""
        check_names([*self.primary_targets, *self.auxiliary_tasks], self.origin)
        found = inject_auxiliary_tasks(
            self.primary_targets,
            {name: self._with_offsets(name, task) for name, task in self.auxiliary_tasks.items()},
            spatial_dims=self.spatial_dims,
            separate=self.model_config.separate_decoders,
            origin=self.origin,
        )
        check_fields(found, self.origin)
        return found

    def _with_offsets(self, name: str, task: Any) -> Any:
        """Return the entry of a task, with `offsets: auto` replaced by offsets for the voxel size and the objects."""
        from volumen.config.object_width import object_width
        from volumen.derived.long_range import long_range_offsets

        asked = (
            isinstance(task, Mapping) and task.get("type") == "affinities" and task.get("offsets") == "auto"
        )
        source = self.primary_targets.get(str(task.get("source_target"))) if asked else None
        if source is None:
            return task
        width = object_width(
            self.cases,
            source.name,
            ignore=source.ignore_label,
            numbered=source.instances is not None or source.kind == "multiclass",
        )
        offsets = long_range_offsets(self.spacing, width)
        logger.info(
            "%s: offsets %s, for objects of %s voxels",
            name,
            ", ".join(str(tuple(offset)) for offset in offsets),
            "unknown size" if width is None else " x ".join(f"{size:.0f}" for size in width),
        )
        return {**task, "offsets": offsets}

    @cached_property
    def derived_tasks(self) -> dict[str, dict[str, Any]]:
        """Parameters of every derived target, in the form that `DeriveTargetsd` expects."""
        return {
            name: {
                "type": target.task_type,
                "source_target": target.source_target,
                "out_channels": target.out_channels,
                **target.task_params,
                "validity": self.validity[name],
            }
            for name, target in self.learned_or_read.items()
            if target.auxiliary_task
        }

    @cached_property
    def validity(self) -> dict[str, str]:
        """What each derived target learns near unknown voxels: "exact" or "informed", see `volumen.derived.informed`.

        It says once which types cannot state what they know, and are derived with exact validity.
        """
        from volumen.derived.informed import EXACT, INFORMED
        from volumen.derived.registry import check_validity, get_task

        everywhere = self.tr_config.validity
        if everywhere != "auto":
            check_validity("tr_config.validity", everywhere)
        found = {}
        for name, target in self.learned_or_read.items():
            if target.task_type is None or target.source_target is None:
                continue
            asked = target.task_params.get("validity") or (None if everywhere == "auto" else everywhere)
            found[name] = asked or (INFORMED if self.is_partly_unknown(target.source_target) else EXACT)
            if found[name] == INFORMED and not get_task(target.task_type).informs:
                found[name] = EXACT
                logger.info(
                    "%s: %s does not state what is known near unknown voxels, so it learns exact values only",
                    name,
                    target.task_type,
                )
        return found

    def is_partly_unknown(self, target: str) -> bool:
        """Whether a labelled target has a mask in any volume, or a label value that means unknown."""
        return self.ignore_labels.get(target) is not None or any(target in case.masks for case in self.cases)

    @cached_property
    def halo(self) -> tuple[int, ...]:
        """Voxels per axis that derived targets need around a patch of any volume."""
        from volumen.derived.extents import in_voxels
        from volumen.derived.registry import derive_halo
        from volumen.transforms.instances import instance_halo

        spacings = {in_voxels(case.spacing) for case in self.cases}
        halos = [derive_halo(self.derived_tasks, spacing) for spacing in spacings]
        halos += [instance_halo(self.instances.values(), spacing) for spacing in spacings]
        return tuple(max(axis) for axis in zip(*halos, strict=True))

    @property
    def loss_sections(self) -> dict[str, dict[str, Any]]:
        """Arguments of `MultiTaskLoss` by target."""
        return {
            name: {**target.loss_section(), "validity": self.validity.get(name)}
            for name, target in self.targets.items()
        }

    @cached_property
    def fusions(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The labelled targets that may be read from several heads: the heads, and the sign of each of their channels.

        Raises:
            VolumenError: a `fuse` that has no meaning for its target.
        """
        from volumen.config.fusions import fusible_heads

        found = {
            name: fusible_heads(
                name,
                target.fuse,
                kind=target.kind,
                instances=target.instances,
                tasks=self.derived_tasks,
                ndim=self.spatial_dims,
                where=f"{self.origin}: targets.{name}.fuse",
            )
            for name, target in self.primary_targets.items()
            if target.fuse != "none"
        }
        return {name: heads for name, heads in found.items() if len(heads) > 1}

    @property
    def label_channels(self) -> dict[str, int]:
        """Channels of the labels of every labelled target; a volume without the label gets as many, all invalid."""
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
        """Kind of every labelled target; the mean Dice is computed over these."""
        return {name: target.kind for name, target in self.primary_targets.items()}

    @property
    def label_classes(self) -> dict[str, int | None]:
        """Classes per labelled target without instances; None if every value except 0 is foreground."""
        return {
            name: target.out_channels if target.kind == "multiclass" else None
            for name, target in self.primary_targets.items()
            if target.instances is None
        }

    @property
    def instances(self) -> dict[str, str]:
        """What the head learns (such as foreground), by target whose labels number instances."""
        return {
            name: target.instances
            for name, target in self.primary_targets.items()
            if target.instances is not None
        }

    @property
    def derives_on_device(self) -> bool:
        """Whether the training device computes derived targets, if their tasks support it."""
        setting = self.tr_config.derive_on_device
        if setting == "auto":
            return self.device.type == "cuda" or self.augments_on_device
        return setting

    @property
    def augments_on_device(self) -> bool:
        """Whether the training device augments patches that the workers only read."""
        setting = self.tr_config.augment_on_device
        if setting is True and self.device.type == "mps":
            raise VolumenError(
                "tr_config.augment_on_device",
                expected="a device with float64, on which the positions of voxels are computed",
                found=self.device.type,
                remedy="set it to false",
            )
        return self.device.type == "cuda" if setting == "auto" else setting

    @property
    def device_tasks(self) -> dict[str, dict[str, Any]]:
        """The part of `derived_tasks` that the training device computes, one batch at a time."""
        from volumen.derived.registry import derives_on_device, get_task

        if not self.derives_on_device:
            return {}
        return {
            name: task
            for name, task in self.derived_tasks.items()
            if derives_on_device(get_task(task["type"]), task)
        }

    @property
    def worker_tasks(self) -> dict[str, dict[str, Any]]:
        """The part of `derived_tasks` that the workers compute, one patch at a time."""
        elsewhere = self.device_tasks
        return {name: task for name, task in self.derived_tasks.items() if name not in elsewhere}

    @property
    def device_sources(self) -> list[str]:
        """The labelled targets that are sent to the training device with their halo."""
        return sorted({task["source_target"] for task in self.device_tasks.values()})

    @property
    def worker_sources(self) -> dict[str, str]:
        """The labelled source of each target that the workers derive."""
        return {name: task["source_target"] for name, task in self.worker_tasks.items()}

    @property
    def class_scores(self) -> dict[str, tuple[str, int]]:
        """The Dice of each class by its name in a validation, without "val/": target and label value.

        The value of a channel, such as a region, is its `channel_class`. It is `ANY_OBJECT` for the single Dice of a
        target without classes.
        """
        from volumen.data.index.label_counts import ANY_OBJECT
        from volumen.metrics.target_metrics import class_names

        found: dict[str, tuple[str, int]] = {}
        for name, target in self.primary_targets.items():
            if target.kind not in ("binary", "multiclass", "multilabel"):
                continue
            section = {"out_channels": target.out_channels, "classes": target.classes}
            names = class_names(name, target.kind, section)
            values = _values_of_classes(target) or [ANY_OBJECT] * len(names)
            for value, label in zip(values, names, strict=True):
                key = f"{name}/dice/{label}" if len(names) > 1 else f"{name}/dice"
                found[key] = (name, value)
        return found

    @cached_property
    def sampled_classes(self) -> dict[str, list[int]]:
        """Label values or channels by target whose presence in a patch is recorded, for sampling by class.

        Targets without classes have the single value `ANY_OBJECT`.
        """
        from volumen.data.index.label_counts import ANY_OBJECT

        if not self.dataset_config.class_oversampling:
            return {}
        return {
            name: _values_of_classes(target) or [ANY_OBJECT] for name, target in self.primary_targets.items()
        }


def _values_of_classes(target: Target) -> list[int]:
    """Return the label value of each class, or what stands for its channel; none of a target without classes."""
    from volumen.data.index.label_counts import channel_class

    if target.kind == "multilabel":
        return [channel_class(channel) for channel in range(target.out_channels)]
    return list(range(1, target.out_channels)) if target.kind == "multiclass" else []
