"""Scores against MONAI's, SciPy's and brute force, and what is counted at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU, SurfaceDiceMetric
from scipy import ndimage

from volumen.losses.topology import soft_skeleton
from volumen.metrics.centreline import cldice, cldice_counts, skeleton
from volumen.metrics.overlap import dice, iou, overlap_counts
from volumen.metrics.regression import absolute_sums, angle_sums, angles, mean
from volumen.metrics.surface import hausdorff, surface_dice, surface_voxels
from volumen.metrics.surface_blocks import surface_distances
from volumen.metrics.target_metrics import CHEAP_METRICS, build_metrics
from volumen.utils.errors import VolumenError


def _blob(seed: int, shape=(14, 17, 15), margin: int = 2) -> np.ndarray:
    """Return a random smooth mask that stays off the border, where MONAI sees a surface and we do not."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    mask = noise > np.quantile(noise, 0.7)
    inner = np.zeros(shape, bool)
    inner[(slice(margin, -margin),) * len(shape)] = True
    return mask & inner


def _monai(metric, pred: np.ndarray, truth: np.ndarray, **kwargs) -> float:
    metric(torch.from_numpy(pred)[None, None].float(), torch.from_numpy(truth)[None, None].float(), **kwargs)
    return metric.aggregate().item()


SHAPES = pytest.mark.parametrize("shape", [(14, 17, 15), (23, 19)], ids=["3d", "2d"])


@SHAPES
@pytest.mark.parametrize("seed", range(3))
def test_overlap_is_monai_s(shape, seed):
    pred, truth = _blob(seed, shape), _blob(seed + 10, shape)
    counts = overlap_counts(pred, truth)
    assert dice(counts) == pytest.approx(_monai(DiceMetric(), pred, truth))
    assert iou(counts) == pytest.approx(_monai(MeanIoU(), pred, truth))


@SHAPES
@pytest.mark.parametrize("seed", range(3))
def test_surface_metrics_are_monai_s(shape, seed):
    pred, truth = _blob(seed, shape), _blob(seed + 10, shape)
    spacing = (2.0, 1.0, 0.5)[: len(shape)]
    distances = surface_distances(pred, truth, spacing)
    for tolerance in (0.6, 1.0, 2.5):
        expected = _monai(
            SurfaceDiceMetric([tolerance], include_background=True), pred, truth, spacing=spacing
        )
        assert surface_dice(distances, tolerance) == pytest.approx(expected, abs=1e-6)
    expected = _monai(
        HausdorffDistanceMetric(percentile=95, include_background=True), pred, truth, spacing=spacing
    )
    assert hausdorff(distances) == pytest.approx(expected, rel=1e-5)


def test_a_shifted_plane_is_its_shift_away():
    truth = np.zeros((20, 8, 8), bool)
    truth[8:] = True
    pred = np.roll(truth, 3, axis=0)
    pred[:3] = False
    distances = surface_distances(pred, truth, (2.0, 1.0, 1.0))
    assert distances.to_truth.squared.tolist() == [36]
    assert hausdorff(distances) == 6
    assert surface_dice(distances, 5.9) == 0
    assert surface_dice(distances, 6.0) == 1


def test_neither_border_nor_unknown_makes_a_surface():
    mask = np.zeros((10, 10), bool)
    mask[:, 4:] = True
    assert surface_voxels(mask).nonzero()[1].tolist() == [4] * 10
    known = np.ones_like(mask)
    known[:, :4] = False
    assert not surface_voxels(mask, known).any()


def test_one_empty_surface_costs_the_diagonal_and_two_are_undefined():
    empty, some = np.zeros((6, 8), bool), np.zeros((6, 8), bool)
    some[2:4, 2:4] = True
    for pair in ((empty, some), (some, empty)):
        distances = surface_distances(*pair)
        assert hausdorff(distances) == 10
        assert surface_dice(distances, 3.0) == 0
    nothing = surface_distances(empty, empty)
    assert math.isnan(hausdorff(nothing))
    assert math.isnan(surface_dice(nothing, 1.0))


def _lantuejoul(mask: np.ndarray) -> np.ndarray:
    """Return the morphological skeleton by SciPy's operators."""
    cross, cube = ndimage.generate_binary_structure(mask.ndim, 1), np.ones((3,) * mask.ndim)
    found, x = np.zeros_like(mask), mask
    while x.any():
        eroded = ndimage.binary_erosion(x, cross)
        found |= x & ~ndimage.binary_dilation(eroded, cube)
        x = eroded
    return found


@SHAPES
@pytest.mark.parametrize("seed", range(3))
def test_skeleton_is_scipy_s_and_that_of_the_loss(shape, seed):
    mask = _blob(seed, shape, margin=1)
    assert np.array_equal(skeleton(mask), _lantuejoul(mask))
    soft = soft_skeleton(
        torch.from_numpy(mask)[None, None].float(), torch.ones(1, 1, *shape, dtype=torch.bool), 20
    )
    assert np.array_equal(soft[0, 0].numpy() > 0, skeleton(mask))


def test_skeleton_of_a_full_array_ends():
    full = np.ones((5, 6), bool)
    assert np.array_equal(skeleton(full), full)
    assert not skeleton(~full).any()


def test_cldice_sees_a_gap_that_dice_hardly_sees():
    truth = np.zeros((9, 60), bool)
    truth[3:6] = True
    broken, thin = truth.copy(), truth.copy()
    broken[:, 28:32] = False
    thin[3] = False
    assert cldice(cldice_counts(truth, truth)) == 1
    # A line one voxel too thin scores less in Dice but hardly less in clDice.
    assert dice(overlap_counts(thin, truth)) < dice(overlap_counts(broken, truth))
    assert cldice(cldice_counts(thin, truth)) > cldice(cldice_counts(broken, truth))
    empty = np.zeros_like(truth)
    assert cldice(cldice_counts(empty, truth)) == 0
    assert math.isnan(cldice(cldice_counts(empty, empty)))


def test_cldice_of_a_known_box_is_that_of_the_crop_whatever_lies_around_it():
    generator = np.random.default_rng(0)
    pred, truth = (ndimage.gaussian_filter(generator.normal(size=(14, 15, 16)), 1) > 0 for _ in range(2))
    box = (slice(2, 12), slice(0, 11), slice(3, 16))
    known = np.zeros_like(pred)
    known[box] = True
    counts = cldice_counts(pred, truth, known)
    np.testing.assert_array_equal(counts, cldice_counts(pred[box], truth[box]))
    np.testing.assert_array_equal(counts, cldice_counts(pred | ~known, truth & known, known))
    assert counts.min() > 40


@pytest.mark.parametrize("dims", [2, 3])
def test_angles_are_arccos_with_and_without_sign(dims):
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, dims, 50))
    cosine = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(angles(a, b), np.degrees(np.arccos(cosine)), atol=1e-9)
    np.testing.assert_allclose(angles(a, b, signed=False), np.degrees(np.arccos(np.abs(cosine))), atol=1e-9)
    np.testing.assert_allclose(angles(a, -a), 180)
    np.testing.assert_allclose(angles(a, -a, signed=False), 0, atol=1e-12)
    np.testing.assert_allclose(angles(a * 0, a), 90)


def test_small_angles_keep_their_digits():
    tiny = 1e-7
    a, b = np.array([[1.0], [0.0]]), np.array([[math.cos(tiny)], [math.sin(tiny)]])
    assert angles(a, b)[0] == pytest.approx(math.degrees(tiny), rel=1e-6)


def test_sums_of_parts_are_the_sums_of_the_whole():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 3, 8, 6, 5))
    known = generator.random((8, 6, 5)) < 0.7
    for sums in (lambda *x: angle_sums(*x, signed=True), absolute_sums):
        parts = sum(sums(a[:, i : i + 2], b[:, i : i + 2], known[i : i + 2]) for i in range(0, 8, 2))
        np.testing.assert_allclose(parts, sums(a, b, known))
    assert mean(absolute_sums(a, b, known)) == pytest.approx(np.abs(a - b)[:, known].mean())


TARGETS = {
    "ink": {"kind": "binary", "out_channels": 1},
    "cells": {"kind": "multiclass", "out_channels": 3, "classes": ["background", "anterior", "posterior"]},
    "pair": {"kind": "multilabel", "out_channels": 2},
    "sdt": {"kind": "distance", "out_channels": 1},
    "normals": {"kind": "vector", "out_channels": 2},
    "fibre": {"kind": "axis", "out_channels": 2},
    "st": {"kind": "tensor", "out_channels": 3},
}


def _sample(seed: int, shape=(12, 14)) -> tuple[dict, dict, dict]:
    generator = np.random.default_rng(seed)
    channels = {"ink": 1, "cells": 3, "pair": 2, "sdt": 1, "normals": 2, "fibre": 2, "st": 3}
    predictions = {n: generator.random((1, c, *shape)).astype(np.float32) for n, c in channels.items()}
    labels = {n: generator.normal(size=(1, c, *shape)) for n, c in channels.items()}
    labels["ink"] = generator.integers(0, 2, (1, 1, *shape))
    labels["pair"] = generator.integers(0, 2, (1, 2, *shape))
    labels["cells"] = generator.integers(0, 3, (1, 1, *shape))
    masks = {n: generator.random((1, 1, *shape)) < 0.8 for n in channels}
    return predictions, labels, masks


def test_keys_and_values_of_every_kind():
    predictions, labels, masks = _sample(0)
    metrics = build_metrics(TARGETS)
    metrics.update(predictions, labels, masks)
    found = metrics.compute()
    assert {k.split("/", 1)[1] for k in found if k.startswith(("sdt/", "st/"))} == {"mae"}
    assert {k.split("/", 1)[1] for k in found if k.startswith(("normals/", "fibre/"))} == {"angular_error"}
    assert {"ink/dice", "ink/iou", "ink/surface_dice", "ink/hd95", "ink/cldice"} <= found.keys()
    assert {
        "cells/dice",
        "cells/dice/anterior",
        "cells/dice/posterior",
        "pair/iou/0",
        "pair/iou/1",
    } <= found.keys()
    assert not any("background" in key for key in found)
    known = masks["cells"][0, 0]
    index = predictions["cells"][0].argmax(0)
    expected = dice(overlap_counts(index == 2, labels["cells"][0, 0] == 2, known))
    assert found["cells/dice/posterior"] == pytest.approx(expected)
    assert found["cells/dice"] == pytest.approx((expected + found["cells/dice/anterior"]) / 2)
    assert found["mean_dice"] == pytest.approx(
        np.mean([found[f"{n}/dice"] for n in ("ink", "cells", "pair")])
    )
    assert all(isinstance(value, float) for value in found.values())
    wrong = np.abs(predictions["st"] - labels["st"])[0][:, masks["st"][0, 0]]
    assert found["st/mae"] == pytest.approx(wrong.mean())


def test_tensors_and_arrays_score_the_same():
    sample = _sample(0)
    as_tensors = [{n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in part.items()} for part in sample]
    as_tensors[0]["sdt"] = as_tensors[0]["sdt"].requires_grad_()
    results = []
    for predictions, labels, masks in (sample, as_tensors):
        metrics = build_metrics(TARGETS)
        metrics.update(predictions, labels, masks)
        results.append(metrics.compute())
    assert results[0] == results[1]


def test_values_in_ignored_voxels_say_nothing():
    predictions, labels, masks = _sample(0)
    metrics = build_metrics(TARGETS)
    metrics.update(predictions, labels, masks)
    for name, mask in masks.items():
        predictions[name] = np.where(mask, predictions[name], np.nan)
        labels[name] = np.where(mask, labels[name], 255 if name in ("ink", "cells", "pair") else np.nan)
    again = build_metrics(TARGETS)
    again.update(predictions, labels, masks)
    assert again.compute() == metrics.compute()


def test_an_all_ignored_sample_is_not_counted_and_never_perfect():
    predictions, labels, masks = _sample(0)
    metrics = build_metrics(TARGETS)
    metrics.update(predictions, labels, masks)
    before = metrics.compute()
    metrics.update(predictions, labels, {name: np.zeros_like(mask) for name, mask in masks.items()})
    assert metrics.compute() == before
    alone = build_metrics(TARGETS)
    alone.update(predictions, labels, {name: np.zeros_like(mask) for name, mask in masks.items()})
    assert all(math.isnan(value) for value in alone.compute().values())
    assert alone.compute().keys() == before.keys()


def test_empty_truth_predicted_empty_is_left_out_of_the_mean():
    metrics = build_metrics({"ink": TARGETS["ink"]})
    empty, half = np.zeros((1, 1, 6, 6)), np.zeros((1, 1, 6, 6))
    half[..., :3] = 1
    metrics.update({"ink": empty}, {"ink": empty})
    assert math.isnan(metrics.compute()["ink/dice"])
    metrics.update({"ink": half}, {"ink": half})
    assert metrics.compute()["ink/dice"] == 1
    metrics.update({"ink": half}, {"ink": empty})
    assert metrics.compute()["ink/dice"] == 0.5
    assert [row["ink/dice"] for row in metrics.per_case().values()][1:] == [1.0, 0.0]


def test_pieces_of_a_case_pool_and_cases_average():
    samples = [_sample(seed) for seed in range(4)]
    pieces = build_metrics(TARGETS, names=CHEAP_METRICS)
    for i, sample in enumerate(samples):
        pieces.update(*sample, cases=[i // 2])
    joined = build_metrics(TARGETS, names=CHEAP_METRICS)
    for pair in (samples[:2], samples[2:]):
        joined.update(
            *[{n: np.concatenate([p[k][n] for p in pair], axis=2) for n in pair[0][k]} for k in range(3)]
        )
    assert pieces.compute() == pytest.approx(joined.compute())
    pooled = build_metrics(TARGETS, names=CHEAP_METRICS, pool=True)
    for sample in samples:
        pooled.update(*sample)
    assert len(pooled.per_case()) == 1
    assert pooled.compute() != pytest.approx(pieces.compute())


def test_state_merges_across_processes():
    samples = [_sample(seed) for seed in range(3)]
    whole, first, second = (build_metrics(TARGETS) for _ in range(3))
    for sample in samples:
        whole.update(*sample)
    first.update(*samples[0])
    for sample in samples[1:]:
        second.update(*sample)
    first.merge(second.state(), prefix="rank 1")
    assert first.compute() == pytest.approx(whole.compute())
    first.reset()
    assert math.isnan(first.compute()["ink/dice"])


def test_spacing_sets_units_and_tolerance():
    truth = np.zeros((1, 1, 20, 8))
    truth[:, :, 8:] = 1
    pred = np.roll(truth, 1, axis=2)
    pred[:, :, :1] = 0
    metrics = build_metrics({"ink": TARGETS["ink"]}, (45.0, 4.0))
    metrics.update({"ink": pred}, {"ink": truth})
    found = metrics.compute()
    assert found["ink/hd95"] == 45
    assert found["ink/surface_dice"] == 0
    wide = build_metrics({"ink": TARGETS["ink"]}, (45.0, 4.0), tolerance=45.0)
    wide.update({"ink": pred}, {"ink": truth})
    assert wide.compute()["ink/surface_dice"] == 1


def test_mistakes_are_told():
    with pytest.raises(VolumenError, match="found blur"):
        build_metrics(TARGETS, names=["blur"])
    with pytest.raises(VolumenError, match="2 names"):
        build_metrics({"cells": {**TARGETS["cells"], "classes": ["a"]}})
    with pytest.raises(VolumenError, match="expected some of ink"):
        build_metrics({"ink": TARGETS["ink"]}).update({"other": np.zeros((1, 1, 4, 4))}, {})


def test_a_label_map_serves_as_a_multiclass_prediction():
    predictions, labels, masks = _sample(0)
    results = []
    for pred in (predictions["cells"], predictions["cells"].argmax(1)[:, None]):
        metrics = build_metrics({"cells": TARGETS["cells"]})
        metrics.update({"cells": pred}, labels, masks)
        results.append(metrics.compute())
    of_probabilities = ("ece", "average_precision", "best_threshold")
    for key in results[0]:
        if key.split("/")[1:2] and key.split("/")[1] in of_probabilities:
            assert 0 <= results[0][key] <= 1
            assert math.isnan(results[1][key])
        else:
            assert results[0][key] == results[1][key]
