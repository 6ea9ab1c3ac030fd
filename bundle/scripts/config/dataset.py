"""The data of an experiment: opened once, read once, and shared by all configurations of that experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.config.parts.dataset import DatasetConfig
from volumen.config.parts.targets import TargetConfig
from volumen.config.targets import read_target
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

if TYPE_CHECKING:
    import numpy as np

    from volumen.config.detection import LabelReading
    from volumen.data.labels.label_channels import LabelRule
    from volumen.data.layout import Layout, OpenCase

    Profiles = dict[str, dict[str, list[np.ndarray]]]


@dataclass(frozen=True, eq=False, repr=False)
class OpenedData:
    """The volumes of an experiment, their content, and how their labels are read; each is computed at first use.

    Attributes:
        folders: the data folders; none where the data are given otherwise.
        settings: `dataset_config`, which says how the data are opened.
        target_configs: the configured targets by name; empty for every target found.
        configured_channels: `model_config.in_channels`.
        origin: name of the file that the settings come from, for errors.
        given_layout: a layout that replaces the folder's.
        given_cases: volumes that are already open, such as a viewer's layers.
        validation_cases: names of the volumes that validate; None for a share of all.
    """

    folders: tuple[str, ...]
    settings: DatasetConfig
    target_configs: Mapping[str, TargetConfig]
    configured_channels: int | None = None
    origin: str = "configuration"
    given_layout: Layout | None = None
    given_cases: list[OpenCase] | None = None
    validation_cases: tuple[str, ...] | None = None
    _profiles: dict[bool, Profiles] = field(default_factory=dict, init=False)
    _levels: dict[int, list[OpenCase]] = field(default_factory=dict, init=False)

    @property
    def is_given(self) -> bool:
        """Whether data exist: a folder, a list, or volumes that are already open."""
        return bool(self.folders) or self.given_layout is not None

    @property
    def path(self) -> str | list[str] | None:
        """The data folder, or the list of several, as the settings state it; None where none is given."""
        return list(self.folders) if len(self.folders) > 1 else next(iter(self.folders), None)

    def listed(self, train: Sequence[Any], val: Sequence[Any] | None, target: str) -> OpenedData:
        """The data of images that are listed one by one, in place of the folder's.

        Args:
            train: dictionaries as `volumen.data.datalist` describes them.
            val: those that validate; None: a share of the listed ones does.
            target: the target whose label has the key `label`.

        Raises:
            VolumenError: an entry is no such dictionary.
        """
        from volumen.data.datalist import layout_of

        layout = layout_of(
            [*train, *(val or ())],
            root=next(iter(self.folders), None),
            target=target,
            where="train#dataset#data",
        )
        names = None if val is None else tuple(case.name for case in layout.cases[len(train) :])
        layout = chosen(layout, self.settings.volumes, self.origin)
        return replace(self, given_layout=layout, given_cases=None, validation_cases=names)

    def need_folders(self) -> None:
        """Raise an error where no data folder is given."""
        if not self.folders:
            raise VolumenError(
                "-i/--input", "no data folder is given", remedy="give -i or dataset_config.data_path"
            )

    @cached_property
    def layout(self) -> Layout:
        """Which images, labels and masks there are."""
        from volumen.data.joining import discover_all, discover_any, named_folder

        if self.given_layout is not None:
            return self.given_layout
        self.need_folders()
        several = [*self.folders, *([self.settings.val_path] if self.settings.val_path else [])]
        options: dict[str, Any] = {
            "format": self.settings.format,
            "targets": list(self.target_configs) or None,
            "allow_unlabeled": self.settings.allow_unlabeled_data,
        }
        if len(several) == 1 and not named_folder(several[0])[0]:
            layout = discover_any(several[0], **options)
        else:
            layout = discover_all(several, **options)
        return chosen(layout, self.settings.volumes, self.origin)

    @property
    def validation_names(self) -> tuple[str, ...] | None:
        """Names of the volumes that validate where a list or a folder of their own says so; None elsewhere."""
        from volumen.data.joining import named_folder

        if self.validation_cases is not None:
            return self.validation_cases
        used = {case.name for case in self.layout.cases}
        if not self.settings.val_path:
            chosen = any(
                getattr(self.settings, key) is not None for key in ("val_volumes", "split_path", "fold")
            )
            listed = None if chosen else self.layout.validates
            return None if listed is None else tuple(name for name in listed if name in used)
        members = self.layout.members.get(named_folder(self.settings.val_path)[1], ())
        return tuple(name for name in members if name in used)

    @cached_property
    def cases(self) -> list[OpenCase]:
        """The opened volumes, checked against each other."""
        from volumen.data.caching.block_cache import BLOCKS
        from volumen.data.layout import log_remarks

        if self.given_cases is not None:
            return self._at_target_spacing(self.given_cases)
        BLOCKS.resize(self.settings.chunk_cache_mib * 2**20)
        cases = self._open(self.settings.ome_zarr_resolution)
        log_remarks(cases)
        return self._at_target_spacing(cases)

    def _at_target_spacing(self, cases: list[OpenCase]) -> list[OpenCase]:
        from volumen.data.layout import warn_of_differing_sizes
        from volumen.data.target_spacing import to_target_spacing

        if self.settings.target_spacing is None:
            warn_of_differing_sizes(cases)
            return cases

        return to_target_spacing(
            cases, self.settings.target_spacing, stated=self.settings.spacing is not None
        )

    def _open(self, level: int) -> list[OpenCase]:
        from volumen.data.layout import open_cases

        return open_cases(
            self.layout,
            axes=self.settings.axes,
            level=level,
            spacing=self.settings.spacing,
            rules=self.label_rules,
        )

    def at_level(self, level: int) -> list[OpenCase] | None:
        """Open the volumes at a coarser level; None if the level is not coarser or the volumes have no files.

        Raises:
            VolumenError: the volumes have a single level.
        """
        from volumen.data.formats.volumes import SingleLevelError

        if level <= self.settings.ome_zarr_resolution or not self.layout.cases:
            return None
        if self.settings.target_spacing is not None:
            raise VolumenError(
                f"{self.origin}: dataset_config.valid_patch_find_resolution",
                expected="0 with dataset_config.target_spacing, since the voxels of all levels are resampled",
                found=level,
                remedy="set it to 0",
            )
        try:
            if level not in self._levels:
                self._levels[level] = self._open(level)
        except SingleLevelError as error:
            raise VolumenError(
                f"{self.origin}: dataset_config.valid_patch_find_resolution",
                str(error).partition(";")[0],
                remedy="set it to 0",
            ) from None
        return self._levels[level]

    @property
    def label_rules(self) -> dict[str, LabelRule]:
        """How the labels of each target are stored, according to the settings."""
        from volumen.data.labels.label_channels import label_rule

        names = {*self.target_configs, *self.layout.targets}
        return {name: label_rule(name, vars(self.target_config(name))) for name in names}

    @cached_property
    def spatial_dims(self) -> int:
        """2 or 3, from the data."""
        return len(self.cases[0].image.shape)

    @cached_property
    def in_channels(self) -> int:
        """Image channels: from the settings, else from the data."""
        found = self.cases[0].image.channels
        if self.configured_channels is not None and self.configured_channels != found:
            raise VolumenError(
                f"{self.origin}: model_config.in_channels",
                expected=f"{found}, the channels of {self.cases[0].image.path}",
                found=self.configured_channels,
                remedy="leave it out, or set dataset_config.axes",
            )
        return found

    @cached_property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size per spatial axis for which the network is planned: the median over the volumes."""
        from volumen.config.detection import median_spacing

        return median_spacing(self.cases)

    @property
    def spacing_is_stated(self) -> bool:
        """Whether the settings or a file state the voxel size; otherwise it is an assumption."""
        return bool(self.settings.spacing) or any(case.image.spacing is not None for case in self.cases)

    @property
    def orientation(self) -> str | None:
        """Anatomical directions of the axes, such as "SAR"; None if no file states them."""
        stated = (case.image.geometry.orientation for case in self.cases)
        return next((orientation for orientation in stated if orientation), None)

    def target_config(self, name: str) -> TargetConfig:
        """Return the configuration of a labelled target; the defaults if it has none."""
        configured = self.target_configs.get(name) or TargetConfig()
        stated = read_target(name, self.layout.stated[name], self.layout.root) if self._states(name) else None
        if stated is None:
            return configured
        unset = TargetConfig()
        missing = {
            key: value
            for key, value in vars(stated).items()
            if getattr(configured, key) == getattr(unset, key)
        }
        return replace(configured, **missing)

    def _states(self, name: str) -> bool:
        """Whether a description beside the data says what the labels of a target are."""
        return self.given_cases is None and name in self.layout.stated

    @cached_property
    def label_readings(self) -> dict[str, LabelReading]:
        """How the labels of each labelled target are read: as configured, else detected from the labels."""
        from volumen.config.detection import check_classes, detect_label_kind

        cache_dir = cache_folder(self.settings)
        readings = {
            name: detect_label_kind(
                name,
                self.target_config(name),
                self.cases,
                self.in_channels,
                self.origin,
                cache_dir=cache_dir,
            )
            for name in self.target_configs or self.layout.targets
        }
        if self._labels_are_read:
            for name, reading in readings.items():
                check_classes(name, reading, self.target_config(name), self.cases, cache_dir=cache_dir)
        return readings

    @property
    def _labels_are_read(self) -> bool:
        """Whether all labels are read before training starts, which some settings avoid."""
        data = self.settings
        return not data.skip_patch_validation and data.valid_patch_find_resolution <= data.ome_zarr_resolution

    @property
    def ignore_labels(self) -> dict[str, int]:
        """Label value that means unknown, for the targets that have one."""
        return {
            name: ignored
            for name in self.label_readings
            if (ignored := self.target_config(name).ignore_label) is not None
        }

    def profiles(self, objects_only: bool) -> Profiles:
        """Count voxels in every slice along every axis, by case and target.

        Args:
            objects_only: count the voxels with a label other than 0; otherwise all voxels with a valid label.
        """
        from volumen.data.index.label_counts import default_threads
        from volumen.data.sampling.split import labelled_profiles

        if objects_only not in self._profiles:
            self._profiles[objects_only] = labelled_profiles(
                self.cases,
                list(self.label_readings),
                ignore_labels=self.ignore_labels,
                objects_only=objects_only,
                num_threads=default_threads(),
                cache_dir=cache_folder(self.settings),
            )
        return self._profiles[objects_only]

    def class_profiles(self, objects_only: bool, classes: Mapping[str, tuple[int, ...]]) -> Profiles:
        """The same of each class too, with the key "target=class".

        Args:
            objects_only: as for `profiles`.
            classes: the classes by target.
        """
        from volumen.data.index.label_counts import default_threads
        from volumen.data.sampling.split import labelled_profiles

        if not any(classes.values()):
            return self.profiles(objects_only)
        return labelled_profiles(
            self.cases,
            list(self.label_readings),
            ignore_labels=self.ignore_labels,
            classes=classes,
            objects_only=objects_only,
            num_threads=default_threads(),
            cache_dir=cache_folder(self.settings),
        )

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A digest of each volume's shape and a sample of its content, by name; a copy has the same digest."""
        from volumen.data.caching.fingerprints import content_digests

        volumes = {}
        for case in self.cases:
            volumes[f"{case.name}/image"] = case.image
            volumes.update({f"{case.name}/label/{name}": volume for name, volume in case.labels.items()})
            volumes.update({f"{case.name}/mask/{name}": volume for name, volume in case.masks.items()})
        return content_digests(volumes)


def cache_folder(settings: DatasetConfig) -> Path | None:
    """Return the user's cache folder for results read from labels and images; None for no cache."""
    from volumen.data.caching.index_cache import default_cache_dir

    return default_cache_dir() if settings.cache_valid_patches else None


def chosen(layout: Layout, volumes: list[str] | None, origin: str) -> Layout:
    """Return the layout with only the volumes that `dataset_config.volumes` names."""
    from volumen.data.case_names import known_name

    if volumes is None:
        return layout
    names = [case.name for case in layout.cases]
    if not volumes:
        raise VolumenError(
            f"{origin}: dataset_config.volumes", "names no image", remedy="leave it out to use all of them"
        )
    volumes = [known_name(name, names) for name in volumes]
    for name in volumes:
        if name not in names:
            raise VolumenError(
                f"{origin}: dataset_config.volumes",
                expected=f"names of images under {layout.root}",
                found=repr(name),
                remedy=closest(name, names) or f"known: {', '.join(names[:10])}",
            )
    return replace(layout, cases=tuple(case for case in layout.cases if case.name in volumes))
