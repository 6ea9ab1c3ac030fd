"""Computes the weights of the separable filters: one row per output position, adapted at the ends of a line.

The compiled filters and those on a training device both use them, so both do the same at borders.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Border = Callable[[np.ndarray, np.ndarray], np.ndarray]


def gaussian(sigma: float, radius: int) -> np.ndarray:
    """Return the Gaussian of `sigma` voxels, cut at `radius` and of sum 1: float64 (2 radius + 1,)."""
    if radius == 0:
        return np.ones(1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def border_weights(kernel: np.ndarray, length: int, part: slice, border: Border) -> np.ndarray:
    """Return one row of weights per position of `part`: the kernel inside the line, adapted at its ends by `border`.

    Args:
        kernel: (2 r + 1,).
        length: of the line.
        part: output positions, with start and stop.
        border: `keep`, `scale_to_one` or `fit_line`.

    Returns:
        float32 (outputs, 2 r + 1), 0 beyond the ends of the line.
    """
    radius = len(kernel) // 2
    steps = np.arange(-radius, radius + 1)
    positions = np.arange(part.start, part.stop)[:, None] + steps[None]
    weights = np.where((positions >= 0) & (positions < length), kernel[None], 0.0)
    return border(weights, steps).astype(np.float32)


def keep(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the weights unchanged: beyond the end the field counts as 0."""
    return weights


def scale_to_one(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Scale every row to sum 1: a weighted mean over the existing positions."""
    return weights / weights.sum(axis=1, keepdims=True)


def fit_line(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Turn every row into the value at 0 of the line of best fit, see `filter_kernels.regress_lines`."""
    total, first, second = ((weights * steps**power).sum(axis=1, keepdims=True) for power in range(3))
    spread = total * second - first**2
    fitted = weights * (second - first * steps) / np.where(spread > 1e-6, spread, 1)
    return np.where(spread > 1e-6, fitted, weights / total)
