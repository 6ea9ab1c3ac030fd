"""Calibration, precision and recall of probabilities, from histograms that add up over the parts of a volume."""

from __future__ import annotations

import math

import numpy as np

BINS = 3825
"""Bins from 0 to 1 that probabilities are counted in: a multiple of 255 and of 15, so that stored bytes fall into
bins of their own."""
RELIABILITY_BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def probability_counts(
    probability: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None
) -> np.ndarray:
    """Count voxels by their probability.

    Args:
        probability: float, any shape, 0 to 1.
        truth: bool, same shape.
        known: bool, same shape; voxels outside it are not counted. None: all are counted.

    Returns:
        float64 (3, BINS): voxels, voxels of the class, and the sum of the probabilities in each bin. They add up.
    """
    counted = np.ones(truth.shape, bool) if known is None else known
    values, positive = probability[counted].astype(np.float64), truth[counted]
    bins = np.clip((values * BINS).astype(np.int64), 0, BINS - 1)
    return np.stack(
        [
            np.bincount(bins, minlength=BINS),
            np.bincount(bins[positive], minlength=BINS),
            np.bincount(bins, weights=values, minlength=BINS),
        ]
    ).astype(np.float64)


def reliability(counts: np.ndarray) -> np.ndarray:
    """Return the reliability curve, float64 (n, 3): mean probability, share of the class and voxels of a bin.

    Bins without a voxel are left out.

    Args:
        counts: as of `probability_counts`.
    """
    voxels, positive, total = counts.reshape(3, RELIABILITY_BINS, -1).sum(axis=2)
    used = voxels > 0
    return np.column_stack([total[used] / voxels[used], positive[used] / voxels[used], voxels[used]])


def expected_calibration_error(counts: np.ndarray) -> float:
    """Return the mean over voxels of |mean probability - share of the class| of their bin; NaN without voxels.

    Guo et al. 2017, with 15 bins of equal width, for the probability of the class: 0 is perfect, 1 the worst.
    """
    curve = reliability(counts)
    if not len(curve):
        return math.nan
    return float((np.abs(curve[:, 0] - curve[:, 1]) * curve[:, 2]).sum() / curve[:, 2].sum())


def precision_recall(counts: np.ndarray) -> np.ndarray:
    """Return the precision-recall curve, float64 (n, 3): threshold, precision, recall, highest threshold first.

    A voxel is of the class from the threshold on. Thresholds are lower ends of bins that hold voxels; without a voxel
    of the class there is no curve.
    """
    positives = counts[1].sum()
    if not positives:
        return np.zeros((0, 3))
    used = np.flatnonzero(counts[0])[::-1]
    predicted, hits = np.cumsum(counts[0][used]), np.cumsum(counts[1][used])
    return np.column_stack([used / BINS, hits / predicted, hits / positives])


def average_precision(counts: np.ndarray) -> float:
    """Return the sum over thresholds of precision times gain of recall; NaN without a voxel of the class.

    As scikit-learn's average_precision_score, of probabilities rounded down to 1 / BINS: 1 is perfect.
    """
    curve = precision_recall(counts)
    if not len(curve):
        return math.nan
    return float((np.diff(curve[:, 2], prepend=0.0) * curve[:, 1]).sum())


def best_threshold(counts: np.ndarray) -> float:
    """Return the threshold with the largest Dice, the lowest of equal ones; NaN without a voxel of the class."""
    curve = precision_recall(counts)
    if not len(curve):
        return math.nan
    precision, recall = curve[:, 1], curve[:, 2]
    total = precision + recall
    dice = np.divide(2 * precision * recall, total, out=np.zeros(len(curve)), where=total > 0)
    return float(curve[len(curve) - 1 - int(dice[::-1].argmax()), 0])
