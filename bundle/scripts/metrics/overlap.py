"""Overlap of two binary masks."""

from __future__ import annotations

import math

import numpy as np


def overlap_counts(pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Count true positives, false positives and false negatives.

    Args:
        pred: bool, any shape.
        truth: bool, same shape.
        known: bool, same shape; voxels outside it are not counted. None: all.

    Returns:
        float64 (3,): TP, FP, FN. Counts of parts of a volume add up to those of the whole.
    """
    if known is not None:
        pred, truth = pred & known, truth & known
    both = np.count_nonzero(pred & truth)
    return np.array([both, np.count_nonzero(pred) - both, np.count_nonzero(truth) - both], dtype=np.float64)


def dice(counts: np.ndarray) -> float:
    """Return 2 TP / (2 TP + FP + FN); NaN where truth and prediction are both empty: nothing was asked."""
    tp, fp, fn = counts
    return float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else math.nan


def iou(counts: np.ndarray) -> float:
    """Return TP / (TP + FP + FN), the Jaccard index; NaN where truth and prediction are both empty."""
    tp, fp, fn = counts
    return float(tp / (tp + fp + fn)) if tp + fp + fn else math.nan
