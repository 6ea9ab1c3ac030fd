"""Scores of labels, streamed: the same for blocks of any size and order, and those of independent references."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volumen.metrics.grid import three_axes
from volumen.metrics.label_scores import LabelScores, LabelSettings, score_masks
from volumen.metrics.score_names import LABELS, names_of

NAMES = tuple(
    name.replace("@64", "@12").replace("@2", "@14") for name in names_of(LABELS, default=False, pieces=False)
)


def smooth(seed, shape, sigma=1.5):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return noise > np.quantile(noise, 0.6)


def volumes(seed, shape, emptied=True):
    """Return prediction, truth and known voxels; one side of the prediction is far from the truth."""
    pred, truth = smooth(seed, shape), smooth(seed + 100, shape)
    if emptied:
        truth[..., shape[-1] // 3 :] = False
    pred[..., shape[-1] // 2 : shape[-1] - 3] = False
    known = smooth(seed + 200, shape) | smooth(seed + 300, shape)
    return pred, truth, known


def streamed(arrays, config, side, parts=1, seed=0):
    """Return the scores from blocks in a random order, shared between accumulators that are sent and merged."""
    three = [three_axes(x) for x in arrays]

    def read(region):
        return tuple(x[region] for x in three)

    tallies = [LabelScores(arrays[0].shape, config, side) for _ in range(parts)]
    rng = np.random.default_rng(seed)
    for number in rng.permutation(len(tallies[0].grid)):
        tallies[rng.integers(parts)].add(int(number), read)
    whole = tallies[0]
    for other in tallies[1:]:
        whole.merge(pickle.loads(pickle.dumps(other)))
    return whole.result(read)


@settings(max_examples=12, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 13), st.integers(2, 17), st.integers(6, 34)),
        st.tuples(st.integers(3, 24), st.integers(6, 40)),
    ),
    side=st.integers(3, 20),
    parts=st.integers(1, 3),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (40.0, 4.0, 4.0), (0.3, 0.1, 0.2)]),
    connectivity=st.sampled_from(["26/6", "6/26"]),
    border=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_of_any_size_and_order_score_as_the_whole(
    shape, side, parts, spacing, connectivity, border, seed
):
    arrays = volumes(seed, shape)
    config = LabelSettings(NAMES, spacing[3 - len(shape) :], 1.5, connectivity, border=border)
    expected = score_masks(*arrays, config)
    found, _ = streamed(arrays, config, side, parts, seed)
    assert found.keys() == expected.keys() == set(NAMES)
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name


def test_blocks_scored_by_dask_workers_score_as_the_whole():
    dask = pytest.importorskip("dask")
    arrays = volumes(3, (16, 20, 24))
    config = LabelSettings(NAMES, (2.0, 1.0, 1.0), 1.5)
    grid = LabelScores(arrays[0].shape, config, 9).grid

    @dask.delayed(pure=False)
    def one(number):
        tally = LabelScores(arrays[0].shape, config, 9)
        tally.add(number, lambda region: tuple(x[region] for x in arrays))
        return tally

    tallies = dask.compute(*[one(number) for number in grid], scheduler="threads", num_workers=2)
    whole = LabelScores(arrays[0].shape, config, 9)
    for tally in tallies:
        whole.merge(tally)
    found, _ = whole.result(lambda region: tuple(x[region] for x in arrays))
    assert found == pytest.approx(score_masks(*arrays, config), abs=1e-9, nan_ok=True)


def phantom():
    """Return a truth of two plates, a sphere and a shell, and a prediction with one error of each kind."""
    truth = np.zeros((48, 56, 60), bool)
    truth[6:9, 4:52, 4:40] = truth[16:19, 4:52, 4:40] = True
    z, y, x = np.ogrid[:48, :56, :60]
    truth |= (z - 34) ** 2 + (y - 14) ** 2 + (x - 14) ** 2 <= 49
    truth |= (z - 34) ** 2 + (y - 40) ** 2 + (x - 14) ** 2 <= 49
    pred = truth.copy()
    pred[9:16, 20:23, 20:23] = True  # a bridge between the plates
    pred[16:19, 40:44, 30:34] = False  # a hole through the second plate
    pred[32:36, 12:16, 12:16] = False  # a cavity in the first sphere
    pred[24:, 39:42, :30] = False  # the second sphere falls apart
    pred[2:5, 50:54, 50:54] = True  # an object of its own
    truth[40:44, 50:54, 50:54] = True  # an object that is missed
    return pred, truth


@pytest.mark.parametrize("side", [11, 64])
def test_a_bridge_a_hole_and_a_cavity_are_found_counted_and_located(side):
    pred, truth = phantom()
    config = LabelSettings(NAMES, (1.0, 1.0, 1.0), 1.0)
    values, details = streamed((pred, truth, np.ones_like(pred)), config, side)
    assert (details.truth.b0, details.truth.b1, details.truth.b2) == (5, 0, 0)
    # Bridge -1, broken sphere +1, added +1, missed -1; the hole; the cavity.
    assert (details.pred.b0, details.pred.b1, details.pred.b2) == (5, 1, 1)
    assert [values[f"b{k}_error"] for k in range(3)] == [0, 1, 1]
    names = ("true", "predicted", "broken", "merged", "missed", "added")
    assert [values[f"objects_{name}"] for name in names] == [5, 5, 1, 1, 1, 1]
    assert details.pred.cavity_boxes.tolist() == [[64, 32, 12, 12, 36, 16, 16]]
    merged, broken, missed, added = details.errors.worst(1)
    assert (merged.error, merged.low, merged.high) == ("merged", (6, 4, 4), (19, 52, 40))
    assert len(merged.parts) == 2
    assert (broken.error, broken.low, broken.high) == ("broken", (27, 33, 7), (42, 48, 22))
    assert (missed.error, missed.low) == ("missed", (40, 50, 50))
    assert (added.error, added.low, added.high, added.voxels) == ("added", (2, 50, 50), (5, 54, 54), 48)
    # In each window of 12 voxels the hole is seen where it lies.
    rows = details.worst_windows(12, 20)
    assert any((row[:3] == (12, 36, 24)).all() and row[4] - row[7] == 1 for row in rows)


def test_one_stray_voxel_far_away_does_not_move_the_hausdorff_percentile():
    truth = np.zeros((12, 60, 300), bool)
    truth[3:9, 10:50, 5:60] = True
    pred = truth.copy()
    pred[6, 30, 295] = True
    config = LabelSettings(("hd95", "mean_distance_to_truth", "surface_dice"), (1.0, 1.0, 1.0), 1.0)
    for side in (12, 50, 300):
        values, _ = streamed((pred, truth, np.ones_like(pred)), config, side)
        assert values["hd95"] == 0
        count = np.count_nonzero(truth & ~ndimage.binary_erosion(truth)) + 1
        assert values["mean_distance_to_truth"] == pytest.approx(236 / count, rel=1e-12)


def test_the_border_is_a_surface_by_request_as_monai_takes_it():
    torch = pytest.importorskip("torch")
    from monai.metrics import HausdorffDistanceMetric, SurfaceDistanceMetric

    pred, truth = smooth(1, (18, 20, 22)), smooth(2, (18, 20, 22))
    spacing = (3.0, 1.0, 0.5)
    names = ("hd95", "mean_surface_distance", "surface_dice@1")
    found = score_masks(pred, truth, None, LabelSettings(names, spacing, 1.0, border=True))
    tensors = [torch.from_numpy(x)[None, None].float() for x in (pred, truth)]
    for metric, name in (
        (HausdorffDistanceMetric(include_background=True, percentile=95), "hd95"),
        (SurfaceDistanceMetric(include_background=True, symmetric=True), "mean_surface_distance"),
    ):
        metric(*tensors, spacing=spacing)
        assert found[name] == pytest.approx(metric.aggregate().item(), rel=1e-5), name
    inner = score_masks(pred, truth, None, LabelSettings(names, spacing, 1.0))
    assert inner["mean_surface_distance"] != pytest.approx(found["mean_surface_distance"])


def test_unknown_voxels_change_nothing():
    pred, truth, known = volumes(5, (14, 18, 22), emptied=False)
    config = LabelSettings(NAMES, (1.0, 1.0, 1.0), 1.0)
    expected = score_masks(pred, truth, known, config)
    other = np.random.default_rng(0).random(pred.shape) < 0.5
    changed = score_masks(np.where(known, pred, other), np.where(known, truth, ~other), known, config)
    assert changed == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("which", ["both", "pred", "truth"])
def test_what_empty_means(which):
    some = np.zeros((8, 9, 10), bool)
    some[2:5, 2:5, 2:6] = True
    empty = np.zeros_like(some)
    pred, truth = (
        (empty if which in ("both", "pred") else some),
        (empty if which in ("both", "truth") else some),
    )
    config = LabelSettings(NAMES, (1.0, 1.0, 1.0), 1.0)
    found = score_masks(pred, truth, None, config)
    diagonal = math.sqrt(64 + 81 + 100)
    expected = {
        "both": {"hd95": math.nan, "surface_dice": math.nan, "b0_error": 0, "voi_split": math.nan, "ap": math.nan,
                 "pq": math.nan, "f1@0.5": math.nan, "objects_missed": 0, "surface_challenge": 1,
                 "expected_run_length": math.nan, "b0_error@12": math.nan},
        "pred": {"hd95": diagonal, "surface_dice": 0, "b0_error": 1, "voi_split": 0, "ap": 0, "pq": 0, "f1@0.5": 0,
                 "objects_missed": 1, "objects_added": 0, "expected_run_length": 0, "adapted_rand_error": 0,
                 "precision@0.5": math.nan, "recall@0.5": 0},
        "truth": {"hd95": diagonal, "surface_dice": 0, "b0_error": 1, "voi_split": math.nan, "ap": 0, "pq": 0,
                  "objects_missed": 0, "objects_added": 1, "expected_run_length": math.nan,
                  "precision@0.5": 0, "recall@0.5": math.nan},
    }[which]  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_a_perfect_prediction_is_perfect():
    truth = smooth(0, (20, 22, 24))
    found = score_masks(truth, truth, None, LabelSettings(NAMES, (1.0, 1.0, 1.0), 1.0))
    ones = ("surface_dice", "surface_dice@1", "cldice", "precision@0.5", "recall@0.5", "f1@0.5", "ap", "pq",
            "surface_challenge")  # fmt: skip
    assert {name: found[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1))
    zeros = [name for name in NAMES if "error" in name or "distance" in name or name.startswith("voi")]
    assert len(zeros) >= 12
    assert all(found[name] == 0 for name in zeros)
