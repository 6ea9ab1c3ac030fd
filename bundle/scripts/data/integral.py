"""Labels that were stored as floats or booleans, read as integers."""

from __future__ import annotations

import numpy as np

from scripts.data.volumes import Placed, Region, Volume
from scripts.errors import VolumenError


class IntegralVolume(Placed):
    """A view of a volume of whole numbers stored as another type, as labels in NIfTI often are.

    Booleans read as uint8, floats as int32. A value that is not a whole number, or lies outside int32, is
    refused by the read that meets it.
    """

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.path, self.source = volume.path, volume.source
        self.shape = volume.shape
        self.channels = volume.channels
        self.geometry = volume.geometry
        self.chunks = volume.chunks
        self.affine = volume.affine
        self.dtype = np.dtype(np.uint8 if np.dtype(volume.dtype) == bool else np.int32)

    def __repr__(self) -> str:
        return f"IntegralVolume({self.volume!r})"

    def fingerprint(self) -> str:
        return self.volume.fingerprint()

    def read(self, region: Region) -> np.ndarray:
        block = self.volume.read(region)
        if block.dtype == bool:
            return block.view(np.uint8)
        with np.errstate(invalid="ignore"):
            whole = block.astype(np.int32)
        wrong = whole != block
        if wrong.any():
            self._refuse(block, np.argwhere(wrong)[0], region)
        return whole

    def _refuse(self, block: np.ndarray, where: np.ndarray, region: Region) -> None:
        value = block[tuple(where)].item()
        position = tuple(int(part.start or 0) + int(index) for part, index in zip(region, where[1:]))
        raise VolumenError(
            self.path,
            expected="a label with whole numbers",
            found=f"{value!r} at voxel {position}",
            remedy="round it and store it as integers",
        )
