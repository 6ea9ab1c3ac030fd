"""Views of label volumes that change values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from volumen.data.formats.volumes import Region, Volume
from volumen.utils.errors import VolumenError


class LabelView:
    """A view of a label volume with changed values; all other attributes are those of the volume.

    Args:
        volume: the stored volume.
        channels: channels of the view.
        remark: description of the recognised form, for the log.
    """

    def __init__(self, volume: Volume, channels: int, remark: str = "") -> None:
        self.volume = volume
        self.channels = channels
        self.remark = "; ".join(part for part in (getattr(volume, "remark", ""), remark) if part)

    def __getattr__(self, name: str) -> Any:
        if name == "volume" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.volume, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.volume!r})"


class InvertedLabel(LabelView):
    """View of a label whose foreground is 0: 1 where the stored value is 0, else 0.

    Args:
        volume: a volume of integers.
        unknown: value that is not changed, or None.
    """

    def __init__(self, volume: Volume, unknown: int | None = None) -> None:
        super().__init__(volume, volume.channels, "its values are inverted: 0 is foreground")
        self.unknown = unknown
        self.dtype = np.dtype(np.uint8 if unknown is None else volume.dtype)

    def fingerprint(self) -> str:
        return f"{self.volume.fingerprint()} inverted {self.unknown}"

    def read(self, region: Region) -> np.ndarray:
        stored = self.volume.read(region)
        inverted = (stored == 0).astype(self.dtype)
        return inverted if self.unknown is None else np.where(stored == self.unknown, stored, inverted)


class RegionLabel(LabelView):
    """View of a label map as overlapping regions: a channel each, 1 where the label is one of the region's values.

    Args:
        volume: a volume of integers with one channel.
        regions: label values of each region.
        unknown: value that is not changed, in any channel, or None.

    Raises:
        VolumenError: the label has several channels.
    """

    def __init__(self, volume: Volume, regions: Sequence[Sequence[int]], unknown: int | None = None) -> None:
        if volume.channels != 1:
            raise VolumenError(
                volume.path,
                expected="a label of 1 channel, whose values make the regions",
                found=f"{volume.channels} channels",
                remedy="leave regions out: the channels are regions already",
            )
        super().__init__(volume, len(regions))
        self.regions = tuple(tuple(values) for values in regions)
        self.unknown = unknown
        self.dtype = np.dtype(np.uint8 if unknown is None else volume.dtype)

    def fingerprint(self) -> str:
        return f"{self.volume.fingerprint()} regions {self.regions} {self.unknown}"

    def read(self, region: Region) -> np.ndarray:
        stored = self.volume.read(region)[0]
        found = np.stack([np.isin(stored, values) for values in self.regions]).astype(self.dtype)
        return found if self.unknown is None else np.where(stored == self.unknown, stored, found)


class NoNanMask(LabelView):
    """View of a mask of floats; a read that finds a NaN, which would count as inside, raises an error."""

    def __init__(self, volume: Volume) -> None:
        super().__init__(volume, volume.channels)

    def read(self, region: Region) -> np.ndarray:
        block = self.volume.read(region)
        if np.isnan(block).any():
            raise VolumenError(
                self.volume.path, expected="a mask of numbers", found="NaN", remedy="replace it by 0 or 1"
            )
        return block
