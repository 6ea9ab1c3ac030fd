"""Agreement of partitions: against pairs of voxels counted one by one, scikit-image, and cases known by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from volumen.metrics.partition import adapted_rand_error, add_pairs, pair_counts, vi_merge, vi_split
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
    assert adapted_rand_error(pair_counts(pred, truth)) == pytest.approx(by_pairs(pred, truth))


def test_both_measures_are_scikit_image_s():
    metrics = pytest.importorskip("skimage.metrics")
    pred, truth = np.random.default_rng(0).integers(0, 6, (2, 9, 8, 7))
    counts = pair_counts(pred, truth)
    assert adapted_rand_error(counts) == pytest.approx(metrics.adapted_rand_error(truth, pred)[0])
    counted = truth > 0
    split, merge = metrics.variation_of_information(truth[counted], pred[counted])
    assert (vi_split(counts), vi_merge(counts)) == pytest.approx((split, merge))


def test_a_cut_is_a_split_and_a_glued_pair_a_merge():
    truth = np.repeat([1, 2], 8)
    halves = np.repeat([5, 6, 7, 7], 4)
    assert vi_split(pair_counts(halves, truth)) == pytest.approx(0.5)
    assert vi_merge(pair_counts(halves, truth)) == 0
    one = np.ones_like(truth)
    assert (vi_split(pair_counts(one, truth)), vi_merge(pair_counts(one, truth))) == (0, 1)
    same = pair_counts(truth + 10, truth)
    assert (adapted_rand_error(same), vi_split(same), vi_merge(same)) == (0, 0, 0)


def test_parts_add_up_and_no_instance_is_undefined():
    generator = np.random.default_rng(0)
    pred, truth = generator.integers(0, 9, (2, 8, 6, 5))
    known = generator.random((8, 6, 5)) < 0.7
    parts = np.zeros((0, 3))
    for i in range(0, 8, 3):
        box = slice(i, i + 3)
        parts = add_pairs(parts, pair_counts(pred[box], truth[box], known[box]))
    np.testing.assert_array_equal(parts, pair_counts(pred, truth, known))
    nothing = pair_counts(pred, np.zeros_like(truth))
    assert all(math.isnan(measure(nothing)) for measure in (adapted_rand_error, vi_split, vi_merge))


def test_without_any_pair_of_voxels_nothing_is_wrong():
    assert adapted_rand_error(pair_counts(np.array([4, 5, 6]), np.array([1, 2, 0]))) == 0


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
    assert set(whole.compute()) == {"cells/adapted_rand_error", "cells/vi_split", "cells/vi_merge"}
