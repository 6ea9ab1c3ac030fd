"""Precision, recall, F1, average precision and panoptic quality of objects that are matched one to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.metrics.objects.contingency import PRED, TRUTH, VOXELS, objects_of

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""Thresholds of the intersection over union over which the average precision is a mean: 0.5 to 0.95."""


@dataclass(frozen=True)
class ObjectMatching:
    """Overlaps of true with predicted objects as ratios, from which matches follow at any threshold.

    Args:
        true: true objects.
        predicted: predicted objects.
        pairs: int64 (n, 2), place of the true and of the predicted object of each pair that overlaps.
        iou: float64 (n,), intersection over union of each pair.
    """

    true: int
    predicted: int
    pairs: np.ndarray
    iou: np.ndarray

    def matched(self, threshold: float) -> np.ndarray:
        """Return the intersection over union of matched pairs, each of at least `threshold`.

        The matches are an optimal assignment: as many as there can be and, of those, the ones with the largest sum.
        """
        allowed = np.flatnonzero(self.iou >= threshold)
        pairs, iou = self.pairs[allowed], self.iou[allowed]
        single = np.ones(len(iou), bool)
        for column in (0, 1):
            _, group, times = np.unique(pairs[:, column], return_inverse=True, return_counts=True)
            single &= times[group.reshape(-1)] == 1
        # A pair without a rival is a match: above 0.5 there are no others.
        rivals = _assigned(pairs[~single], iou[~single])
        return np.concatenate([iou[single], rivals])

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """Return true positives, false positives and false negatives at a threshold."""
        hits = len(self.matched(threshold))
        return hits, self.predicted - hits, self.true - hits

    def precision(self, threshold: float) -> float:
        """Return TP / (TP + FP); NaN without a predicted object."""
        return self.counts(threshold)[0] / self.predicted if self.predicted else math.nan

    def recall(self, threshold: float) -> float:
        """Return TP / (TP + FN); NaN without a true object."""
        return self.counts(threshold)[0] / self.true if self.true else math.nan

    def f1(self, threshold: float) -> float:
        """Return 2 TP / (2 TP + FP + FN); NaN without any object."""
        total = self.true + self.predicted
        return 2 * self.counts(threshold)[0] / total if total else math.nan

    def ap(self, threshold: float) -> float:
        """Return TP / (TP + FP + FN) at a threshold, as in the Data Science Bowl 2018; NaN without any object.

        Objects without a confidence have no precision-recall curve; this ratio is what the field calls AP for them.
        """
        hits, false, missed = self.counts(threshold)
        total = hits + false + missed
        return hits / total if total else math.nan

    def mean_ap(self, thresholds: Sequence[float] = THRESHOLDS) -> float:
        """Return the mean of `ap` over thresholds; NaN without any object."""
        return float(np.mean([self.ap(threshold) for threshold in thresholds]))

    def panoptic_quality(self) -> float:
        """Return the sum of the IoU of matches / (TP + FP / 2 + FN / 2), matches above 0.5; NaN without any object.

        Kirillov et al. 2019.
        """
        total = self.true + self.predicted
        matched = self.iou[self.iou > 0.5]
        return float(2 * matched.sum() / total) if total else math.nan


def match_objects(table: np.ndarray) -> ObjectMatching:
    """Return the overlaps of objects as ratios.

    Args:
        table: as of `overlaps`.
    """
    true, true_voxels, _ = objects_of(table, TRUTH)
    found, found_voxels, _ = objects_of(table, PRED)
    both = table[(table[:, TRUTH] != 0) & (table[:, PRED] != 0)]
    pairs = np.stack([np.searchsorted(true, both[:, TRUTH]), np.searchsorted(found, both[:, PRED])], axis=1)
    shared = both[:, VOXELS]
    union = true_voxels[pairs[:, 0]] + found_voxels[pairs[:, 1]] - shared
    return ObjectMatching(len(true), len(found), pairs, shared / union)


def _assigned(pairs: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """Return the ratios of an optimal assignment between objects that have several candidates."""
    if not len(pairs):
        return np.zeros(0)
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, left = np.unique(pairs[:, 0], return_inverse=True)
    _, right = np.unique(pairs[:, 1], return_inverse=True)
    left, right = left.reshape(-1), right.reshape(-1)
    size = int(left.max()) + int(right.max()) + 2
    graph = coo_array((np.ones(len(pairs)), (left, right + left.max() + 1)), shape=(size, size))
    group = connected_components(graph, directed=False)[1][left]
    found = []
    # Each group of rivals by itself, so that the cost matrices stay small.
    order = np.argsort(group, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        _, a = np.unique(left[rows], return_inverse=True)
        _, b = np.unique(right[rows], return_inverse=True)
        # A match is worth more than any sum of ratios, so as many pairs as possible are matched.
        gain = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
        gain[a.reshape(-1), b.reshape(-1)] = iou[rows] + len(rows) + 1
        taken = gain[linear_sum_assignment(gain, maximize=True)]
        found.append(taken[taken > 0] - len(rows) - 1)
    return np.concatenate(found)
