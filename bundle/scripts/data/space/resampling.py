"""The map between the stored voxels of a volume and voxels of another size, axis by axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[tuple[int, int], ...]

_SAME = 0.5
"""Voxels by which the far end of an axis may differ between two voxel sizes that count as equal."""


@dataclass(frozen=True)
class Resampling:
    """A grid of voxels of another size over a volume; both grids begin at the same outer face of the volume.

    Voxel `q` of the resampled grid has its centre at the stored position `(q + 0.5) * step - 0.5`.

    Args:
        shape: stored voxels per axis.
        step: size of a resampled voxel per axis, in stored voxels.
    """

    shape: tuple[int, ...]
    step: tuple[float, ...]

    @classmethod
    def between(cls, shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> Resampling:
        """Return the resampling of a volume of voxels of one size to voxels of another size.

        An axis along which the two grids nowhere differ by half a voxel stays as it is stored.

        Args:
            shape: stored voxels per axis.
            spacing: stored voxel size per axis.
            target: size of the resampled voxels per axis, in the same unit.
        """
        steps = []
        for count, stored, wanted in zip(shape, spacing, target, strict=True):
            step = float(wanted) / float(stored)
            steps.append(1.0 if abs(step - 1) * count < _SAME * max(step, 1.0) else step)
        return cls(tuple(int(n) for n in shape), tuple(steps))

    @property
    def is_identity(self) -> bool:
        """Whether both grids are the same."""
        return all(step == 1 for step in self.step)

    @property
    def resampled_shape(self) -> tuple[int, ...]:
        """Resampled voxels per axis, rounded, at least 1."""
        return tuple(max(1, round(n / step)) for n, step in zip(self.shape, self.step, strict=True))

    def stored_positions(self, axis: int, start: int, stop: int) -> np.ndarray:
        """Return the stored positions (stop - start,) float64 of resampled voxels along an axis."""
        return (np.arange(start, stop) + 0.5) * self.step[axis] - 0.5

    def resampled_positions(self, axis: int, start: int, stop: int) -> np.ndarray:
        """Return the resampled positions (stop - start,) float64 of stored voxels along an axis."""
        return (np.arange(start, stop) + 0.5) / self.step[axis] - 0.5

    @property
    def order(self) -> tuple[int, ...]:
        """The axes, those that lose most voxels by resampling first."""
        return tuple(sorted(range(len(self.step)), key=lambda axis: -self.step[axis]))

    def matrix(self) -> np.ndarray:
        """Return the (n, n) matrix from resampled to stored voxels."""
        return np.diag(self.step)

    def offset(self) -> np.ndarray:
        """Return the stored position (n,) of resampled voxel 0."""
        return (np.asarray(self.step) - 1) / 2

    def stored_box(self, box: Sequence[Sequence[int]]) -> Box:
        """Return the stored voxels whose centres lie in a box of the resampled grid.

        Boxes that touch give boxes that touch and share no voxel; the whole grid gives the whole volume.
        """
        whole = self.resampled_shape
        return tuple(
            (
                0 if start == 0 else min(n, max(0, math.ceil(start * step - 0.5))),
                n if stop == size else min(n, max(0, math.ceil(stop * step - 0.5))),
            )
            for (start, stop), n, size, step in zip(box, self.shape, whole, self.step, strict=True)
        )

    def on_stored(
        self, values: np.ndarray, positions: Sequence[np.ndarray], first: Sequence[int]
    ) -> np.ndarray:
        """Return values of the resampled grid at stored voxels, by linear interpolation.

        Args:
            values: (C, *space), a part of the resampled grid.
            positions: `resampled_positions` of the stored voxels, per axis.
            first: first voxel of `values` in the resampled grid.
        """
        # The reverse order: an axis that resampling enlarged is reduced again.
        return interpolate(values, positions, first, self.order[::-1])

    def outside(self, region: Sequence[slice]) -> np.ndarray | None:
        """Return the stored voxels of a region that the resampled grid does not cover, bool; None if it covers all."""
        return None

    def resampled_box(self, box: Sequence[Sequence[int]]) -> Box:
        """Return the resampled voxels that linear interpolation needs at the stored voxels of a box."""
        found = []
        for axis, ((start, stop), size) in enumerate(zip(box, self.resampled_shape, strict=True)):
            ends = self.resampled_positions(axis, start, stop)[[0, -1]]
            low, high = math.floor(ends[0]), math.floor(ends[1]) + 2
            found.append((min(max(low, 0), size - 1), max(1, min(high, size))))
        return tuple(found)


def interpolate(
    values: np.ndarray, positions: Sequence[np.ndarray], first: Sequence[int], order: Sequence[int]
) -> np.ndarray:
    """Return values at positions by linear interpolation, axis by axis; the border's value beyond the border.

    The result at a position is the same bits whatever other positions are computed with it.

    Args:
        values: (C, *space), any real dtype.
        positions: per axis the positions, in voxels of the volume that `values` is cut from.
        first: per axis the voxel of that volume that is the first in `values`.
        order: the axes in the order of work; those that lose most voxels should come first.

    Returns:
        float32 (C, *(number of positions per axis)).
    """
    result = values.astype(np.float32, copy=False)
    for axis in order:
        result = _along(result, axis + 1, positions[axis], first[axis])
    return np.ascontiguousarray(result)


def nearest(values: np.ndarray, positions: Sequence[np.ndarray], first: Sequence[int]) -> np.ndarray:
    """Return the values nearest to positions, in their own dtype; halfway between two voxels, that of the later one.

    Args:
        values: (C, *space).
        positions, first: as for `interpolate`.
    """
    for axis, (where, low) in enumerate(zip(positions, first, strict=True), start=1):
        index = np.floor(where - low + 0.5).astype(np.int64)
        values = values.take(np.clip(index, 0, values.shape[axis] - 1), axis=axis)
    return values


def _along(values: np.ndarray, axis: int, positions: np.ndarray, first: int) -> np.ndarray:
    below = np.floor(positions)
    weight = (positions - below).astype(np.float32)
    last = values.shape[axis] - 1
    lower = np.clip(below.astype(np.int64) - first, 0, last)
    upper = np.clip(below.astype(np.int64) - first + 1, 0, last)
    if not weight.any() and np.array_equal(lower, np.arange(last + 1)):
        return values
    shape = [1] * values.ndim
    shape[axis] = -1
    result = values.take(lower, axis=axis)
    step = values.take(upper, axis=axis)
    step -= result
    step *= weight.reshape(shape)
    result += step
    return result
