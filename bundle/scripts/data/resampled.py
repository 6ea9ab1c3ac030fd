"""A view of a volume on a grid of another voxel size."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from volumen.data.formats.volumes import Region, Volume, check_region
from volumen.data.space.geometry import Geometry
from volumen.data.space.resampling import Resampling, interpolate, nearest
from volumen.data.validity import inside_mask
from volumen.data.views import VolumeView


class ResampledVolume(VolumeView):
    """A view of a volume on a grid of another voxel size, computed region by region from the stored voxels.

    Images are interpolated linearly, to float32; labels and masks take the nearest stored value.

    Args:
        volume: the volume that is read.
        resampling: the grid; its `shape` is that of the volume.
        is_label: whether values are labels, between which nothing can be interpolated.
    """

    def __init__(self, volume: Volume, resampling: Resampling, *, is_label: bool = False) -> None:
        super().__init__(volume)
        self.resampling, self.is_label = resampling, is_label
        self.shape = resampling.resampled_shape
        self.dtype = volume.dtype if is_label else np.dtype("float32")
        self.chunks = tuple(
            max(1, min(n, math.ceil(chunk / step)))
            for chunk, step, n in zip(volume.chunks, resampling.step, self.shape, strict=True)
        )
        self.geometry = _resampled(volume.geometry, resampling)
        self.affine = _resampled_affine(volume.affine, resampling)

    def inner_region(self, region: Region) -> Region:
        box = self.resampling.stored_box([(part.start, part.stop) for part in region])
        return tuple(slice(*span) for span in box)

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


class TouchedMask(ResampledVolume):
    """A mask on a resampled grid, of which a region is 1 where it has anything to say of a stored voxel in the mask.

    The nearest voxel of a coarser grid may miss a thin mask, and stored voxels at its edge depend on resampled ones
    outside. So a whole region is 1 if any stored voxel that depends on it is in the mask, else 0.

    Args:
        volume: the mask, above 0 inside.
        resampling: the grid.
    """

    def __init__(self, volume: Volume, resampling: Resampling) -> None:
        super().__init__(volume, resampling, is_label=True)
        self.dtype = np.dtype("uint8")

    def read(self, region: Region) -> np.ndarray:
        region = check_region(region, self.shape)
        spans = []
        for axis, (part, size) in enumerate(zip(region, self.volume.shape, strict=True)):
            # Interpolation at a stored voxel reaches less than one resampled voxel to either side.
            ends = self.resampling.stored_positions(axis, part.start - 1, part.stop + 1)[[0, -1]]
            low = min(max(math.floor(ends[0]), 0), size - 1)
            spans.append(slice(low, max(low + 1, min(math.ceil(ends[1]) + 1, size))))
        touched = bool(inside_mask(self.volume.read(tuple(spans))).any())
        return np.full((1, *(part.stop - part.start for part in region)), touched, self.dtype)


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
