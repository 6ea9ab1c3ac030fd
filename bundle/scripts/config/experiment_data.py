"""What an experiment says of its data: the volumes, their spacing and channels, and where labels are."""

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
    """An experiment that names what its opened data hold."""

    @property
    def has_data(self) -> bool:
        """Whether there are data to train on: a folder, a list, or volumes that are open already."""
        return self.data.is_given

    @property
    def layout(self) -> Layout:
        """Which images, labels and masks there are."""
        return self.data.layout

    @property
    def cases(self) -> list[OpenCase]:
        """The opened volumes, checked against each other."""
        return self.data.cases

    @property
    def search_cases(self) -> list[OpenCase] | None:
        """The volumes at the coarser level at which patches are looked for; None to look at full resolution."""
        return self.data.at_level(self.dataset_config.valid_patch_find_resolution)

    @property
    def label_rules(self) -> dict[str, LabelRule]:
        """What the settings say of how the labels of each target are stored."""
        return self.data.label_rules

    @property
    def label_readings(self) -> dict[str, LabelReading]:
        """How the labels of each labelled target are read: as configured, else as they say themselves."""
        return self.data.label_readings

    @property
    def spatial_dims(self) -> int:
        """2 or 3, by the data."""
        return self.data.spatial_dims

    @property
    def in_channels(self) -> int:
        """Image channels: the setting, else the data's."""
        return self.data.in_channels

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size per spatial axis that the network is planned for: the median over the volumes."""
        return self.data.spacing

    @property
    def length_unit(self) -> str:
        """Unit of surface distances as it stands behind a number: "µm", or "voxels" where no voxel size is known."""
        from volumen.metrics.units import length_unit, short_unit

        return short_unit(length_unit(self.cases[0].unit, self.spacing))

    @property
    def voxel_spacing(self) -> tuple[float, ...]:
        """Voxel size per axis in units of the smallest one: the unit of derived distances and their losses."""
        from volumen.derived.extents import in_voxels

        return in_voxels(self.spacing)

    @property
    def orientation(self) -> str | None:
        """Where the axes of the volumes run to, such as "SAR"; None where no file states it."""
        return self.data.orientation

    @property
    def ignore_labels(self) -> dict[str, int]:
        """Label value that means unknown, for the targets that have one."""
        return self.data.ignore_labels

    @property
    def labelled_profiles(self) -> Profiles:
        """Labelled voxels in every slice across every axis, by case and target."""
        return self.data.profiles(self.tr_setup.compute_loss_on_labeled_only)

    @property
    def object_profiles(self) -> Profiles:
        """The same of voxels with a label other than 0: within a mask there may be labelled ones without."""
        masked = any(case.masks for case in self.cases)
        return self.data.profiles(True) if masked else self.labelled_profiles

    @property
    def known_profiles(self) -> Profiles:
        """The same of voxels whose label is known by a mask, whatever it is."""
        return self.data.profiles(False)

    @property
    def fingerprints(self) -> dict[str, str]:
        """A digest of each volume's shape and a sample of its content, by name: of a copy it is the same."""
        return self.data.fingerprints

    @property
    def fingerprint(self) -> str:
        """A digest of all of them."""
        from volumen.data.caching.fingerprints import joined_digest

        return joined_digest(self.fingerprints)

    @property
    def cache_dir(self) -> Path | None:
        """The user's cache folder for indices of valid patches; None for no cache."""
        return cache_folder(self.dataset_config)
