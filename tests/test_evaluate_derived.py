"""Evaluation of derived targets and instances: truth made from labels, streamed, as the whole volume gives it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import zarr
from instance_cases import cells, walls
from prediction import save_checkpoint

from volumen.data.formats.volumes import ArrayVolume
from volumen.derived.derivation import derive_target
from volumen.evaluation.derived_truth import DerivedTruth
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.inference.predict import predict
from volumen.inference.request import PredictRequest

TASKS = {
    "sdt": {"type": "distance_transform", "source_target": "ink", "losses": [{"name": "x"}]},
    "normals": {"type": "surface_normals", "source_target": "ink"},
    "fibre": {"type": "inplane_direction", "source_target": "ink"},
    "st": {"type": "structure_tensor", "source_target": "ink"},
    "edge": {"type": "boundary", "source_target": "ink"},
}
KINDS = {"sdt": "distance", "normals": "vector", "fibre": "axis", "st": "tensor", "edge": "binary"}


def sheets(shape=(20, 40, 44)):
    grid = np.indices(shape)
    return ((grid[1] + grid[2] // 4 + grid[0] // 6) % 12 < 3).astype(np.uint8)


@pytest.mark.parametrize("task", TASKS)
def test_truth_in_blocks_is_the_crop_of_the_whole(task):
    labels, spacing = 3 * sheets(), (3.0, 1.5, 1.5)
    truth = DerivedTruth(task, TASKS[task], None, True, spacing)
    params = {k: v for k, v in TASKS[task].items() if k not in ("type", "source_target", "losses")}
    values, valid = derive_target(
        TASKS[task]["type"], (labels > 0)[None].astype(np.uint8), spacing=(2.0, 1.0, 1.0), **params
    )
    volume = ArrayVolume(labels)
    for box in (np.s_[0:8, 0:20, 0:20], np.s_[8:20, 20:40, 10:44]):
        found, known = truth.read(box, volume, None, None)
        np.testing.assert_allclose(found, values[(slice(None), *box)], atol=1e-4)
        np.testing.assert_array_equal(known, valid[(0, *box)])


def record(folder, name, arrays, tasks, spacing=None, instances=None):
    """Write arrays (C, *space) as a finished prediction of the whole image."""
    root = zarr.open_group(folder / f"{name}.zarr", mode="w", zarr_format=3)
    targets = {}
    for target, (values, kind) in arrays.items():
        group = root.require_group(target)
        stored = values if len(values) > 1 else values[0]
        axes = ["c", "z", "y", "x"][-stored.ndim :] if len(values) > 1 else ["z", "y", "x"][-stored.ndim :]
        group.create_array("0", data=stored, dimension_names=axes)
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": [{"name": a, "type": "channel" if a == "c" else "space"} for a in axes], "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * stored.ndim}]}]}]}  # fmt: skip  # noqa: E501
        targets[target] = {"kind": kind, "channels": len(values), "activation": "none", "dtype": str(values.dtype)}  # fmt: skip  # noqa: E501
    shape = list(next(iter(arrays.values()))[0].shape[1:])
    root.attrs["volumen"] = {"recipe": {
        "input": {"path": f"{name}.tif", "shape": shape}, "region": [[0, n] for n in shape], "targets": targets,
        "dtype": "float32", "threshold": None, "instances": instances,
        "made_of": {"auxiliary_tasks": tasks, "dataset_config": {"targets": {"ink": {"kind": "binary"}}}},
    }}  # fmt: skip


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, metadata={"axes": "ZYX"[-values.ndim :]})


@pytest.fixture
def truths(tmp_path):
    """Return a folder whose prediction is the truth of every derived target, and those arrays."""
    labels = sheets()
    write(tmp_path / "data" / "labels" / "a_ink.tif", labels)
    arrays = {}
    for name, task in TASKS.items():
        values, _ = derive_target(task["type"], labels[None])
        arrays[name] = (np.nan_to_num(values), KINDS[name])
    return tmp_path, arrays


def scores(folder, **options):
    request = EvaluateRequest(str(folder / "found"), str(folder / "data"), str(folder / "out"), **options)
    return evaluate(request)


def test_the_truth_scores_perfectly_and_known_errors_score_as_they_are(truths, monkeypatch):
    folder, arrays = truths
    record(folder / "found", "a", arrays, TASKS)
    mean = scores(folder).mean
    assert mean["sdt/mae"] == pytest.approx(0, abs=1e-5)
    assert mean["st/mae"] == pytest.approx(0, abs=1e-5)
    assert mean["normals/angular_error"] == pytest.approx(0, abs=0.05)
    assert mean["fibre/angular_error"] == pytest.approx(0, abs=0.05)
    assert mean["edge/dice"] == 1
    wrong = {
        **arrays,
        "sdt": (arrays["sdt"][0] + 2, "distance"),
        "normals": (-arrays["normals"][0], "vector"),
        "fibre": (-arrays["fibre"][0], "axis"),
    }
    record(folder / "found", "a", wrong, TASKS)
    monkeypatch.setattr("volumen.evaluation.cases.DERIVED_SIDE", 16)
    found = scores(folder)
    assert found.mean["sdt/mae"] == pytest.approx(2, abs=1e-4)
    assert found.mean["normals/angular_error"] == pytest.approx(180, abs=0.05)
    assert found.mean["fibre/angular_error"] == pytest.approx(0, abs=0.05)
    page = (folder / "out" / "report.html").read_text()
    assert "a, normals: angle 180.00 degrees; z = " in page


def test_truths_are_alike_whatever_the_losses_and_not_whatever_the_derivation():
    task = {"type": "distance_transform", "source_target": "ink", "losses": [{"name": "MSELoss"}]}
    truth = DerivedTruth("sdt", task, None, True, (1.0, 1.0, 1.0))
    assert truth.derives_like(replace(truth, task={**task, "losses": [], "loss_weight": 3.0}))
    assert not truth.derives_like(replace(truth, task={**task, "distance_type": "inside"}))
    assert not truth.derives_like(replace(truth, spacing=(2.0, 1.0, 1.0)))


def test_instances_are_scored_by_name_by_flag_and_by_their_number(tmp_path):
    truth = cells((12, 30, 30), 6)
    write(tmp_path / "data" / "labels" / "a_cell.tif", truth.astype(np.uint16))
    merged = np.where(truth == 2, 1, truth).astype(np.uint32)
    rules = {"foreground": None, "affinities": None, "boundary": "cell"}
    record(tmp_path / "found", "a", {"cell_instances": (merged[None], "instances")}, {}, instances=rules)
    mean = scores(tmp_path).mean
    assert mean["cell_instances/voi_split"] == 0
    assert mean["cell_instances/voi_merge"] > 0
    assert 0 < mean["cell_instances/adapted_rand_error"] < 1
    write(tmp_path / "plain" / "a_cell.tif", merged.astype(np.uint16))
    request = EvaluateRequest(str(tmp_path / "plain"), str(tmp_path / "data"), str(tmp_path / "out"))
    assert "cell/dice" in evaluate(request).mean
    flagged = evaluate(replace(request, instances=("cell",))).mean
    assert flagged["cell/voi_merge"] == mean["cell_instances/voi_merge"]
    write(tmp_path / "plain" / "a_cell.tif", (merged + 300).astype(np.uint16))
    assert evaluate(request).mean == flagged


def test_what_a_head_learned_of_instances_is_scored_as_such(tmp_path):
    truth = cells((10, 24, 24), 5)
    write(tmp_path / "data" / "labels" / "a_ink.tif", truth.astype(np.uint16))
    edge = walls(truth).astype(np.float32)
    record(tmp_path / "found", "a", {"ink": (edge[None], "binary")}, {})
    root = zarr.open_group(tmp_path / "found" / "a.zarr", mode="r+")
    attributes = dict(root.attrs["volumen"])
    attributes["recipe"]["made_of"]["dataset_config"]["targets"]["ink"]["instances"] = "boundary"
    root.attrs["volumen"] = attributes
    assert scores(tmp_path).mean["ink/dice"] == 1


def test_a_prediction_of_the_network_is_scored_with_its_directions(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (10, 16, 16), dtype=np.uint8)
    write(tmp_path / "images" / "s.tif", image)
    write(tmp_path / "labels" / "s_ink.tif", sheets(image.shape))
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    predict(
        PredictRequest(
            str(tmp_path / "images" / "s.tif"), str(checkpoint), str(tmp_path / "p.zarr"), amp="off"
        )
    )
    evaluate(
        EvaluateRequest(
            str(tmp_path / "p.zarr"), str(tmp_path), str(tmp_path / "out"), targets=("ink", "normals")
        )
    )
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["mean"]
    assert 0 < told["normals/angular_error"] < 180
    assert "ink/dice" in told
