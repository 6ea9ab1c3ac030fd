"""Writes MRC files slab by slab."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.formats.extra.library import library
from volumen.inference.output.file_formats.slabs import final_path, first_voxel, scale_to, slabs, wide
from volumen.inference.output.ome_zarr import ZarrOutput

logger = logging.getLogger(__name__)

_MODES = {"uint8": 6, "uint16": 6, "float32": 2}
"""Mode per type. Mode 0 has signed bytes, so that probabilities above 127 need the 16 bits of mode 6."""
_STORED: dict[int, np.dtype] = {6: np.dtype("<u2"), 2: np.dtype("<f4")}


def holds(dtype: np.dtype, channels: int) -> bool:
    """Return whether an MRC file can hold a target: one channel of at most 16 bits or of floats."""
    return channels == 1 and wide(np.dtype(dtype)).name in _MODES


def write_mrc(path: Path, arrays: ZarrOutput, target: str) -> None:
    """Write a target of one channel as MRC2014; voxel size and origin in Å.

    Args:
        path: the file.
        arrays: the finished prediction.
        target: the target to write.
    """
    mrcfile = library("mrcfile", path)
    mode = _MODES[wide(arrays.stored[target].dtype).name]
    shape = (1,) * (3 - len(arrays.shape)) + arrays.shape
    by = scale_to(arrays, "angstrom")
    if by is None:
        logger.warning(
            "%s: the image states no unit of length; MRC counts its voxel size in angstroms", final_path(path)
        )
        by = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a file that holds no values yet
        with mrcfile.new_mmap(path, shape, mrc_mode=mode, overwrite=True) as file:
            header = file.header
            header.ispg = 1
            header.mz = shape[0]
            for axis, size in zip("zyx"[-len(arrays.shape) :], arrays.spacing, strict=True):
                header.cella[axis] = size * by * int(header[f"n{axis}"])
            for axis, value in zip("zyx"[-len(arrays.shape) :], first_voxel(arrays), strict=True):
                header.origin[axis] = value * by
            header.nlabl, header.label[0] = 1, b"volumen"
            start = header.nbytes + int(header.nsymbt)
    with path.open("r+b") as stream:
        stream.seek(start)
        statistics = _Statistics()
        for slab in slabs(arrays, target):
            values = np.ascontiguousarray(slab, dtype=_STORED[mode])
            statistics.add(values)
            stream.write(values.tobytes())
        stream.seek(0)
        header = np.frombuffer(stream.read(header.nbytes), header.dtype).copy().view(np.recarray)
        statistics.enter(header)
        stream.seek(0)
        stream.write(header.tobytes())


class _Statistics:
    """Minimum, maximum, mean and deviation, added up slab by slab."""

    def __init__(self) -> None:
        self._low, self._high, self._sum, self._squares, self._count = np.inf, -np.inf, 0.0, 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        self._sum += float(values.sum(dtype=np.float64))
        self._squares += float((values.astype(np.float64) ** 2).sum())
        self._count += values.size

    def enter(self, header: Any) -> None:
        mean = self._sum / self._count
        header["dmin"], header["dmax"], header["dmean"] = self._low, self._high, mean
        header["rms"] = max(self._squares / self._count - mean**2, 0.0) ** 0.5
