"""`volumen evaluate` scores topology and objects by blocks, says where errors are, refuses what it cannot score."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest
import tifffile
import zarr
from test_label_scores import phantom, volumes

from volumen.cli.main import main
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.metrics import label_scores
from volumen.metrics.label_scores import LabelSettings, score_masks
from volumen.metrics.score_names import names_of
from volumen.utils.errors import VolumenError


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, metadata={"axes": "ZYX"[-values.ndim :]})


def compare(folder, pred, truth, mask=None, **settings):
    write(folder / "found" / "a_ink.tif", pred)
    write(folder / "data" / "labels" / "a_ink.tif", truth)
    if mask is not None:
        write(folder / "data" / "masks" / "a.tif", mask)
    return evaluate(
        EvaluateRequest(str(folder / "found"), str(folder / "data"), str(folder / "out"), **settings)
    )


@pytest.mark.parametrize("side", [9, 128])
def test_a_case_in_blocks_has_the_scores_of_masks_in_memory(tmp_path, monkeypatch, side):
    pred, truth, known = volumes(0, (20, 24, 30))
    monkeypatch.setattr(label_scores, "BLOCK", side)
    names = names_of("labels", default=False, pieces=False)
    found = compare(
        tmp_path, pred.astype(np.uint8), truth.astype(np.uint8), known.astype(np.uint8),
        metrics=names, spacing=(2.0, 1.0, 0.5), connectivity="6/26", surface_border=True,
    )  # fmt: skip
    config = LabelSettings(names, (2.0, 1.0, 0.5), 0.5, "6/26", border=True)
    expected = score_masks(pred, truth, known, config)
    row = found.cases["a"]
    assert {name: row[f"ink/{name}"] for name in names} == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_topology_and_objects_are_scored_unasked_with_their_places_and_cost(tmp_path):
    pred, truth = phantom()
    found = compare(tmp_path, pred.astype(np.uint8), truth.astype(np.uint8), worst=0)
    assert found.mean["ink/b1_error"] == found.mean["ink/b2_error"] == 1
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())
    behind = told["details"]["a"]["ink"][""]
    assert behind["topology"]["prediction"] == {"b0": 5, "b1": 1, "b2": 1, "euler": 5}
    assert behind["cavities"]["prediction"] == [{"voxels": 64, "low": [32, 12, 12], "high": [36, 16, 16]}]
    assert behind["windows"]["64"][0]["low"] == [0, 0, 0]
    rows = list(csv.DictReader((tmp_path / "out" / "objects.csv").open()))
    assert [row["error"] for row in rows] == ["merged", "broken", "missed", "added"]
    assert (rows[0]["low_z"], rows[0]["high_x"], len(rows[0]["parts"].split())) == ("6", "40", 2)
    assert {"objects", "surfaces", "skeletons", "windows", "voxels"} <= found.seconds.keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "CPU seconds" in page
    assert "6, 4, 4" in page
    header = (tmp_path / "out" / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("b0_error", "voi_split", "adapted_rand_error", "objects_merged", "f1@0.5", "ap", "pq",
                 "mean_surface_distance", "hd95", "surface_dice@1"):  # fmt: skip
        assert f"ink/{name}" in header
    assert not any("ece" in key or "surface_challenge" in key for key in header)


def test_probabilities_are_calibrated_and_labels_are_not(tmp_path):
    truth = np.zeros((4, 16, 16), np.uint8)
    truth[:, 4:12, 4:12] = 1
    found = compare(tmp_path, np.where(truth, 0.75, 0.25).astype(np.float32), truth, worst=0)
    assert found.mean["ink/average_precision"] == 1
    assert found.mean["ink/ece"] == pytest.approx(0.25)
    assert 0.25 < found.mean["ink/best_threshold"] <= 0.75


def test_wrong_places_of_a_prediction_of_a_region_are_those_of_the_image(tmp_path):
    labels = np.zeros((8, 40, 60), np.uint32)
    labels[2:6, 4:12, 4:20], labels[2:6, 20:28, 4:20] = 7, 9
    pred = np.zeros_like(labels)
    pred[2:6, 4:28, 4:20] = 3
    found = compare(tmp_path, pred, labels, instances=("ink",), worst=0)
    assert found.mean["ink/objects_merged"] == 1
    assert found.mean["ink/f1@0.5"] == 0
    (error,) = [row for row in found.details["a"]["ink"][""]["objects"] if row["error"] == "merged"]
    assert (error["low"], error["high"], error["parts"]) == ([2, 4, 4], [6, 28, 20], [7, 9])


def test_instance_numbers_beyond_floating_point_are_told_apart(tmp_path):
    for part, base in (("found", 2**60), ("data/labels", 2**61)):
        values = np.zeros((12, 20, 24), np.uint64)
        values[:, :, :4], values[:, :, 4:] = base, base + 1
        (tmp_path / part).mkdir(parents=True)
        zarr.save_array(str(tmp_path / part / "a_ink.zarr"), values)
    found = evaluate(
        EvaluateRequest(
            str(tmp_path / "found"),
            str(tmp_path / "data"),
            str(tmp_path / "out"),
            instances=("ink",),
            worst=0,
        )
    )
    assert found.mean["ink/objects_true"] == found.mean["ink/objects_predicted"] == 2
    assert found.mean["ink/voi_merge"] == found.mean["ink/adapted_rand_error"] == 0


def test_a_score_of_another_kind_of_target_is_refused(tmp_path):
    mask = np.zeros((4, 8, 8), np.uint8)
    mask[1:3] = 1
    with pytest.raises(
        VolumenError, match=r"--metrics: expected scores of ink \(labels\): dice, .*found angular_error"
    ):
        compare(tmp_path, mask, mask, metrics=("dice", "angular_error"))
    with pytest.raises(
        VolumenError, match=r"--metrics: expected f1@X, X the least intersection .* found f1@2"
    ):
        compare(tmp_path, mask, mask, metrics=("f1@2",))
    with pytest.raises(VolumenError, match="found b3_error"):
        compare(tmp_path, mask, mask, metrics=("b3_error",))
    with pytest.raises(VolumenError, match="--connectivity: expected 26/6 or 6/26, found 18/6"):
        compare(tmp_path, mask, mask, connectivity="18/6")


def test_earlier_names_are_understood(tmp_path):
    labels = np.arange(4 * 8 * 8, dtype=np.uint32).reshape(4, 8, 8) // 64 + 1
    found = compare(tmp_path, labels, labels, metrics=("vi_split", "vi_merge"), instances=("ink",), worst=0)
    assert set(found.mean) == {"ink/voi_split", "ink/voi_merge"}


def test_classes_that_the_prediction_cannot_have_are_one_line(tmp_path):
    pred = np.zeros((4, 12, 16), np.uint8)
    pred[1], pred[2] = 1, 2
    truth = np.arange(4 * 12 * 16, dtype=np.uint16).reshape(4, 12, 16)
    expected = r"a_ink.tif: expected classes 0 to 254, found 767; give .* or --instances ink where"
    with pytest.raises(VolumenError, match=expected):
        compare(tmp_path, pred, truth)


def test_a_class_that_was_never_predicted_is_scored(tmp_path):
    pred = np.zeros((4, 12, 16), np.uint8)
    pred[1, :, :8], pred[1, :, 8:] = 1, 2
    truth = pred.copy()
    truth[2:] = 3
    found = compare(tmp_path, pred, truth, worst=0)
    assert found.mean["ink/dice/3"] == 0
    assert found.mean["ink/objects_missed/3"] == 1
    assert found.mean["ink/dice/1"] == 1


def test_a_mask_against_numbered_labels_is_one_warning(tmp_path, caplog):
    parts = np.zeros((4, 12, 16), np.uint8)
    parts[:, :, :4], parts[:, :, 8:12] = 1, 2
    compare(tmp_path, (parts > 0).astype(np.uint8), parts, worst=0)
    assert "a_ink.tif: values up to 2, but the prediction" in caplog.text


def test_an_empty_and_an_all_masked_case_among_others_are_one_warning_each(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    empty, some = np.zeros((4, 8, 8), np.uint8), np.ones((4, 8, 8), np.uint8)
    for name, values, known in (("a", empty, some), ("b", some, empty), ("c", some, some)):
        write(tmp_path / "found" / f"{name}_ink.tif", values)
        write(tmp_path / "data" / "labels" / f"{name}_ink.tif", values)
        write(tmp_path / "data" / "masks" / f"{name}.tif", known)
    request = EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out"), worst=0)
    found = evaluate(request)
    assert "a_ink: prediction and label are empty" in caplog.text
    assert "b_ink: every voxel is masked out or ignored" in caplog.text
    assert np.isnan(found.cases["a"]["ink/dice"])
    assert found.cases["a"]["ink/b0_error"] == 0
    assert "b" not in found.cases
    assert found.mean["ink/dice"] == 1


def test_the_command_takes_all_scores_and_parameters(tmp_path, capsys):
    pred, truth = phantom()
    write(tmp_path / "found" / "a_ink.tif", pred.astype(np.uint8))
    write(tmp_path / "labels" / "a_ink.tif", truth.astype(np.uint8))
    command = ["evaluate", "-p", str(tmp_path / "found"), "-l", str(tmp_path / "labels"), "--worst", "0"]
    assert main([*command, "-o", str(tmp_path / "one"), "--metrics", "all,f1@0.75,surface_dice@3"]) in (
        0,
        None,
    )
    mean = json.loads((tmp_path / "one" / "metrics.json").read_text())["mean"]
    assert 0 < mean["ink/surface_challenge"] < 1
    assert mean["ink/surface_dice@1"] <= mean["ink/surface_dice@2"] <= mean["ink/surface_dice@3"]
    assert mean["ink/f1@0.75"] <= mean["ink/f1@0.5"]
    assert mean["ink/expected_run_length"] >= 0
