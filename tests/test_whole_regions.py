"""Validation metrics of whole regions: blocks together score as the region, and choose the best epoch rightly."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from volumen.handlers.metric import KeyMetric
from volumen.handlers.scores import TargetScores
from volumen.metrics import whole_regions
from volumen.metrics.target_metrics import build_metrics, smaller_is_better
from volumen.metrics.whole_regions import WholeRegions
from volumen.utils.errors import VolumenError

TARGETS = {
    "ink": {"kind": "binary", "out_channels": 1},
    "cells": {"kind": "multiclass", "out_channels": 3},
    "sdt": {"kind": "distance", "out_channels": 1},
}
NAMES = ("surface_dice", "hd95", "cldice")


def labels(seed, shape=(12, 20, 18)):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, [n // 2 for n in shape])
    return np.kron(coarse, np.ones((2,) * len(shape), int))[None].astype(np.int16)


def blocks(shape, side=7):
    for z in range(0, shape[0], side):
        for y in range(0, shape[1], side):
            yield np.s_[z : z + side, y : y + side, 0 : shape[2]], (z, y, 0)


@pytest.mark.parametrize("spacing", [None, (4.0, 1.0, 1.0)])
def test_blocks_score_as_the_region_they_cover(spacing):
    regions = WholeRegions(TARGETS, spacing, NAMES, tolerance=2.0)
    whole = build_metrics({k: TARGETS[k] for k in ("ink", "cells")}, spacing, names=NAMES, tolerance=2.0)
    assert regions.targets == ("ink", "cells")
    for case in ("a", "b"):
        seed = ord(case)
        pred, truth = labels(seed), labels(seed + 9)
        known = np.random.default_rng(seed).random(pred.shape[1:]) < 0.9
        ink = (pred > 0).astype(np.int16), (truth > 0).astype(np.int16)
        whole.update(
            {"ink": ink[0][None], "cells": pred[None]}, {"ink": ink[1][None], "cells": truth[None]},
            {"ink": known[None, None], "cells": known[None, None]}, cases=[case],
        )  # fmt: skip
        for box, start in blocks(known.shape):
            part = (slice(None), *box)
            moved = np.add(start, (5, 0, 3))
            regions.add("cells", case, moved, pred[part], truth[part], known[box])
            regions.add("ink", case, moved, ink[0][part], ink[1][part], known[box])
    assert regions.compute() == pytest.approx(whole.compute())
    other = WholeRegions(TARGETS, spacing, NAMES, tolerance=2.0)
    other.merge(regions.state())
    assert other.compute() == regions.compute()
    regions.reset()
    assert np.isnan(regions.compute()["ink/hd95"])


def test_scores_of_an_evaluator_include_them_by_request():
    pred = torch.full((1, 1, 8, 8, 8), -5.0)
    pred[..., 2:6] = 5.0
    truth = torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    truth[..., 3:6] = 1
    masks = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    output = {"pred": {"ink": pred}, "label": {"ink": truth, "ink_mask": masks}}
    batch = {"volume_name": ["a"], "start": torch.zeros(1, 3, dtype=torch.int64)}
    state = SimpleNamespace(output=output, batch=batch, metrics={})
    for names, expected in ((["dice", "iou"], set()), (["dice", "hd95"], {"ink/hd95"})):
        scores = TargetScores({"ink": TARGETS["ink"]}, names=names)
        scores.iteration_completed(SimpleNamespace(state=state))
        scores.completed(SimpleNamespace(state=state), "mean_dice")
        assert {key for key in state.metrics if "hd95" in key} == expected
        assert state.metrics["ink/dice"] == pytest.approx(6 / 7)
    assert state.metrics["ink/hd95"] == 1


def test_distances_take_the_voxel_size_of_each_volume():
    pred = torch.full((2, 1, 8, 8, 8), -5.0)
    pred[:, :, 2:6] = 5.0
    truth = torch.zeros(2, 1, 8, 8, 8, dtype=torch.uint8)
    truth[:, :, 3:6] = 1
    output = {"pred": {"ink": pred}, "label": {"ink": truth}}
    batch = {
        "volume_name": ["a", "b"],
        "start": torch.zeros(2, 3, dtype=torch.int64),
        "spacing": [torch.tensor([7.0, 30.0], dtype=torch.float64)]
        + [torch.ones(2, dtype=torch.float64)] * 2,
    }
    state = SimpleNamespace(output=output, batch=batch, metrics={})
    names = ["hd95", "b1_error", "voi_merge", "f1@0.5", "surface_dice@3", "b0_error@4"]
    scores = TargetScores({"ink": TARGETS["ink"]}, (1.0, 1.0, 1.0), names=names)
    scores.iteration_completed(SimpleNamespace(state=state))
    scores.completed(SimpleNamespace(state=state), "mean_dice")
    assert state.metrics["ink/hd95"] == (7 + 30) / 2
    assert {f"ink/{name}" for name in names} <= state.metrics.keys()


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("val/ink/hd95", True),
        ("val/ink/surface_dice", False),
        ("val/ink/cldice/loss", False),
        ("val/surface_distance/dice", False),
        ("val/normals/angular_error", True),
        ("val/loss/ink", True),
        ("val/mean_dice", False),
        ("val/cells/f1@0.5/2", False),
        ("val/cells/b0_error@64", True),
        ("val/cells/objects_merged", True),
    ],
)
def test_which_way_is_better_goes_by_the_metric_alone(name, smaller):
    assert KeyMetric(name).smaller_is_better(SimpleNamespace(state=SimpleNamespace())) is smaller


def test_a_count_of_objects_chooses_no_model():
    metric = KeyMetric("val/cells/objects_true")
    with pytest.raises(VolumenError, match="cells/objects_true: is no score by which a model can be chosen"):
        metric.smaller_is_better(SimpleNamespace(state=SimpleNamespace()))


def test_every_metric_has_a_direction():
    assert smaller_is_better("cells/voi_merge")
    assert not smaller_is_better("cells/dice/2")
    assert not smaller_is_better("mean_dice")


@pytest.mark.parametrize("shape", [(12, 20, 18), (40, 30)])
def test_a_large_region_scores_the_same_without_being_assembled(shape, monkeypatch):
    names = ("hd95", "cldice", "b0_error", "voi_merge", "surface_dice")
    spacing = (4.0, 1.0, 1.0)[3 - len(shape) :]
    pred, truth = labels(1, shape), labels(2, shape)
    known = np.random.default_rng(3).random(shape) < 0.9
    regions = WholeRegions(TARGETS, spacing, names)
    for low in range(0, shape[0], 5):
        part = np.s_[:, low : low + 5]
        regions.add(
            "cells", "a", (low + 7, *(3,) * (len(shape) - 1)), pred[part], truth[part], known[part[1:]]
        )
    assembled = regions.compute()
    assert "cells/hd95/1" in assembled
    monkeypatch.setattr(whole_regions, "MOST_VOXELS", 0)
    assert regions.compute() == pytest.approx(assembled, nan_ok=True)


def test_blocks_far_apart_are_regions_of_their_own_and_need_little_memory():
    regions = WholeRegions(TARGETS, None, NAMES)
    each = []
    for number in range(3):
        pred, truth = labels(number), labels(number + 10)
        # Two touching halves at each of three places that are far apart.
        for low in (0, 6):
            part = np.s_[:, low : low + 6]
            regions.add("cells", "a", np.add([low, 0, 0], number * 10**6), pred[part], truth[part])
        alone = WholeRegions(TARGETS, None, NAMES)
        alone.add("cells", "a", (0, 0, 0), pred, truth)
        each.append(alone.compute())
    tracemalloc.start()
    found = regions.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26
    assert set(found) == set(each[0])
    for metric in ("cells/hd95/1", "cells/hd95/2"):
        assert found[metric] == pytest.approx(np.mean([values[metric] for values in each]))


@pytest.mark.parametrize("seed", range(5))
def test_connected_groups_are_those_of_an_independent_labelling(seed):
    rng = np.random.default_rng(seed)
    field = np.zeros((40, 40), bool)
    regions = WholeRegions(TARGETS, None, NAMES)
    for _ in range(12):
        start, size = rng.integers(0, 34, 2), rng.integers(1, 6, 2)
        field[tuple(slice(s, s + n) for s, n in zip(start, size))] = True
        regions.add("ink", "a", start, np.ones((1, *size)), np.ones((1, *size)))
    (blocks_of_case,) = regions.state().values()
    groups = whole_regions.connected_groups(blocks_of_case)
    assert sum(map(len, groups)) == 12
    assert len(groups) == ndimage.label(field, np.ones((3, 3)))[1]
