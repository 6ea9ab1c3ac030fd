"""The grid on which a network of nnU-Net sees an image: its nonzero box, resampled by nnU-Net's rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from volumen.checkpoints.nnunet_plan import ResamplingRule
from volumen.data.space.resampling import Box, Resampling, interpolate, nearest

ANISOTROPY_LIMIT = 3.0
"""Ratio of voxel sizes above which an axis is resampled by itself (nnU-Net's ANISO_THRESHOLD)."""
HALO = 24
"""Voxels beyond a region from which the coefficients of a cubic spline are computed; the rest adds less than 1e-13."""
_PAD = 12
"""Repeated voxels beyond the box, as in `scipy.ndimage.zoom`, which nnU-Net's resampling calls."""


@dataclass(frozen=True)
class PlannedGrid(Resampling):
    """The map between an image's voxels and those of nnU-Net's resampled nonzero box.

    Voxel `q` of the grid has its centre at `(q + 0.5) * step - 0.5` in the box, which starts at `start`.

    Args:
        start: first voxel of the box per axis.
        box: voxels of the box per axis.
        sizes: voxels of the grid per axis.
        nearest_in: axis along which the image takes the nearest slice; None: all axes are interpolated.
        nearest_out: axis along which the network's outputs take the nearest slice, back on the image's voxels.
    """

    start: tuple[int, ...] = ()
    box: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    nearest_in: int | None = None
    nearest_out: int | None = None

    @classmethod
    def planned(
        cls,
        shape: Sequence[int],
        crop: Box,
        spacing: Sequence[float],
        target: Sequence[float],
        data: ResamplingRule,
        logits: ResamplingRule,
    ) -> PlannedGrid:
        """Return the grid of an image.

        Args:
            shape: voxels of the image per axis.
            crop: start and stop of the nonzero box per axis.
            spacing: voxel size of the image per axis.
            target: voxel size of the grid per axis.
            data, logits: rules for the image, and for the way back.
        """
        box = tuple(stop - start for start, stop in crop)
        sizes = tuple(
            max(1, round(own / new * count)) for own, new, count in zip(spacing, target, box, strict=True)
        )
        return cls(
            tuple(shape),
            tuple(count / size for count, size in zip(box, sizes, strict=True)),
            tuple(start for start, _ in crop),
            box,
            sizes,
            separate_axis(data.separate, spacing, target),
            separate_axis(logits.separate, target, spacing),
        )

    @property
    def is_identity(self) -> bool:
        return self.sizes == self.box == self.shape

    @property
    def is_resampled(self) -> bool:
        """Whether the voxels of the grid differ from those of the image."""
        return self.sizes != self.box

    @property
    def resampled_shape(self) -> tuple[int, ...]:
        return self.sizes

    def stored_positions(self, axis: int, start: int, stop: int) -> np.ndarray:
        scale = self.box[axis] / self.sizes[axis]
        return self.start[axis] + (scale * (np.arange(start, stop) + 0.5) - 0.5)

    def resampled_positions(self, axis: int, start: int, stop: int) -> np.ndarray:
        scale = self.sizes[axis] / self.box[axis]
        return scale * (np.arange(start, stop) - self.start[axis] + 0.5) - 0.5

    def offset(self) -> np.ndarray:
        return np.asarray(self.start) + (np.asarray(self.step) - 1) / 2

    def stored_box(self, box: Sequence[Sequence[int]]) -> Box:
        inner = Resampling(self.box, self.step)
        return tuple(
            (start + low, start + high)
            for start, (low, high) in zip(self.start, inner.stored_box(box), strict=True)
        )

    def on_stored(
        self, values: np.ndarray, positions: Sequence[np.ndarray], first: Sequence[int]
    ) -> np.ndarray:
        axis = self.nearest_out
        if axis is None or not self.is_resampled:
            return super().on_stored(values, positions, first)
        places = [
            positions[n] if n == axis else first[n] + np.arange(size)
            for n, size in enumerate(values.shape[1:])
        ]
        values = nearest(values, places, first)
        rest = tuple(n for n in self.order[::-1] if n != axis)
        return interpolate(values, positions, first, rest)

    def outside(self, region: Sequence[slice]) -> np.ndarray | None:
        inside = np.ones(tuple(part.stop - part.start for part in region), bool)
        for axis, (part, start, count) in enumerate(zip(region, self.start, self.box, strict=True)):
            place = np.arange(part.start, part.stop)
            within = (place >= start) & (place < start + count)
            inside &= within.reshape([-1 if n == axis else 1 for n in range(inside.ndim)])
        return None if inside.all() else ~inside


def separate_axis(separate: bool | None, current: Sequence[float], new: Sequence[float]) -> int | None:
    """Return the axis that nnU-Net resamples by itself, or None (`determine_do_sep_z_and_axis`).

    Args:
        separate: as planned; None: if the voxels before or after have an axis that is much coarser than the others.
        current, new: voxel size per axis before and after.
    """
    if separate is False:
        return None
    size = current
    if separate is None:
        coarse = [s for s in (current, new) if max(s) / min(s) > ANISOTROPY_LIMIT]
        if not coarse:
            return None
        size = coarse[0]
    coarsest = [axis for axis, value in enumerate(size) if value == max(size)]
    return coarsest[0] if len(coarsest) == 1 else None


def spline(values: np.ndarray, axis: int, positions: np.ndarray, first: int, size: int) -> np.ndarray:
    """Return values at positions of an axis by cubic spline interpolation, as `scipy.ndimage.zoom(order=3)` does.

    Args:
        values: float64 (C, *space); along the axis a part of it, from `HALO` voxels before the positions to as many
            after them, or to the ends of the axis.
        axis: spatial axis.
        positions: places along the axis, in voxels of it.
        first: voxel of the axis that is the first in `values`.
        size: voxels of the axis; beyond its ends its last values repeat.
    """
    place, count = axis + 1, values.shape[axis + 1]
    before, after = _PAD if first == 0 else 0, _PAD if first + count == size else 0
    widths = [(before, after) if n == place else (0, 0) for n in range(values.ndim)]
    coefficients = ndimage.spline_filter1d(np.pad(values, widths, mode="edge"), 3, place, mode="nearest")
    below = np.floor(positions)
    t = positions - below
    index = below.astype(np.int64) - first + before
    weights = ((1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2, t**3 / 6)
    shape = [1] * values.ndim
    shape[place] = -1
    last = coefficients.shape[place] - 1
    result = np.zeros(1)
    for step, weight in zip((-1, 0, 1, 2), weights, strict=True):
        taken = coefficients.take(np.clip(index + step, 0, last), axis=place)
        taken *= weight.reshape(shape)
        result = taken if step == -1 else np.add(result, taken, out=result)
    return result


def halo_span(positions: np.ndarray, size: int, order: int) -> tuple[int, int]:
    """Return the voxels (start, stop) of an axis that interpolation at positions takes from.

    Args:
        positions: in voxels of the axis.
        size: voxels of the axis.
        order: 0 nearest, 1 linear, 3 cubic.
    """
    if order == 0:
        low, high = math.floor(positions[0] + 0.5), math.floor(positions[-1] + 0.5) + 1
    else:
        beyond = HALO if order == 3 else 0
        low, high = math.floor(positions[0]) - beyond, math.floor(positions[-1]) + 2 + beyond
    low = min(max(low, 0), size - 1)
    return low, max(low + 1, min(high, size))
