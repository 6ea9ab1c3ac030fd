"""TIFF images and stacks, read by region: mapped where the voxels lie in one piece, else by strip or tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.axes import AxisMap, map_axes
from scripts.data.fingerprints import file_fingerprint
from scripts.data.volumes import LazyVolume, Region
from scripts.errors import VolumenError

_LETTERS = {"S": "c", "I": "?", "Q": "?"}


class TiffVolume(LazyVolume):
    """The first series of a TIFF file."""

    def __init__(self, path: Path, series: Any, axis_map: AxisMap, **known: Any) -> None:
        page = series.keyframe
        super().__init__(str(path), axis_map, series.dtype, chunks=_blocks(axis_map, page), **known)

    def _open(self) -> Any:
        import tifffile
        import zarr

        return zarr.open(tifffile.TiffFile(self.path).series[0].aszarr(level=0), mode="r")

    def _read_stored(self, region: Region) -> np.ndarray:
        try:
            return np.asarray(self.handle[region])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise VolumenError(
                self.path, f"is truncated or corrupt ({reason})", remedy="copy it again"
            ) from error

    def fingerprint(self) -> str:
        return file_fingerprint(Path(self.path), self.shape, self.dtype)


def open_tiff(path: Path, *, axes: str | None = None, ndim: int | None = None) -> TiffVolume:
    """Open the first series of a TIFF file (TIFF, BigTIFF, ImageJ hyperstack, OME-TIFF)."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            known = "".join(_LETTERS.get(letter, letter.lower()) for letter in series.axes)
            axis_map = map_axes(path, series.shape, known=known, requested=axes, ndim=ndim)
            return TiffVolume(path, series, axis_map)
    except VolumenError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise VolumenError(
            path, f"its TIFF tags cannot be read ({reason})", remedy="copy it again"
        ) from error


def _blocks(axis_map: AxisMap, page: Any) -> tuple[int, ...]:
    plane = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    plane = tuple(min(block, size) for block, size in zip(plane, axis_map.shape[-2:]))
    return (1,) * (len(axis_map.shape) - 2) + plane
