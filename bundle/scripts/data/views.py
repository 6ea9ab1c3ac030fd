"""What views of a volume have in common, and where their voxels lie in the stored volume."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from volumen.data.formats.volumes import HasGeometry, Region, Volume, describe_volume


class VolumeView(HasGeometry):
    """A volume that is computed from another one, region by region; it keeps the other one's path and channels.

    Args:
        volume: the volume that is read.
    """

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.source = volume.source
        self.channels = volume.channels
        self.remark = getattr(volume, "remark", "")

    @property
    def path(self) -> str:
        """Path of the volume."""
        return self.volume.path

    @path.setter
    def path(self, path: str) -> None:
        self.volume = copy.copy(self.volume)
        self.volume.path = path

    def __repr__(self) -> str:
        return describe_volume(self)  # type: ignore[arg-type]

    def inner_region(self, region: Region) -> Region:
        """Return the region of the inner volume that becomes `region` of this one."""
        raise NotImplementedError


def stored_box(volume: Volume, box: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Return where a box of a volume lies in the stored volume, through all views of it.

    Args:
        volume: a volume or a view.
        box: start and stop per axis of the volume.
    """
    region: Region = tuple(slice(*span) for span in box)
    while isinstance(volume, VolumeView):
        region, volume = volume.inner_region(region), volume.volume
    return tuple((part.start, part.stop) for part in region)
