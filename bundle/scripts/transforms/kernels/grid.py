"""Computes where the voxels of an augmented patch lie in a volume, and reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.data.space.reflection import reflect
from volumen.data.space.resampling import Resampling
from volumen.transforms.kernels import resample
from volumen.transforms.spatial import SpatialTransform

Box = tuple[tuple[int, int], ...]
Region = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxels of a patch as positions in a volume, before the patch's axes are permuted.

    Args:
        spatial: the drawn transform.
        matrix: (n, n) from voxels of the grid to voxels of the volume, including flips and, of a resampled volume,
            the voxel size; None for a plain crop, which `SpatialTransform.orient` flips afterwards.
        offset: (n,) position of the grid's voxel 0 in the volume.
        shape: voxels per axis of the grid.
    """

    spatial: SpatialTransform
    matrix: np.ndarray | None
    offset: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of_patch(
        cls,
        start: Sequence[int],
        size: Sequence[int],
        halo: Sequence[int],
        spatial: SpatialTransform,
        spacing: Sequence[float],
    ) -> Grid:
        """Return the grid of a patch of `size` at `start`, enlarged by `halo`, with `spatial` applied about its centre.

        Args:
            start: first voxel per axis of the patch in the volume.
            size: voxels per axis of the patch, equal for axes that `spatial` exchanges.
            halo: voxels added on either side, per axis of the patch.
            spatial: the drawn transform.
            spacing: voxel size per axis.
        """
        inner_halo = np.asarray(spatial.before_permutation(halo))
        shape = tuple(int(n) for n in np.asarray(spatial.before_permutation(size)) + 2 * inner_halo)
        first = np.asarray(start, dtype=float)
        if spatial.matrix is None:
            return cls(spatial, None, first - inner_halo, shape)
        matrix = spatial.mirrored_matrix(spacing)
        centre = first + (np.asarray(size) - 1) / 2
        return cls(spatial, matrix, centre - matrix @ ((np.asarray(shape) - 1) / 2), shape)

    def resampled(self, resampling: Resampling) -> Grid:
        """Return the same voxels as positions in the stored volume, for a grid that lies in a resampled one."""
        matrix = self.matrix
        offset = self.offset
        if matrix is None:
            # A plain crop is flipped afterwards, as a view; by a matrix it is flipped while it is sampled.
            flips = np.asarray(self.spatial.before_permutation(self.spatial.flips))
            matrix = np.diag(np.where(flips, -1.0, 1.0))
            offset = offset + np.where(flips, np.asarray(self.shape) - 1, 0)
        step = resampling.matrix()
        return Grid(self.spatial, step @ matrix, step @ offset + resampling.offset(), self.shape)

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """The voxels per axis of the patch, including the halo."""
        return tuple(self.shape[axis] for axis in self.spatial.permutation)

    def region(self, bounds: Box) -> Region:
        """Return the region of the volume that the grid needs, clipped to `bounds`."""
        spans = []
        for (low, high), (start, stop) in zip(self.extent(), bounds):
            first = min(max(low, start), stop)
            spans.append(slice(first, max(first, min(high, stop))))
        return tuple(spans)

    def reflect(self, raw: np.ndarray, region: Region) -> tuple[np.ndarray, Region]:
        """Extend an image by reflection to all voxels that the grid needs, so that all of them have a value.

        Args:
            raw: (C, *region), any dtype; not empty.
            region: region of the volume, the result of `region`.

        Returns:
            The extended image and its region, whose starts may be negative; the arguments themselves if the grid
            lies inside.
        """
        extent = tuple(slice(*span) for span in self.extent())
        wide = tuple(
            slice(min(e.start, r.start), max(e.stop, r.stop)) for e, r in zip(extent, region, strict=True)
        )
        if wide == region:
            return raw, region
        starts = [w.start - r.start for w, r in zip(wide, region, strict=True)]
        return reflect(raw, starts, [w.stop - w.start for w in wide]), wide

    def sample(self, raw: np.ndarray, region: Region, outside: np.ndarray, order: int = 1) -> np.ndarray:
        """Return an image on the grid, oriented like the patch.

        Args:
            raw: (C, *region), any real dtype.
            region: region of the volume, the result of `region`.
            outside: (C,) values for voxels outside the region.
            order: 1 for linear, 3 for cubic spline interpolation.

        Returns:
            (C, *patch_shape), contiguous: of the dtype of `raw` for a plain crop, else float32.
        """
        if self.matrix is None:
            return self._crop(raw, region, outside)
        out = np.empty((len(raw), *self.shape), dtype=np.float32)
        matrix, offset = self._in_three(region)
        interpolate = resample.linear if order == 1 else resample.spline
        for channel in range(len(raw)):
            box = resample.as_box(raw[channel])
            interpolate(box, matrix, offset, float(outside[channel]), resample.as_box(out[channel]))
        return np.ascontiguousarray(self.spatial.permute(out))

    def nearest(self, region: Region) -> np.ndarray:
        """Return the flat index into `region` of the voxel nearest to each of the grid, -1 outside: (nz, ny, nx)."""
        matrix, offset = self._in_three(region)
        ones = (1,) * (3 - len(self.shape))
        source = ones + tuple(span.stop - span.start for span in region)
        return resample.nearest_index(source, matrix, offset, ones + self.shape)

    def inside(self, bounds: Box) -> np.ndarray | None:
        """Return which voxels (1, *patch_shape) lie in `bounds`; None if all do."""
        if all(start <= low and high <= stop for (low, high), (start, stop) in zip(self.extent(), bounds)):
            return None
        if self.matrix is None:
            region = self.region(bounds)
            inside = np.ones((1, *(span.stop - span.start for span in region)), dtype=bool)
            return self._crop(inside, region, np.zeros(1))
        index = self.nearest(tuple(slice(*span) for span in bounds))
        return np.ascontiguousarray(self.spatial.permute((index >= 0).reshape(1, *self.shape)))

    def extent(self) -> list[tuple[int, int]]:
        """Return the first and the last plus one voxel of the volume that the grid needs, per axis, also outside it."""
        if self.matrix is None:
            return [(int(first), int(first) + size) for first, size in zip(self.offset, self.shape)]
        reach = self.matrix * (np.asarray(self.shape) - 1)
        low = np.floor(self.offset + np.minimum(reach, 0).sum(axis=1))
        # Linear interpolation also needs the voxel after the last position.
        high = np.floor(self.offset + np.maximum(reach, 0).sum(axis=1)) + 2
        return [(int(first), int(last)) for first, last in zip(low, high)]

    def _crop(self, raw: np.ndarray, region: Region, outside: np.ndarray) -> np.ndarray:
        if raw.shape[1:] != self.shape:
            whole = np.empty((len(raw), *self.shape), dtype=raw.dtype)
            whole[...] = np.asarray(outside).astype(raw.dtype).reshape(-1, *(1,) * len(self.shape))
            spans = (
                slice(span.start - int(first), span.stop - int(first))
                for span, first in zip(region, self.offset)
            )
            whole[(slice(None), *spans)] = raw
            raw = whole
        if self.spatial.permutation != tuple(range(len(self.shape))):
            # A slice of a large array in memory is copied first: swapping its axes in one step would touch a
            # page per voxel.
            raw = np.ascontiguousarray(raw)
        return np.ascontiguousarray(self.spatial.orient(raw))

    def _in_three(self, region: Region) -> tuple[np.ndarray, np.ndarray]:
        assert self.matrix is not None
        missing = 3 - len(region)
        matrix, offset = np.eye(3), np.zeros(3)
        matrix[missing:, missing:] = self.matrix
        offset[missing:] = self.offset - [span.start for span in region]
        return matrix, offset


class LabelReader:
    """Reads label volumes of one case on the same grid; the positions of voxels are computed once.

    Args:
        grid: positions of the voxels.
        bounds: the part of the volumes that may be read.
    """

    def __init__(self, grid: Grid, bounds: Box) -> None:
        self.grid = grid
        self.region = grid.region(bounds)
        self.inside = grid.inside(bounds)
        self._index: np.ndarray | None = None

    def read(self, volume: Any) -> np.ndarray:
        """Return the nearest values (Ct, *patch_shape) in the volume's own dtype, zero outside the bounds."""
        if is_empty(self.region):
            return np.zeros((volume.channels, *self.grid.patch_shape), dtype=volume.dtype)
        raw = np.asarray(volume.read(self.region))
        if self.grid.matrix is None:
            return self.grid.sample(raw, self.region, np.zeros(len(raw)))
        if self._index is None:
            self._index = self.grid.nearest(self.region)
        box = raw.reshape(len(raw), *(1,) * (4 - raw.ndim), *raw.shape[1:])
        label = resample.gather(box, self._index).reshape(len(raw), *self.grid.shape)
        return np.ascontiguousarray(self.grid.spatial.permute(label))


def is_empty(region: Region) -> bool:
    """Return whether a region holds no voxel."""
    return any(span.start == span.stop for span in region)
