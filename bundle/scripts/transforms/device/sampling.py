"""Samples stored voxels on the grid of a patch, as `kernels.grid` does in the workers.

Positions are float64, so that a label is taken from the same voxel. No function copies a value to the host: what
depends on the grid alone is decided on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from volumen.transforms.kernels.grid import Grid, Region
from volumen.transforms.spatial import SpatialTransform

_EXACT = 1e-9  # voxels, as in `kernels.resample`


def sample_image(raw: Tensor, region: Region, grid: Grid) -> Tensor:
    """Return an image on a grid by linear interpolation, reflected beyond its region.

    Args:
        raw: (C, *region), not empty, any real type.
        region: region of the volume in `raw`.
        grid: positions of the voxels.

    Returns:
        float32 (C, *patch_shape).
    """
    starts = [span.start for span in region]
    if grid.matrix is None:
        for axis, (first, count) in enumerate(zip(_firsts(grid, starts), grid.shape), start=1):
            size = raw.shape[axis]
            if first >= 0 and first + count <= size:
                raw = raw.narrow(axis, first, count)
            else:
                where = torch.arange(first, first + count, device=raw.device)
                raw = raw.index_select(axis, reflected(where, size))
        return orient(raw, grid.spatial).float().contiguous()
    return _permuted(_interpolate(raw.float(), starts, grid), grid.spatial).contiguous()


def orient(values: Tensor, spatial: SpatialTransform) -> Tensor:
    """Do what `SpatialTransform.orient` does with an array."""
    flipped = [axis for axis, flip in enumerate(spatial.flips, start=1) if flip]
    values = _permuted(values, spatial)
    return values.flip(flipped) if flipped else values


def reflected(positions: Tensor, size: int) -> Tensor:
    """Do what `reflected_positions` does, for int64 positions."""
    if size == 1:
        return torch.zeros_like(positions)
    period = 2 * (size - 1)
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


class NearestSamples:
    """Takes labels and masks of one region on a grid; the positions are computed once.

    Args:
        grid: positions of the voxels.
        region: region of the volume that is stored, the grid's own region within some bounds.
        device: device of the values.

    Attributes:
        inside: bool (1, *patch_shape), whether the nearest voxel lies in the region; None if all do.
    """

    def __init__(self, grid: Grid, region: Region, device: torch.device) -> None:
        self.grid, self.region, self.device = grid, region, device
        self._nearest = None if grid.matrix is None else _nearest_voxels(grid, device)
        self._flat = self._flat_index()
        self.inside = self.within([(span.start, span.stop) for span in region])

    def values(self, raw: Tensor) -> Tensor:
        """Return the nearest values (C, *patch_shape) of raw (C, *region), 0 outside the region."""
        if self.grid.matrix is None:
            return orient(self._crop(raw), self.grid.spatial).contiguous()
        assert self._flat is not None
        found = raw.flatten(1).index_select(1, self._flat).reshape(len(raw), *self.grid.shape)
        found = _permuted(found, self.grid.spatial).contiguous()
        return found if self.inside is None else torch.where(self.inside, found, 0)

    def within(self, bounds: Sequence[tuple[int, int]]) -> Tensor | None:
        """Return which voxels (1, *patch_shape) lie in a box of the volume; None if all do."""
        extent = self.grid.extent()
        if all(
            start <= low and high <= stop for (low, high), (start, stop) in zip(extent, bounds, strict=True)
        ):
            return None
        inside = torch.ones((1, *self.grid.shape), dtype=torch.bool, device=self.device)
        if self._nearest is None:
            for axis, ((low, _), (start, stop)) in enumerate(zip(extent, bounds), start=1):
                at = self._along(torch.arange(low, low + self.grid.shape[axis - 1], device=self.device), axis)
                inside = inside & (at >= start) & (at < stop)
            return orient(inside, self.grid.spatial).contiguous()
        for at, (start, stop) in zip(self._nearest, bounds):
            inside = inside & ((at >= start) & (at < stop))
        return _permuted(inside, self.grid.spatial).contiguous()

    def _along(self, values: Tensor, axis: int) -> Tensor:
        return values.reshape([-1 if number == axis else 1 for number in range(len(self.grid.shape) + 1)])

    def _crop(self, raw: Tensor) -> Tensor:
        if tuple(raw.shape[1:]) == self.grid.shape:
            return raw
        whole = raw.new_zeros((len(raw), *self.grid.shape))
        firsts = _firsts(self.grid, [span.start for span in self.region])
        spans = (slice(-first, size - first) for first, size in zip(firsts, raw.shape[1:]))
        whole[(slice(None), *spans)] = raw
        return whole

    def _flat_index(self) -> Tensor | None:
        if self._nearest is None:
            return None
        flat: Tensor | None = None
        for at, span in zip(self._nearest, self.region, strict=True):
            size = span.stop - span.start
            at = (at - span.start).clamp(0, max(size - 1, 0))
            flat = at if flat is None else flat * size + at
        assert flat is not None
        return flat.reshape(-1)


def _permuted(values: Tensor, spatial: SpatialTransform) -> Tensor:
    return values.permute(0, *(axis + 1 for axis in spatial.permutation))


def _firsts(grid: Grid, starts: Sequence[int]) -> list[int]:
    return [int(first) - start for first, start in zip(grid.offset, starts, strict=True)]


def _positions(grid: Grid, axis: int, start: int, device: torch.device) -> Tensor:
    """Return the positions along an axis of the volume: float64, of a shape that broadcasts to the grid's."""
    assert grid.matrix is not None
    position: Tensor | float = float(grid.offset[axis]) - start
    for number, size in enumerate(grid.shape):
        step = float(grid.matrix[axis, number])
        if step or number == axis:
            line = torch.arange(size, dtype=torch.float64, device=device) * step
            position = position + line.reshape([-1 if n == number else 1 for n in range(len(grid.shape))])
    assert isinstance(position, Tensor)
    return position


def _nearest_voxels(grid: Grid, device: torch.device) -> list[Tensor]:
    axes = range(len(grid.shape))
    return [
        (_positions(grid, axis, 0, device) + 0.5).floor().to(torch.int64).expand(grid.shape) for axis in axes
    ]


def _interpolate(values: Tensor, starts: Sequence[int], grid: Grid) -> Tensor:
    """Interpolate (C, *region) float32 between the voxels around each position, the last axis first."""
    voxels: list[tuple[Tensor, ...]] = []
    weights: list[Tensor | None] = []
    for axis, (start, (low, high)) in enumerate(zip(starts, grid.extent(), strict=True)):
        size = values.shape[axis + 1]
        positions = _positions(grid, axis, start, values.device)
        exact = _is_exact(grid, axis)
        below = positions.round() if exact else positions.floor()
        first = below.to(torch.int64)
        taps: tuple[Tensor, ...] = (first,) if exact else (first, first + 1)
        if low < start or high > start + size:
            taps = tuple(reflected(tap, size) for tap in taps)
        voxels.append(taps)
        weights.append(None if exact else (positions - below).float())
    corners = [_at(values, corner, grid.shape) for corner in product(*voxels)]
    for weight in reversed(weights):
        if weight is not None:
            corners = [a + weight * (b - a) for a, b in zip(corners[::2], corners[1::2])]
    return corners[0]


def _at(values: Tensor, voxel: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    flat: Tensor = voxel[0]
    for at, size in zip(voxel[1:], values.shape[2:], strict=True):
        flat = flat * size + at
    flat = flat.expand(shape).reshape(-1)
    return values.flatten(1).index_select(1, flat).reshape(len(values), *shape)


def _is_exact(grid: Grid, axis: int) -> bool:
    """Whether all positions along an axis of the volume are those of voxels."""
    assert grid.matrix is not None
    numbers = np.array([grid.offset[axis], *grid.matrix[axis]])
    return bool((np.abs(numbers - np.rint(numbers)) * max(grid.shape) < _EXACT).all())
