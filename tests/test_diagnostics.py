"""`volumen evaluate` tells where errors are and which labels are suspect: files, cases of all kinds, bad input."""

from __future__ import annotations

import csv
import json
import logging
import math
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import zarr
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.ndimage import label as components
from test_evaluate import write

from volumen.cli.main import main
from volumen.evaluation import score
from volumen.evaluation.diagnostics.diagnose import partners
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.metrics.objects.contingency import overlaps
from volumen.napari_plugin.suspects import suspect_layers, suspects_reader
from volumen.phantom.geometry import Roll, sheet_geometry


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def run(folder, pred, truth, mask=None, name="a", target="ink", **settings):
    write(folder / "found" / f"{name}_{target}.tif", pred)
    write(folder / "data" / "labels" / f"{name}_{target}.tif", truth)
    if mask is not None:
        write(folder / "data" / "masks" / f"{name}.tif", mask)
    request = EvaluateRequest(
        str(folder / "found"), str(folder / "data"), str(folder / "out"), worst=0, metrics=("dice",) if
        "instances" not in settings else ("adapted_rand_error",), **settings,
    )  # fmt: skip
    return evaluate(request)


def table(folder, quantity, label="", target="ink"):
    rows = rows_of(folder / "out" / "diagnostics.csv")
    return [
        row for row in rows if (row["quantity"], row["class"], row["target"]) == (quantity, label, target)
    ]


ROLL = Roll(
    centre=(64.0, 64.0), pitch=14.0, thickness=4.0, first_turn=1, last_turn=4, wobble=0.0, wobble_length=100.0,
    squeeze=0.0, squeeze_length=50.0, phases=(0.0, 0.0, 0.0),
)  # fmt: skip


@pytest.mark.parametrize(("least", "most"), [(0.016, 0.022), (0.008, 0.011)])
def test_on_a_phantom_errors_are_in_the_bins_of_its_exact_curvature(tmp_path, least, most):
    """An involute of a circle of radius b has the radius of curvature sqrt(r^2 - b^2); a rolled sheet half of that.

    What is bent by a range of curvatures is missed. The sheet's ends, whose rims are sharp, are not.
    """
    geometry = sheet_geometry(ROLL, (48, 128, 128))
    truth = geometry.distance < 0
    y, x = np.indices(truth.shape[1:]) - 64.0
    bend = 0.5 / np.sqrt(np.maximum(np.hypot(x, y) ** 2 - (ROLL.pitch / 2 / math.pi) ** 2, 1))
    wrong = truth & geometry.valid & (bend > least) & (bend < most)
    wrong[:, 120:], wrong[:, :8], wrong[:, :, :8], wrong[:, :, 120:] = False, False, False, False
    run(tmp_path, (truth & ~wrong).astype(np.uint8), truth.astype(np.uint8))
    inside, everything = 0, 0
    for row in table(tmp_path, "curvature"):
        everything += int(row["missed"])
        if row["bin_low"]:
            # The inner face of a turn is bent the other way. Steps of voxels blur the curvature by 0.006.
            low, high = sorted(abs(float(row[end])) for end in ("bin_low", "bin_high"))
            inside += int(row["missed"]) if low < most + 0.006 and high > least - 0.005 else 0
    assert everything == wrong.sum() > 10000
    assert inside > 0.95 * everything


def test_on_a_phantom_errors_are_in_the_bins_of_its_exact_gaps(tmp_path):
    """A roll that is squeezed: predicted bridges fill the gaps that are, by exact distances, narrower than 6 voxels."""
    roll = Roll.draw((64, 128, 128), seed=3)
    geometry = sheet_geometry(roll, (64, 128, 128))
    truth = geometry.distance < 0
    # The exact gap at a voxel of it: walk along the normal to both sheets.
    places = np.argwhere((geometry.distance > 0) & (geometry.distance < 5) & geometry.valid)
    normals = geometry.normals[:, *places.T].T[:, ::-1]
    width = np.full(len(places), np.nan)
    reached = geometry.distance[tuple(places.T)].astype(float)
    for step in np.arange(0.25, 14, 0.25):
        ahead = np.rint(places + step * normals).astype(int)
        inside = ((ahead >= 0) & (ahead < truth.shape)).all(axis=1)
        hit = inside & np.isnan(width)
        hit[hit] = truth[tuple(ahead[hit].T)]
        width[hit] = reached[hit] + step
    narrow = np.zeros_like(truth)
    narrow[tuple(places[width < 6].T)] = True
    assert narrow.sum() > 300
    run(tmp_path, (truth | narrow).astype(np.uint8), truth.astype(np.uint8))
    rows = table(tmp_path, "gap")
    false = {
        (float(row["bin_low"]), float(row["bin_high"])): int(row["false"]) for row in rows if row["bin_low"]
    }
    near = sum(count for (_, high), count in false.items() if high <= 8)
    assert near > 0.9 * narrow.sum()
    assert sum(false.values()) == narrow.sum()


@pytest.mark.parametrize("side", [19, 128])
def test_planted_labels_on_a_phantom_are_found_with_their_boxes(tmp_path, monkeypatch, side):
    monkeypatch.setattr("volumen.evaluation.diagnostics.diagnose.BLOCK", side)
    sheet = sheet_geometry(ROLL, (48, 128, 128)).distance < 0
    label = sheet.copy()
    label[10:30, 60:70, 80:128] = False
    label[20:30, 2:14, 2:14] = True
    probability = np.where(sheet, 0.95, 0.02).astype(np.float32)
    run(tmp_path, probability, label.astype(np.uint8), spacing=(2.0, 1.0, 1.0))
    rows = rows_of(tmp_path / "out" / "suspects.csv")
    missing = [row for row in rows if row["kind"] == "missing_label"]
    # What SciPy finds beyond 2 voxels of the label: a piece of each turn that passes through the hole.
    away = distance_transform_edt(~label, sampling=(2, 1, 1)) > 2
    pieces, _ = components(sheet & away, np.ones((3, 3, 3)))
    expected = {
        tuple((part.start, part.stop) for part in box): int((pieces[box] == i).sum())
        for i, box in enumerate(find_objects(pieces), start=1)
    }
    assert len(expected) >= 2
    found = {
        tuple((int(row[f"low_{axis}"]), int(row[f"high_{axis}"])) for axis in "zyx"): int(row["voxels"])
        for row in missing
    }
    assert found == expected
    for row in missing:
        assert row["reason"] == "continues"
        place = tuple(int(row[f"place_{axis}"]) for axis in "zyx")
        assert sheet[place] > label[place]
        assert float(row["score"]) == pytest.approx(0.95, abs=1e-3)
        assert float(row["physical_low_z"]) == 2 * (int(row["low_z"]) - 0.5)
        assert float(row["size"]) == 2 * int(row["voxels"])
    (wrong,) = [row for row in rows if row["kind"] == "wrong_label"]
    assert wrong["reason"] == "alone"
    assert [wrong[f"{end}_{axis}"] for axis in "zyx" for end in ("low", "high")] == [
        "20",
        "30",
        "2",
        "14",
        "2",
        "14",
    ]
    # The volumes and points for napari show the same.
    numbers = zarr.open_group(str(tmp_path / "out" / "suspects" / "ink" / "a.zarr"))["0"][:]
    assert numbers.shape == label.shape
    assert {int(row["number"]): int(row["voxels"]) for row in rows} == {
        int(value): int(count) for value, count in zip(*np.unique(numbers[numbers > 0], return_counts=True))
    }
    reader = suspects_reader(str(tmp_path / "out" / "suspects.csv"))
    (labels, options, kind), (points, more, points_kind) = reader("")
    assert (kind, points_kind, options["scale"]) == ("labels", "points", [2.0, 1.0, 1.0])
    assert [int(labels[tuple(int(v) for v in point)]) for point in points] == more["features"]["number"]
    assert more["scale"] == options["scale"]
    assert suspects_reader(str(tmp_path / "out" / "metrics.csv")) is None


def test_a_perfect_prediction_has_no_errors_and_no_suspects(tmp_path):
    sheet = (sheet_geometry(ROLL, (40, 128, 128)).distance < 0).astype(np.uint8)
    run(tmp_path, sheet, sheet)
    assert rows_of(tmp_path / "out" / "suspects.csv") == []
    rows = rows_of(tmp_path / "out" / "diagnostics.csv")
    assert {row["quantity"] for row in rows} == {"all", "curvature", "thickness", "gap", "border_distance"}
    assert {row["missed"] for row in rows} == {row["false"] for row in rows} == {"0"}
    for quantity in ("curvature", "gap"):
        counted = [row for row in rows if row["quantity"] == quantity]
        assert sum(int(row["truth_voxels"]) for row in counted) == sheet.sum()
    assert suspect_layers(tmp_path / "out" / "suspects.csv") == []


def test_blocks_of_any_size_write_the_same_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (6, 8, 7)).repeat(6, 0).repeat(7, 1).repeat(8, 2).astype(np.uint8)
    pred = np.where(rng.random(truth.shape) < 0.2, rng.integers(0, 3, truth.shape), truth).astype(np.uint8)
    pred[5:25, 10:30, 10:30] = 1
    mask = np.ones(truth.shape, np.uint8)
    mask[:, :, 40:] = 0
    texts = []
    for number, side in enumerate((15, 33, 128)):
        monkeypatch.setattr("volumen.evaluation.diagnostics.diagnose.BLOCK", side)
        folder = tmp_path / str(number)
        found = run(folder, pred, truth, mask)
        assert "diagnostics" in found.seconds
        texts.append(
            [
                (folder / "out" / name).read_text()
                for name in ("diagnostics.csv", "suspects.csv", "diagnostics.json")
            ]
        )
    assert texts[0] == texts[1] == texts[2]
    told = json.loads(texts[0][2])
    assert told["tables"]["ink"]


def test_an_image_has_its_own_bins_and_boxes_of_two_axes(tmp_path):
    y, x = np.indices((120, 160))
    truth = (np.hypot(y - 60, x - 50) < 20) | (np.abs(x - 120) < 4)
    pred = truth & (x > 40)
    run(tmp_path, pred.astype(np.uint8), truth.astype(np.uint8), spacing=(0.5, 0.5))
    bent = [row for row in table(tmp_path, "curvature") if row["bin_low"]]
    # In units of the spacing, the disc is 10 in radius, the bar straight.
    assert any(float(row["bin_low"]) <= 0.1 <= float(row["bin_high"]) and int(row["missed"]) for row in bent)
    assert all(int(row["missed"]) == 0 for row in bent if float(row["bin_high"]) <= 0.02)
    (row,) = rows_of(tmp_path / "out" / "suspects.csv")
    assert (row["kind"], row["reason"], row["low_z"]) == ("wrong_label", "continues", "")
    assert (row["low_x"], row["high_x"]) == ("31", "39")


def test_contrast_is_of_the_image_and_an_image_of_another_shape_is_one_line(tmp_path, monkeypatch, caplog):
    truth = np.zeros((24, 40, 40), np.uint8)
    truth[8:14] = 1
    rng = np.random.default_rng(0)
    image = (100 + 40 * truth + rng.normal(0, 10, truth.shape)).astype(np.float32)
    image[:, :, 20:] = 100 + rng.normal(0, 10, (24, 40, 20))
    pred = truth.copy()
    pred[:, :, 20:] = 0
    write(tmp_path / "image.tif", image)
    find = score.find_pairs

    def with_image(request):
        pairs = find(request)
        return replace(
            pairs, cases=[replace(case, image=str(tmp_path / "image.tif")) for case in pairs.cases]
        )

    monkeypatch.setattr(score, "find_pairs", with_image)
    run(tmp_path, pred, truth)
    rows = [row for row in table(tmp_path, "contrast") if row["bin_low"]]
    for side, share in ((-1, 0.9), (1, 0.1)):
        part = [
            row for row in rows if (float(row["bin_low"]) >= 2 if side > 0 else float(row["bin_high"]) <= 1)
        ]
        counted = sum(int(row["truth_voxels"]) for row in part)
        assert counted > 2000
        assert (sum(int(row["missed"]) for row in part) / counted > share) == (side < 0)
    write(tmp_path / "image.tif", image[:-1])
    with caplog.at_level(logging.WARNING):
        run(tmp_path, pred, truth)
    assert table(tmp_path, "contrast") == []
    (line,) = [record.getMessage() for record in caplog.records if "contrast" in record.getMessage()]
    assert "expected shape (24, 40, 40), as the label" in line
    assert line.endswith("found (23, 40, 40)")


def test_instances_are_wrong_where_another_object_is_predicted(tmp_path):
    """Two touching cells, merged: the smaller one is missed; what was predicted there is false."""
    truth = np.zeros((20, 40, 60), np.uint32)
    truth[5:15, 5:35, 5:35], truth[5:15, 5:35, 35:50] = 70000, 9
    merged = np.where(truth > 0, 4, 0).astype(np.uint32)
    run(tmp_path, merged, truth, instances=("ink",))
    (row,) = table(tmp_path, "all")
    assert (int(row["truth_voxels"]), int(row["missed"]), int(row["false"])) == (13500, 4500, 4500)
    touching = table(tmp_path, "gap")[0]
    assert float(touching["bin_low"]) == 0
    assert int(touching["missed"]) > 500
    perfect = run(tmp_path, truth + np.where(truth > 0, 5, 0).astype(np.uint32), truth, instances=("ink",))
    assert perfect.mean["ink/adapted_rand_error"] == 0
    assert table(tmp_path, "all")[0]["missed"] == table(tmp_path, "all")[0]["false"] == "0"
    found = partners(overlaps(merged, truth))
    assert (found.true.tolist(), found.predicted.tolist()) == ([70000], [4])
    assert partners(None).right(truth, merged).sum() == 0


def test_each_class_has_its_tables_and_suspects(tmp_path):
    truth = np.zeros((20, 50, 50), np.uint8)
    truth[4:8], truth[12:18, 5:40, 5:40] = 1, 2
    pred = truth.copy()
    pred[12:18, 5:40, 5:20] = 0
    run(tmp_path, pred, truth)
    classes = {row["class"] for row in rows_of(tmp_path / "out" / "diagnostics.csv")}
    assert len(classes) == 2
    (row,) = rows_of(tmp_path / "out" / "suspects.csv")
    assert (row["class"], row["kind"]) == (max(classes), "wrong_label")
    assert (tmp_path / "out" / "suspects" / "ink" / row["class"] / "a.zarr").is_dir()


def test_places_are_those_of_the_label_in_voxels_and_in_space(tmp_path):
    """A NIfTI label with an origin and turned axes."""
    truth = np.zeros((40, 36, 30), np.uint8)
    truth[10:20, 8:20, 6:16] = 1
    affine = np.array([[-2.0, 0, 0, 100], [0, 1.5, 0, -50], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    for part, values in (("found", np.zeros_like(truth)), ("data/labels", truth)):
        (tmp_path / part).mkdir(parents=True)
        volume = nibabel.Nifti1Image(values, affine)
        volume.header.set_xyzt_units("mm")
        nibabel.save(volume, tmp_path / part / "a_ink.nii.gz")
    evaluate(EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "data"), str(tmp_path / "out"), worst=0))
    (row,) = rows_of(tmp_path / "out" / "suspects.csv")
    assert [row[f"{end}_{axis}"] for axis in "zyx" for end in ("low", "high")] == [
        "6",
        "16",
        "8",
        "20",
        "10",
        "20",
    ]
    corners = affine @ [[9.5, 19.5], [7.5, 19.5], [5.5, 15.5], [1, 1]]
    for axis, (low, high) in zip("xyz", np.sort(corners[:3], axis=1)):
        assert float(row[f"physical_low_{axis}"]) == pytest.approx(low)
        assert float(row[f"physical_high_{axis}"]) == pytest.approx(high)
    assert row["unit"] == "mm"
    assert float(row["size"]) == pytest.approx(1200 * 9)


@pytest.mark.parametrize("what", ["no truth", "no prediction", "neither", "all ignored"])
def test_empty_and_ignored_volumes(tmp_path, what):
    full = np.zeros((16, 30, 30), np.uint8)
    full[4:9, 5:20, 5:20] = 1
    none = np.zeros_like(full)
    pred = none if what in ("no prediction", "neither") else full
    truth = none if what in ("no truth", "neither") else full
    # Beside a volume with something to score.
    write(tmp_path / "found" / "b_ink.tif", full)
    write(tmp_path / "data" / "labels" / "b_ink.tif", full)
    found = run(tmp_path, pred, truth, none if what == "all ignored" else None)
    (row,) = table(tmp_path, "all")
    suspects = rows_of(tmp_path / "out" / "suspects.csv")
    times = {"no truth": (1, 2), "no prediction": (2, 1)}.get(what, (1, 1))
    assert (int(row["truth_voxels"]), int(row["predicted_voxels"])) == tuple(n * full.sum() for n in times)
    kinds = {"no truth": ["missing_label"], "no prediction": ["wrong_label"]}.get(what, [])
    assert [(s["case"], s["kind"], s["reason"]) for s in suspects] == [("a", kind, "alone") for kind in kinds]
    assert found.diagnosis is not None
    assert "Evaluation" in (tmp_path / "out" / "report.html").read_text()


def test_a_later_evaluation_leaves_no_earlier_suspects_and_nothing_else_is_removed(tmp_path):
    truth = np.zeros((16, 30, 30), np.uint8)
    truth[4:9, 5:20, 5:20] = 1
    run(tmp_path, np.zeros_like(truth), truth)
    (tmp_path / "out" / "suspects" / "mine.zarr").mkdir()
    assert len(suspect_layers(tmp_path / "out" / "suspects.csv")) == 2
    run(tmp_path, truth, truth)
    assert suspect_layers(tmp_path / "out" / "suspects.csv") == []
    assert [path.name for path in (tmp_path / "out" / "suspects").rglob("*.*")] == ["mine.zarr"]


def test_it_can_be_left_out(tmp_path):
    truth = np.zeros((16, 30, 30), np.uint8)
    truth[4:9, 5:20, 5:20] = 1
    write(tmp_path / "found" / "a_ink.tif", np.zeros_like(truth))
    write(tmp_path / "data" / "labels" / "a_ink.tif", truth)
    command = [
        "evaluate",
        "-p",
        str(tmp_path / "found"),
        "-l",
        str(tmp_path / "data"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--no-diagnostics", "--quiet"]) == 0
    assert not (tmp_path / "out" / "suspects.csv").exists()
    assert "Where errors are" not in (tmp_path / "out" / "report.html").read_text()
    assert main([*command, "--quiet"]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Where errors are" in page
    assert "label may be wrong" in page
    assert "diagnostics" in page.partition("CPU seconds")[2][:200]
