"""Reliability and precision-recall curves of the report: values by loops over voxels, and what is drawn of them."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from test_evaluate import write

from volumen.evaluation import cases as cases_module
from volumen.evaluation.comparison import compare
from volumen.evaluation.curves import (
    DRAWN_STEP,
    SIDE,
    STROKES,
    Line,
    figure,
    paired_figures,
    pooled,
    thinned,
)
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.metrics.probabilities import average_precision, precision_recall, probability_counts

SHAPE = (4, 16, 16)


def voxels(seed: int, sharp: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of bytes, float32, and truth."""
    rng = np.random.default_rng(seed)
    truth = rng.random(SHAPE) < 0.3
    noise = rng.normal(0, 1, SHAPE)
    values = 1 / (1 + np.exp(-(sharp * (2 * truth - 1) + noise)))
    return (np.round(values * 255) / 255).astype(np.float32), truth


@pytest.fixture
def folder(tmp_path):
    for n in range(3):
        values, truth = voxels(n)
        write(tmp_path / "found" / f"c{n}_ink.tif", values)
        write(tmp_path / "data" / "labels" / f"c{n}_ink.tif", truth.astype(np.uint8))
    return tmp_path


def run(folder, **settings):
    paths = (str(folder / name) for name in ("found", "data", "out"))
    return evaluate(EvaluateRequest(*paths, **{"metrics": ("ece", "average_precision"), **settings}))


def by_loops(values, truth):
    """Reliability rows by 15 bins, one voxel after the other."""
    bins = [[] for _ in range(15)]
    for value, positive in zip(values.ravel().tolist(), truth.ravel().tolist()):
        bins[min(int(value * 15 + 1e-6), 14)].append((value, positive))
    return [[*np.mean(found, axis=0), len(found)] for found in bins if found]


def test_files_hold_the_curves_of_all_voxels(folder):
    run(folder)
    pairs = [voxels(n) for n in range(3)]
    values, truth = (np.stack(part) for part in zip(*pairs))
    told = json.loads((folder / "out" / "metrics.json").read_text())["curves"]["ink"][""]
    np.testing.assert_allclose(told["reliability"], by_loops(values, truth), rtol=1e-6)
    for threshold, precision, recall in told["precision_recall"]:
        found = values >= threshold - 1e-6
        assert precision == pytest.approx((found & truth).sum() / found.sum())
        assert recall == pytest.approx((found & truth).sum() / truth.sum())
    rows = list(csv.DictReader((folder / "out" / "curves.csv").open()))
    filed = [row for row in rows if row["curve"] == "reliability"]
    np.testing.assert_allclose(
        [[float(row[name]) for name in ("mean_probability", "share_of_class", "voxels")] for row in filed],
        told["reliability"], rtol=1e-6,
    )  # fmt: skip
    filed = [row for row in rows if row["curve"] == "precision_recall"]
    assert len(filed) == len(told["precision_recall"])
    assert {row["mean_probability"] for row in filed} == {""}


def test_blocks_and_masks_change_nothing_and_something(folder, monkeypatch):
    run(folder)
    whole = (folder / "out" / "curves.csv").read_bytes()
    monkeypatch.setattr(cases_module, "PIECE_VOXELS", 200)
    monkeypatch.setattr(cases_module, "DERIVED_SIDE", 5)
    run(folder)
    by_blocks = list(csv.reader((folder / "out" / "curves.csv").open()))[1:]
    for one, two in zip(csv.reader(whole.decode().splitlines()[1:]), by_blocks, strict=True):
        numbers = ([float(cell or "nan") for cell in row[3:]] for row in (one, two))
        np.testing.assert_allclose(*numbers, rtol=1e-6)
    mask = np.zeros(SHAPE, np.uint8)
    mask[:2] = 1
    for n in range(3):
        write(folder / "data" / "masks" / f"c{n}_ink.tif", mask)
    run(folder)
    told = json.loads((folder / "out" / "metrics.json").read_text())["curves"]["ink"][""]
    assert sum(row[2] for row in told["reliability"]) == 3 * mask.sum()


def test_decided_labels_have_no_curves(folder):
    for n in range(3):
        write(folder / "found" / f"c{n}_ink.tif", voxels(n)[1].astype(np.uint8))
    assert run(folder).histograms == {}
    assert "<h2>Probabilities" not in (folder / "out" / "report.html").read_text()
    assert len((folder / "out" / "curves.csv").read_text().splitlines()) == 1


def points(text: str) -> np.ndarray:
    return np.array([[float(value) for value in pair.split(",")] for pair in text.split()]) / SIDE


def test_the_drawn_steps_enclose_the_average_precision():
    counts = probability_counts(*voxels(0))
    (line,) = figure("ink", [Line("all", counts)], 0.5)["lines"]
    steps = points(line["precision_recall"])
    area = np.trapezoid(1 - steps[:, 1], steps[:, 0])
    assert area == pytest.approx(average_precision(counts), abs=2 * DRAWN_STEP)
    assert line["average_precision"] == f"{average_precision(counts):.4f}"
    (mark,) = line["marks"]
    values, truth = voxels(0)
    found = values >= 0.5
    assert float(mark["x"]) / SIDE == pytest.approx((found & truth).sum() / truth.sum(), abs=1e-3)
    assert 1 - float(mark["y"]) / SIDE == pytest.approx((found & truth).sum() / found.sum(), abs=1e-3)
    dots = np.array([[float(dot["x"]) / SIDE, 1 - float(dot["y"]) / SIDE] for dot in line["dots"]])
    np.testing.assert_allclose(dots, np.array(by_loops(*voxels(0)))[:, :2], atol=1e-3)


def test_thinning_keeps_the_ends_and_moves_no_point_far():
    curve = precision_recall(probability_counts(*voxels(1)))
    for step in (0.002, 0.01, 0.1):
        kept = thinned(curve, step)
        assert kept[0].tolist() == curve[0].tolist()
        assert kept[-1].tolist() == curve[-1].tolist()
        near = np.abs(curve[:, None, 1:] - kept[None, :, 1:]).max(axis=2).min(axis=1)
        assert near.max() < step
    assert len(thinned(curve[:0], 0.1)) == 0


def test_a_class_without_a_voxel_and_a_threshold_without_one_are_drawn_empty():
    nothing = probability_counts(np.full(10, 0.25), np.zeros(10, bool))
    (line,) = figure("ink", [Line("all", nothing)], 0.5)["lines"]
    assert line["precision_recall"] == ""
    assert line["marks"] == []
    assert line["average_precision"] == "–"
    assert points(line["reliability"]).tolist() == [[0.25, 1.0]]


def test_models_are_drawn_over_the_cases_that_all_have():
    counts = {n: probability_counts(*voxels(n)) for n in range(4)}
    models = {
        "base": {"ink": {"": {"a": counts[0], "b": counts[1]}}},
        "new": {"ink": {"": {"b": counts[2], "c": counts[3]}}, "other": {"": {"b": counts[0]}}},
    }
    (drawn,) = paired_figures(models, 0.5)
    assert [line["average_precision"] for line in drawn["lines"]] == [
        f"{average_precision(counts[n]):.4f}" for n in (1, 2)
    ]
    assert len({(line["colour"], line["dashes"]) for line in drawn["lines"]}) == 2
    assert len(set(STROKES)) == len(STROKES)
    assert pooled({}, None) is None


def test_pages_have_a_line_per_model_and_names_stay_text(folder):
    for n in range(3):
        write(folder / "<b>new" / f"c{n}_ink.tif", voxels(n, 2.0)[0])
    run(folder)
    page = (folder / "out" / "report.html").read_text()
    # In both drawings a line for each of three cases and one for all.
    assert page.count("</title></polyline>") == 8
    assert page.count("class=thin") == 6
    assert "http" not in page
    request = EvaluateRequest("", str(folder / "data"), str(folder / "both"), metrics=("ece",))
    compare([str(folder / "found"), str(folder / "<b>new")], request)
    page = (folder / "both" / "report.html").read_text()
    assert page.count("</title></polyline>") == 4
    assert "<b>new" not in page
    names = re.findall(r"</i>(\S+): calibration error (\d\.\d{4})", page)
    assert [name for name, _ in names] == ["found", "&lt;b&gt;new"]
