"""Reads labels that are stored as floats or booleans as integers."""

from __future__ import annotations

import numpy as np

from volumen.data.formats.volumes import HasGeometry, Region, Volume
from volumen.utils.errors import VolumenError


class IntegralVolume(HasGeometry):
    """An integer view of a volume whose whole numbers are stored as another type, as is common for labels in NIfTI.

    Booleans are read as uint8, floats as int32. A read that finds a value that is not a whole number or is outside
    int32 raises a `VolumenError`.

    Args:
        volume: the stored volume.
        unknown: value as which NaN is read; None refuses NaN.
        setting: name of the target's entry, for messages.
    """

    def __init__(self, volume: Volume, *, unknown: int | None = None, setting: str = "") -> None:
        self.volume = volume
        self.unknown, self.setting = unknown, setting
        self.remark = getattr(volume, "remark", "")
        self.samples = getattr(volume, "samples", None)
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
        stored = self.volume.fingerprint()
        return stored if self.unknown is None else f"{stored} NaN {self.unknown}"

    def read(self, region: Region) -> np.ndarray:
        block = self.volume.read(region)
        if block.dtype == bool:
            return block.view(np.uint8)
        if self.unknown is not None and block.dtype.kind == "f":
            block = np.where(np.isnan(block), block.dtype.type(self.unknown), block)
        with np.errstate(invalid="ignore"):
            whole = block.astype(np.int32)
        wrong = whole != block
        if wrong.any():
            self._refuse(block, np.argwhere(wrong)[0], region)
        return whole

    def _refuse(self, block: np.ndarray, where: np.ndarray, region: Region) -> None:
        value = block[tuple(where)].item()
        position = tuple(int(part.start or 0) + int(index) for part, index in zip(region, where[1:]))
        remedy = "round it and store it as integers"
        if value != value:
            remedy = "replace NaN by 0 where it means background"
            if self.setting:
                remedy = f"set {self.setting}.ignore_label: -1 if NaN means unknown, or {remedy}"
        raise VolumenError(
            self.path,
            expected="a label with whole numbers",
            found=f"{value!r} at voxel {position}",
            remedy=remedy,
        )
