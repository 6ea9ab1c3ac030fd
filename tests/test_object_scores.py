"""Matched objects, wrong objects, run lengths and probabilities against brute force and cases known by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.objects.errors import object_errors
from volumen.metrics.objects.matching import THRESHOLDS, match_objects
from volumen.metrics.objects.run_length import expected_run_length
from volumen.metrics.objects.scores import object_score
from volumen.metrics.probabilities import (
    BINS,
    average_precision,
    best_threshold,
    expected_calibration_error,
    precision_recall,
    probability_counts,
    reliability,
)


def ratios(pred, truth):
    """Return the intersection over union of every true with every predicted object, one by one."""
    true, found = np.unique(truth[truth > 0]), np.unique(pred[pred > 0])
    return np.array(
        [
            [((truth == t) & (pred == p)).sum() / ((truth == t) | (pred == p)).sum() for p in found]
            for t in true
        ]
    ).reshape(len(true), len(found))


def most_matches(iou, threshold):
    """Return the largest number of pairs that can be matched, by trying all assignments."""
    small = iou if iou.shape[0] <= iou.shape[1] else iou.T
    best = 0
    for columns in itertools.permutations(range(small.shape[1]), small.shape[0]):
        best = max(best, sum(small[i, j] >= threshold for i, j in enumerate(columns)))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_matches_are_the_best_of_all_assignments(seed):
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(6), 8)
    pred = np.where(rng.random(48) < 0.35, rng.integers(0, 6, 48), (truth * 5) % 6)
    iou = ratios(pred, truth)
    matching = match_objects(overlaps(pred, truth))
    for threshold in (0.5, 0.55, 0.75):
        hits = most_matches(iou, threshold)
        assert matching.counts(threshold) == (hits, iou.shape[1] - hits, iou.shape[0] - hits)
        assert matching.f1(threshold) == pytest.approx(2 * hits / sum(iou.shape))
        assert matching.ap(threshold) == pytest.approx(hits / (sum(iou.shape) - hits))
    expected = [most_matches(iou, t) / (sum(iou.shape) - most_matches(iou, t)) for t in THRESHOLDS]
    assert matching.mean_ap() == pytest.approx(np.mean(expected))
    over = iou[iou > 0.5]
    assert matching.panoptic_quality() == pytest.approx(2 * over.sum() / sum(iou.shape))


def test_ties_at_one_half_are_matched_once_each():
    truth = np.array([1, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    pred = np.array([5, 5, 6, 6, 7, 7, 8, 8, 8, 8])
    matching = match_objects(overlaps(pred, truth))
    assert matching.counts(0.5) == (3, 1, 0)
    assert matching.counts(0.55) == (2, 2, 1)
    # Of two with the same rival the assignment takes the pair that leaves the most matches.
    chain = match_objects(overlaps(np.array([1, 1, 2, 2]), np.array([7, 7, 8, 8])))
    assert chain.counts(0.5) == (2, 0, 0)


def test_wrong_objects_are_sorted_and_placed():
    truth = np.zeros((6, 12, 30), int)
    truth[1:3, 2:6, 2:12], truth[1:3, 2:6, 14:24] = 1, 2
    truth[4, 8:10, 2:20], truth[5, 11, 29] = 3, 4
    pred = np.zeros_like(truth)
    pred[1:3, 2:6, 2:24] = 1
    pred[4, 8:10, 2:8], pred[4, 8:10, 10:20] = 2, 3
    pred[5, 0, 0] = 9
    errors = object_errors(overlaps(pred, truth))
    assert (errors.true, errors.predicted) == (4, 4)
    merged, broken, missed, added = errors.worst(3)
    assert (merged.error, merged.number, merged.parts, merged.wrong) == ("merged", 1, (1, 2), 80)
    assert (broken.error, broken.number, broken.parts) == ("broken", 3, (3, 2))
    assert (broken.low, broken.high) == ((4, 8, 2), (5, 10, 20))
    assert (missed.error, missed.number, missed.low) == ("missed", 4, (5, 11, 29))
    assert (added.error, added.number, added.low) == ("added", 9, (5, 0, 0))
    # A touch that covers less than the share of an object is no merger.
    slight = truth.copy()
    slight[1, 2, 14:18] = 1
    assert not object_errors(overlaps(slight, truth)).merged
    assert len(object_errors(overlaps(slight, truth), share=0.04).merged) == 1


def test_run_lengths_of_given_skeletons_by_hand():
    # Two lines of 10 edges of length 2: one is cut in the middle, the other is whole.
    objects = np.repeat([1, 2], 11)
    edges = np.array([(i, i + 1) for i in range(21) if i != 10])
    lengths = np.full(20, 2.0)
    predicted = np.concatenate([np.repeat([4, 5], [5, 6]), np.full(11, 7)])
    # Runs of 4, 5 and 10 edges; the cut edge is in none.
    expected = (8**2 + 10**2 + 20**2) / 40
    assert expected_run_length(objects, edges, lengths, predicted) == pytest.approx(expected)
    # A merger of both lines counts nowhere.
    merged = np.concatenate([np.repeat([4, 7], [5, 6]), np.full(11, 7)])
    assert expected_run_length(objects, edges, lengths, merged) == pytest.approx(8**2 / 40)
    assert expected_run_length(objects, edges, lengths, predicted * 0) == 0
    assert math.isnan(expected_run_length(objects[:0], edges[:0], lengths[:0], predicted[:0]))


def probabilities(seed, size=4000):
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 256, size)
    return (stored / 255).astype(np.float32), rng.random(size) < (stored / 255) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_curves_are_those_of_sorted_probabilities(seed):
    values, truth = probabilities(seed)
    parts = [probability_counts(values[i::3], truth[i::3]) for i in range(3)]
    counts = sum(parts)
    np.testing.assert_allclose(counts, probability_counts(values, truth), atol=1e-9)
    curve = []
    for threshold in np.unique(values)[::-1]:
        hits = np.count_nonzero(truth & (values >= threshold))
        curve.append((hits / np.count_nonzero(values >= threshold), hits / truth.sum()))
    np.testing.assert_allclose(precision_recall(counts)[:, 1:], curve)
    recall = np.array(curve)[:, 1]
    expected = (np.diff(recall, prepend=0) * np.array(curve)[:, 0]).sum()
    assert average_precision(counts) == pytest.approx(expected)
    dice = [2 * np.count_nonzero(truth & (values >= t)) / (truth.sum() + (values >= t).sum()) for t in values]
    found = best_threshold(counts)
    reached = 2 * np.count_nonzero(truth & (values >= found)) / (truth.sum() + (values >= found).sum())
    assert reached == pytest.approx(max(dice))


def test_calibration_by_hand_and_by_bins():
    values, truth = probabilities(0)
    bins = np.minimum((values.astype(np.float64) * 15).astype(int), 14)
    gaps = [
        abs(values[bins == b].mean(dtype=np.float64) - truth[bins == b].mean()) * (bins == b).mean()
        for b in range(15)
    ]
    assert expected_calibration_error(probability_counts(values, truth)) == pytest.approx(sum(gaps), abs=2e-3)
    sure = probability_counts(np.array([1.0, 1.0, 0.0, 0.0]), np.array([True, True, False, False]))
    assert expected_calibration_error(sure) == 0
    assert average_precision(sure) == 1
    assert 0 < best_threshold(sure) <= 1
    half = probability_counts(np.full(4, 0.75), np.array([True, False, False, False]))
    assert expected_calibration_error(half) == pytest.approx(0.5)
    assert reliability(half).tolist() == [[0.75, 0.25, 4]]
    nothing = np.zeros((3, BINS))
    assert math.isnan(expected_calibration_error(nothing))
    assert math.isnan(average_precision(nothing))
    assert math.isnan(best_threshold(nothing))
    unknown = probability_counts(np.array([0.2, 0.9]), np.array([False, True]), np.array([False, True]))
    assert unknown[:2].sum(axis=1).tolist() == [1, 1]


def test_scores_of_objects_by_name():
    truth = np.array([1, 1, 2, 2, 0, 0])
    pred = np.array([3, 3, 4, 0, 0, 5])
    table = overlaps(pred, truth)
    assert object_score("objects_added", table) == 1
    assert object_score("f1@0.5", table) == pytest.approx(4 / 5)
    assert object_score("precision@0.75", table) == pytest.approx(1 / 3)
    assert object_score("recall@0.75", table) == pytest.approx(1 / 2)
    assert object_score("ap@0.5", table) == pytest.approx(2 / 3)
    with pytest.raises(KeyError):
        object_score("dice", table)
