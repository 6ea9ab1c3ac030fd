"""A view of a volume on a grid of another voxel size."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np

from volumen.data.formats.volumes import HasGeometry, Region, Volume, check_region, describe_volume
from volumen.data.space.geometry import Geometry
from volumen.data.space.resampling import Resampling, interpolate, nearest


class ResampledVolume(HasGeometry):
    """A view of a volume on a grid of another voxel size, computed region by region from the stored voxels.

    Images are interpolated linearly, to float32; labels and masks take the nearest stored value.

    Args:
        volume: the volume that is read.
        resampling: the grid; its `shape` is that of the volume.
        is_label: whether values are labels, between which nothing can be interpolated.
    """

    def __init__(self, volume: Volume, resampling: Resampling, *, is_label: bool = False) -> None:
        self.volume, self.resampling, self.is_label = volume, resampling, is_label
        self.source = volume.source
        self.shape = resampling.resampled_shape
        self.channels = volume.channels
        self.dtype = volume.dtype if is_label else np.dtype("float32")
        self.remark = getattr(volume, "remark", "")
        self.chunks = tuple(
            max(1, min(n, math.ceil(chunk / step)))
            for chunk, step, n in zip(volume.chunks, resampling.step, self.shape, strict=True)
        )
        self.geometry = _resampled(volume.geometry, resampling)
        self.affine = _resampled_affine(volume.affine, resampling)

    @property
    def path(self) -> str:
        """Path of the volume."""
        return self.volume.path

    @path.setter
    def path(self, path: str) -> None:
        self.volume = copy.copy(self.volume)
        self.volume.path = path

    def __repr__(self) -> str:
        return describe_volume(self)

    def fingerprint(self) -> str:
        """Return a hash of the volume's content and of the grid."""
        from volumen.data.caching.fingerprints import digest

        return digest([self.volume.fingerprint(), self.resampling.step, self.is_label])

    def read(self, region: Region) -> np.ndarray:
        region = check_region(region, self.shape)
        if any(part.start == part.stop for part in region):
            return np.empty((self.channels, *(part.stop - part.start for part in region)), self.dtype)
        positions = [
            self.resampling.stored_positions(axis, part.start, part.stop) for axis, part in enumerate(region)
        ]
        spans = [
            _needed(where, n, self.is_label) for where, n in zip(positions, self.volume.shape, strict=True)
        ]
        block = self.volume.read(tuple(slice(*span) for span in spans))
        first = [start for start, _ in spans]
        if self.is_label:
            return np.ascontiguousarray(nearest(block, positions, first))
        return interpolate(block, positions, first, self.resampling.order)


def stored_volume(volume: Volume) -> Volume:
    """Return the volume on its stored grid: that of a resampled view, else the volume itself."""
    return volume.volume if isinstance(volume, ResampledVolume) else volume


def resampling_of(volume: Volume) -> Resampling | None:
    """Return how a volume is resampled, or None where it is read as stored."""
    return volume.resampling if isinstance(volume, ResampledVolume) else None


def _needed(positions: np.ndarray, size: int, is_label: bool) -> tuple[int, int]:
    """Return the stored voxels (start, stop) along an axis that the values at positions depend on."""
    if is_label:
        low, high = math.floor(positions[0] + 0.5), math.floor(positions[-1] + 0.5) + 1
    else:
        low, high = math.floor(positions[0]), math.floor(positions[-1]) + 2
    low = min(max(low, 0), size - 1)
    return low, max(low + 1, min(high, size))


def _resampled(geometry: Geometry, resampling: Resampling) -> Geometry:
    if geometry.spacing is None:
        return geometry
    spacing = tuple(size * step for size, step in zip(geometry.spacing, resampling.step, strict=True))
    return replace(_shifted(geometry, resampling.offset()), spacing=spacing)


def _shifted(geometry: Geometry, start: np.ndarray) -> Geometry:
    if not geometry.is_placed:
        return geometry
    there = geometry.matrix() @ np.array([*start, 1.0])
    return replace(geometry, origin=tuple(float(value) for value in there[:-1]))


def _resampled_affine(affine: np.ndarray | None, resampling: Resampling) -> np.ndarray | None:
    """Return the (4, 4) affine over (X, Y, Z) indices of the resampled grid."""
    if affine is None or len(resampling.step) != 3:
        return affine
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag(resampling.step[::-1])
    matrix[:3, 3] = resampling.offset()[::-1]
    return affine @ matrix
