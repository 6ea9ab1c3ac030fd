"""Agreement of partitions: against pairs of voxels counted one by one, scikit-image, and cases known by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from volumen.metrics.objects.contingency import HIGH, LOW, VOXELS, add_overlaps, overlaps
from volumen.metrics.objects.partition import adapted_rand_error, voi_merge, voi_split
from volumen.metrics.target_metrics import build_metrics


def by_pairs(pred, truth):
    """Return 1 - F of the pairs of voxels that are together, counted one by one."""
    pred, truth = pred[truth > 0], truth[truth > 0]
    both = of_truth = of_pred = 0
    for i, j in itertools.combinations(range(len(truth)), 2):
        of_truth += truth[i] == truth[j]
        of_pred += pred[i] == pred[j]
        both += truth[i] == truth[j] and pred[i] == pred[j]
    return 1 - 2 * both / (of_truth + of_pred)


@pytest.mark.parametrize("seed", range(3))
def test_the_rand_error_counts_pairs(seed):
    pred, truth = np.random.default_rng(seed).integers(0, 4, (2, 6, 7))
    assert adapted_rand_error(overlaps(pred, truth)) == pytest.approx(by_pairs(pred, truth))


def test_both_measures_are_scikit_image_s():
    metrics = pytest.importorskip("skimage.metrics")
    pred, truth = np.random.default_rng(0).integers(0, 6, (2, 9, 8, 7))
    counts = overlaps(pred, truth)
    assert adapted_rand_error(counts) == pytest.approx(metrics.adapted_rand_error(truth, pred)[0])
    counted = truth > 0
    split, merge = metrics.variation_of_information(truth[counted], pred[counted])
    assert (voi_split(counts), voi_merge(counts)) == pytest.approx((split, merge))


def test_a_cut_is_a_split_and_a_glued_pair_a_merge():
    truth = np.repeat([1, 2], 8)
    halves = np.repeat([5, 6, 7, 7], 4)
    assert voi_split(overlaps(halves, truth)) == pytest.approx(0.5)
    assert voi_merge(overlaps(halves, truth)) == 0
    one = np.ones_like(truth)
    assert (voi_split(overlaps(one, truth)), voi_merge(overlaps(one, truth))) == (0, 1)
    same = overlaps(truth + 10, truth)
    assert (adapted_rand_error(same), voi_split(same), voi_merge(same)) == (0, 0, 0)


def test_parts_add_up_and_no_instance_is_undefined():
    generator = np.random.default_rng(0)
    pred, truth = generator.integers(0, 9, (2, 8, 6, 5))
    known = generator.random((8, 6, 5)) < 0.7
    parts = []
    for i in range(0, 8, 3):
        box = slice(i, i + 3)
        parts.append(overlaps(pred[box], truth[box], known[box], start=(i, 0, 0)))
    np.testing.assert_array_equal(add_overlaps(parts), overlaps(pred, truth, known))
    nothing = overlaps(pred, np.zeros_like(truth))
    assert all(math.isnan(measure(nothing)) for measure in (adapted_rand_error, voi_split, voi_merge))


def test_without_any_pair_of_voxels_nothing_is_wrong():
    assert adapted_rand_error(overlaps(np.array([4, 5, 6]), np.array([1, 2, 0]))) == 0


def test_instances_are_metrics_of_a_target_and_merge_across_processes():
    generator = np.random.default_rng(1)
    pred, truth = generator.integers(0, 9, (2, 1, 1, 8, 6)).astype(np.uint32)
    targets = {"cells": {"kind": "instances", "out_channels": 1}}
    whole, first, second = (build_metrics(targets) for _ in range(3))
    whole.update({"cells": pred}, {"cells": truth}, cases=["a"])
    first.update({"cells": pred[:, :, :5]}, {"cells": truth[:, :, :5]}, cases=["a"])
    second.update({"cells": pred[:, :, 5:]}, {"cells": truth[:, :, 5:]}, cases=["a"])
    first.merge(second.state())
    assert first.compute() == pytest.approx(whole.compute())
    assert {"cells/adapted_rand_error", "cells/voi_split", "cells/voi_merge", "cells/pq"} <= set(
        whole.compute()
    )


def test_overlaps_are_counted_and_located():
    generator = np.random.default_rng(2)
    pred, truth = generator.integers(0, 4, (2, 5, 6, 7))
    known = generator.random(pred.shape) < 0.8
    rows = {tuple(row[:2]): row for row in overlaps(pred, truth, known, start=(10, 0, 3))}
    assert (0, 0) not in rows
    for (t, p), row in rows.items():
        where = np.argwhere((truth == t) & (pred == p) & known) + np.array([10, 0, 3])
        assert row[VOXELS] == len(where)
        assert row[LOW].tolist() == where.min(axis=0).tolist()
        assert row[HIGH].tolist() == (where.max(axis=0) + 1).tolist()
    assert sum(row[VOXELS] for row in rows.values()) == np.count_nonzero(known & ((pred > 0) | (truth > 0)))


@pytest.mark.parametrize("first", [2**53, 2**62, 2**63 + 5])
def test_numbers_beyond_floating_point_stay_different(first):
    generator = np.random.default_rng(0)
    pred, truth = generator.integers(0, 9, (2, 6, 7, 8))
    expected = overlaps(pred, truth)
    moved = [np.where(x > 0, x.astype(np.uint64) + np.uint64(first), np.uint64(0)) for x in (pred, truth)]
    found = overlaps(*moved)
    for score in (adapted_rand_error, voi_split, voi_merge):
        assert score(found) == pytest.approx(score(expected), abs=1e-12)
    targets = {"cells": {"kind": "instances", "out_channels": 1}}
    metrics, other = build_metrics(targets), build_metrics(targets)
    metrics.update({"cells": moved[0][None, None]}, {"cells": moved[1][None, None]}, cases=["a"])
    other.merge(metrics.state())
    assert other.compute() == metrics.compute()
    assert metrics.compute()["cells/adapted_rand_error"] == pytest.approx(adapted_rand_error(expected))
