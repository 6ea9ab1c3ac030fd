"""Errors of directions and of values."""

from __future__ import annotations

import math

import numpy as np


def angles(pred: np.ndarray, truth: np.ndarray, *, signed: bool = True) -> np.ndarray:
    """Return the angle between two fields of directions, in degrees.

    Args:
        pred: (d, *spatial), any length; one of length 0 points nowhere and counts as 90 degrees off.
        truth: (d, *spatial).
        signed: False: a direction and its opposite are the same, and the angle is 90 at most.

    Returns:
        float64 (*spatial), 0 to 180.
    """
    a, b = pred.astype(np.float64), truth.astype(np.float64)
    along = sum(a[i] * b[i] for i in range(len(a)))
    # The sine from the cross product: arccos of a cosine near 1 would lose half the digits.
    across = np.sqrt(sum((a[i] * b[j] - a[j] * b[i]) ** 2 for i in range(len(a)) for j in range(i)))
    nowhere = (across == 0) & (along == 0)
    degrees = np.degrees(np.arctan2(across, along if signed else np.abs(along)))
    degrees[nowhere] = 90.0
    return degrees


def angle_sums(pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None, *, signed: bool) -> np.ndarray:
    """Return float64 (2,): sum of the angles in degrees over known voxels, and their count. They add up.

    Args:
        pred: (C, *spatial), C a multiple of the dimension: one direction after another.
        truth: (C, *spatial).
        known: bool (*spatial) or None.
        signed: see `angles`.
    """
    size = pred.ndim - 1
    if pred.shape[0] % size:
        raise ValueError(f"a direction in {size}D needs a multiple of {size} channels, got {pred.shape[0]}")
    known = np.ones(pred.shape[1:], dtype=bool) if known is None else known
    total = np.zeros(2)
    for first in range(0, pred.shape[0], size):
        part = slice(first, first + size)
        found = angles(pred[part][:, known], truth[part][:, known], signed=signed)
        total += [found.sum(), found.size]
    return total


def absolute_sums(pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return float64 (2,): sum of |pred - truth| over known voxels and channels, and their count. They add up.

    Args:
        pred: (C, *spatial).
        truth: (C, *spatial).
        known: bool (*spatial) or None.
    """
    known = np.ones(pred.shape[1:], dtype=bool) if known is None else known
    error = np.abs(pred[:, known].astype(np.float64) - truth[:, known])
    return np.array([error.sum(), error.size], dtype=np.float64)


def mean(sums: np.ndarray) -> float:
    """Return sum / count; NaN where nothing was counted."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan
