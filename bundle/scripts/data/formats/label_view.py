"""Views of label volumes: the same voxels with values of their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from volumen.data.formats.volumes import Region, Volume
from volumen.utils.errors import VolumenError


class LabelView:
    """A view of a label volume with values of its own; all that it does not say comes from the volume.

    Args:
        volume: what is stored.
        channels: channels of the view.
        remark: what was recognised, for the log.
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
    """A label of which 0 is the foreground: 1 where the stored value is 0, else 0.

    Args:
        volume: integers.
        unknown: value that stays as it is, or None.
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


class NoNanMask(LabelView):
    """A mask of fractions, of which a NaN would count as marked: refused by the read that meets one."""

    def __init__(self, volume: Volume) -> None:
        super().__init__(volume, volume.channels)

    def read(self, region: Region) -> np.ndarray:
        block = self.volume.read(region)
        if np.isnan(block).any():
            raise VolumenError(
                self.volume.path, expected="a mask of numbers", found="NaN", remedy="replace it by 0 or 1"
            )
        return block
