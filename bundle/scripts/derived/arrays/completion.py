"""Continues partly known labels into unknown voxels, so that fields can be estimated near them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.derived.distance_window import Region, three_axes
from volumen.derived.extents import resolve_reach
from volumen.derived.kernels import completion as kernels


def continue_surfaces(
    foreground: np.ndarray,
    known: np.ndarray,
    distance: np.ndarray,
    region: Region,
    *,
    spacing: Sequence[float],
    reach: float | None = None,
) -> np.ndarray:
    """Return the foreground, with every surface continued straight on into unknown voxels.

    An unknown voxel p gets the sign of the linear continuation from its nearest known voxel f,

        d(f) + sum_i s_i(f) (p - f)_i,

    d the signed distance to the nearest voxel known to be of the other class, and s_i its slope along axis i, the mean
    of the differences to the one or two neighbours that are known; 0 without one. A plane surface is continued as the
    same plane. Interpolating between slices by signed distances: Raya and Udupa ("Shape-based Interpolation of
    Multidimensional Objects", 1990); here each side continues its own surface.

    Args:
        foreground: bool, 2 or 3 axes.
        known: bool, same shape: where the label is known.
        distance: float32 (*region), d, in the unit of the spacing.
        region: the part with d; beyond it an unknown voxel has the class of its nearest known voxel.
        spacing: voxel size per axis.
        reach: unknown voxels that are farther from every known one become background.

    Returns:
        bool, same shape; known voxels are unchanged.
    """
    shape = three_axes(foreground.shape)
    part = three_axes(distance.shape)
    starts = np.array([0] * (3 - foreground.ndim) + [piece.start for piece in region])
    sure = np.ascontiguousarray(known).reshape(shape)
    found = kernels.continue_surfaces(
        np.ascontiguousarray(foreground).reshape(shape),
        sure,
        np.ascontiguousarray(distance).reshape(part),
        starts,
        *_nearest_known(sure, spacing, reach),
    )
    return found.reshape(foreground.shape)


def continue_numbers(
    numbers: np.ndarray, known: np.ndarray, *, spacing: Sequence[float], reach: float | None = None
) -> np.ndarray:
    """Return labels whose unknown voxels have the number of the nearest known voxel, or 0 if it is beyond `reach`.

    Args:
        numbers: integer (C, *spatial), 2 or 3 spatial axes.
        known: bool (*spatial).
        spacing: voxel size per axis.
        reach: largest distance, in the unit of the spacing.
    """
    shape = three_axes(known.shape)
    nearest = _nearest_known(np.ascontiguousarray(known).reshape(shape), spacing, reach)
    channels = [
        kernels.continue_numbers(np.ascontiguousarray(one).reshape(shape), *nearest).reshape(known.shape)
        for one in numbers
    ]
    return np.stack(channels)


def step_costs(spacing: Sequence[float], reach: float | None) -> list[np.ndarray]:
    """Return per axis the squared distance of 0, 1, ... steps between voxel centres, up to the reach."""
    cut = resolve_reach(reach, spacing)
    return [(np.arange(int(cut / size) + 1) * size).astype(np.float32) ** 2 for size in spacing]


def _nearest_known(
    known: np.ndarray, spacing: Sequence[float], reach: float | None
) -> tuple[np.ndarray, ...]:
    """Return squared distance and steps (z, y, x) to the nearest known voxel of (Z, Y, X)."""
    costs = [np.zeros(1, np.float32)] * (3 - len(spacing)) + step_costs(spacing, reach)
    steps = [np.empty(known.shape, np.int16) for _ in range(3)]
    squared, other = np.empty(known.shape, np.float32), np.empty(known.shape, np.float32)
    kernels.known_in_row(known, costs[2], squared, steps[2])
    kernels.known_across(squared, costs[1], 1, other, steps[1])
    kernels.known_across(other, costs[0], 0, squared, steps[0])
    return squared, *steps
