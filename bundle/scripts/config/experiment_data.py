"""Properties of an experiment that follow from its data: volumes, spacing, channels, and labelled slices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from volumen.config.dataset import cache_folder
from volumen.config.experiment import Experiment

if TYPE_CHECKING:
    from volumen.config.dataset import Profiles
    from volumen.config.detection import LabelReading
    from volumen.data.labels.label_channels import LabelRule
    from volumen.data.layout import Layout, OpenCase


class ExperimentData(Experiment):
    """An experiment with the properties of its opened data."""

    @property
    def has_data(self) -> bool:
        """Whether there are data to train on: a folder, a list, or volumes that are already open."""
        return self.data.is_given

    @property
    def layout(self) -> Layout:
        """The images, labels and masks that were found."""
        return self.data.layout

    @property
    def cases(self) -> list[OpenCase]:
        """The opened volumes, checked against each other."""
        return self.data.cases

    @property
    def search_cases(self) -> list[OpenCase] | None:
        """The volumes at the coarser level in which valid patches are searched; None: at full resolution."""
        return self.data.at_level(self.dataset_config.valid_patch_find_resolution)

    @property
    def label_rules(self) -> dict[str, LabelRule]:
        """How the labels of each target are stored, according to the settings."""
        return self.data.label_rules

    @property
    def label_readings(self) -> dict[str, LabelReading]:
        """How the labels of each labelled target are read: as configured, else detected from the labels."""
        return self.data.label_readings

    @property
    def spatial_dims(self) -> int:
        """2 or 3, from the data."""
        return self.data.spatial_dims

    @property
    def in_channels(self) -> int:
        """Image channels: from the settings, else from the data."""
        return self.data.in_channels

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size per spatial axis for which the network is planned: the median over the volumes."""
        return self.data.spacing

    @property
    def length_unit(self) -> str:
        """Short unit of surface distances, such as "µm"; "voxels" if no voxel size is known."""
        from volumen.metrics.units import length_unit, short_unit

        return short_unit(length_unit(self.cases[0].unit, self.spacing))

    @property
    def voxel_spacing(self) -> tuple[float, ...]:
        """Voxel size per axis in units of the smallest one: the unit of derived distances and their losses."""
        from volumen.derived.extents import in_voxels

        return in_voxels(self.spacing)

    @property
    def orientation(self) -> str | None:
        """Anatomical directions of the axes, such as "SAR"; None if no file states them."""
        return self.data.orientation

    @property
    def ignore_labels(self) -> dict[str, int]:
        """Label value that means unknown, for the targets that have one."""
        return self.data.ignore_labels

    @property
    def labelled_profiles(self) -> Profiles:
        """Numbers of labelled voxels in every slice along every axis, by case and target."""
        return self.data.profiles(self.tr_setup.compute_loss_on_labeled_only)

    @property
    def object_profiles(self) -> Profiles:
        """Numbers of voxels with a label other than 0, per slice; masks can also mark label 0 as labelled."""
        masked = any(case.masks for case in self.cases)
        return self.data.profiles(True) if masked else self.labelled_profiles

    @property
    def valid_profiles(self) -> Profiles:
        """Numbers of voxels with a valid label, 0 included, per slice."""
        return self.data.profiles(False)

    @property
    def fingerprints(self) -> dict[str, str]:
        """A digest of each volume's shape and a sample of its content, by name; a copy has the same digest."""
        return self.data.fingerprints

    @property
    def fingerprint(self) -> str:
        """One digest of all volumes."""
        from volumen.data.caching.fingerprints import joined_digest

        return joined_digest(self.fingerprints)

    @property
    def cache_dir(self) -> Path | None:
        """The user's cache folder for indices of valid patches; None for no cache."""
        return cache_folder(self.dataset_config)
