"""Models side by side: paired differences, their intervals, their pages, and what does not compare."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import bootstrap
from test_evaluate import write

from volumen.cli.main import main
from volumen.evaluation.comparison import compare, model_names
from volumen.evaluation.differences import FEWEST, Comparison
from volumen.evaluation.html.compared_diagnostics import compared_sections
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.utils.errors import VolumenError

CASES = 8


def bars(length: int) -> np.ndarray:
    """A bar of some voxels, so that Dice against another bar is 2 min / (a + b)."""
    found = np.zeros((3, 6, 40), np.uint8)
    found[1, 3, :length] = 1
    return found


def dice(first: int, other: int) -> float:
    return 2 * min(first, other) / (first + other)


@pytest.fixture
def models(tmp_path):
    """Two models on eight cases; the second comes closer to the truth, by another amount each time."""
    for n in range(CASES):
        write(tmp_path / "data" / "labels" / f"c{n}_ink.tif", bars(20))
        write(tmp_path / "base" / "found" / f"c{n}_ink.tif", bars(8 + n))
        write(tmp_path / "new" / "found" / f"c{n}_ink.tif", bars(10 + n + n % 3))
    return tmp_path


def run(folder, *names: str, **settings) -> Comparison:
    paths = [str(folder / name / "found") for name in names]
    settings = {"metrics": ("dice", "hd95", "objects_true"), **settings}
    return compare(paths, EvaluateRequest("", str(folder / "data"), str(folder / "out"), **settings))


def test_differences_are_those_of_the_cases_by_hand_and_intervals_those_of_scipy(models):
    found = run(models, "base", "new").differences["new"]["ink/dice"]
    by_hand = {f"c{n}": dice(10 + n + n % 3, 20) - dice(8 + n, 20) for n in range(CASES)}
    assert found.cases == pytest.approx(by_hand)
    values = np.array(list(by_hand.values()))
    assert found.mean == pytest.approx(values.mean())
    assert found.other - found.first == pytest.approx(found.mean)
    reference = bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.interval == pytest.approx((reference.low, reference.high), abs=0.1 * np.ptp(values) / CASES)


def test_pairing_finds_what_the_separate_intervals_hide(models):
    """Cases differ more among themselves than the models do: the intervals of the means overlap."""
    comparison = run(models, "base", "new")
    low, high = (comparison.evaluations[name].interval["ink/dice"] for name in ("base", "new"))
    assert low[1] > high[0]
    assert comparison.verdict("new", "ink/dice") == "better"
    assert comparison.verdict("new", "ink/hd95") == "better"
    assert comparison.verdict("new", "ink/objects_true") == ""
    assert run(models, "new", "base").verdict("base", "ink/dice") == "worse"
    assert run(models, "new", "base").verdict("base", "ink/hd95") == "worse"


def test_equal_predictions_differ_by_nothing(models):
    for n in range(CASES):
        write(models / "copy" / "found" / f"c{n}_ink.tif", bars(8 + n))
    comparison = run(models, "base", "copy")
    assert set(comparison.differences["copy"]["ink/dice"].cases.values()) == {0.0}
    assert comparison.differences["copy"]["ink/dice"].interval == (0.0, 0.0)
    assert comparison.verdict("copy", "ink/dice") == "not shown"


def test_few_cases_name_no_better_model(models):
    for n in range(FEWEST - 1, CASES):
        (models / "new" / "found" / f"c{n}_ink.tif").unlink()
    comparison = run(models, "base", "new")
    assert len(comparison.differences["new"]["ink/dice"].cases) == FEWEST - 1
    assert comparison.verdict("new", "ink/dice") == "few cases"
    assert comparison.left_out["new"] == tuple(f"c{n}/ink" for n in range(FEWEST - 1, CASES))


def test_undefined_values_and_missing_cases_enter_neither_mean(models):
    """A case with an undefined value of one model would else shift the mean of the other."""
    write(models / "data" / "labels" / "c0_ink.tif", bars(0))
    write(models / "new" / "found" / "c0_ink.tif", bars(0))
    (models / "new" / "found" / "c1_ink.tif").unlink()
    comparison = run(models, "base", "new")
    found = comparison.differences["new"]["ink/dice"]
    assert sorted(found.cases) == [f"c{n}" for n in range(2, CASES)]
    assert found.first == pytest.approx(np.mean([dice(8 + n, 20) for n in range(2, CASES)]))


def test_each_model_has_the_report_it_has_alone(models):
    comparison = run(models, "base", "new")
    for name in ("base", "new"):
        request = EvaluateRequest(
            str(models / name / "found"),
            str(models / "data"),
            str(models / "alone"),
            metrics=("dice", "hd95", "objects_true"),
        )
        alone = evaluate(request)
        assert comparison.evaluations[name].cases == alone.cases
        own = json.loads((models / "out" / comparison.folders[name] / "metrics.json").read_text())
        assert own["mean"] == json.loads((models / "alone" / "metrics.json").read_text())["mean"]


def test_files_and_page_say_the_same(models):
    comparison = run(models, "base", "new")
    found = comparison.differences["new"]["ink/dice"]
    told = json.loads((models / "out" / "metrics.json").read_text())
    assert told["first"] == "base"
    assert told["differences"]["new"]["ink/dice"]["cases"] == found.cases
    assert told["differences"]["new"]["ink/dice"]["interval_95"] == list(found.interval)
    assert told["differences"]["new"]["ink/dice"]["verdict"] == "better"
    rows = list(csv.DictReader((models / "out" / "metrics.csv").open()))
    of_dice = {row["case"]: row for row in rows if row["score"] == "ink/dice"}
    assert float(of_dice["c3"]["difference"]) == pytest.approx(found.cases["c3"], rel=1e-5)
    assert float(of_dice["mean"]["low_95"]) == pytest.approx(found.interval[0], rel=1e-5)
    page = (models / "out" / "report.html").read_text()
    assert f"+{found.mean:.4f}" in page
    assert "http" not in page
    for folder in comparison.folders.values():
        assert f"href='{folder}/report.html'" in page
        assert (models / "out" / folder / "report.html").is_file()


def test_three_models_each_against_the_first_by_the_command(models, capsys):
    for n in range(CASES):
        write(models / "<third>" / "found" / f"c{n}_ink.tif", bars(20))
    words = [word for name in ("base", "new", "<third>") for word in ("-p", str(models / name / "found"))]
    options = ["-l", str(models / "data"), "-o", str(models / "out"), "--metrics", "dice"]
    assert main(["evaluate", *words, *options]) == 0
    printed = capsys.readouterr()
    assert "new minus base" in printed.out
    assert "<third> minus base" in printed.out
    page = (models / "out" / "report.html").read_text()
    assert "<third>" not in page
    assert "&lt;third&gt; minus base" in page


def test_a_lone_case_pairs_by_its_label_whatever_the_predictions_are_called(tmp_path):
    write(tmp_path / "data" / "labels" / "c_ink.tif", bars(20))
    for name, length in (("one_ink", 10), ("two_ink", 15)):
        write(tmp_path / f"{name}.tif", bars(length))
    paths = [str(tmp_path / f"{name}.tif") for name in ("one_ink", "two_ink")]
    comparison = compare(paths, EvaluateRequest("", str(tmp_path / "data"), str(tmp_path / "out")))
    (found,) = comparison.differences.values()
    assert found["ink/dice"].mean == pytest.approx(dice(15, 20) - dice(10, 20))
    assert found["ink/dice"].interval is None


def test_a_model_that_never_predicts_a_class_is_scored_by_it(tmp_path):
    """Files without a record: how many classes there are is known from the other model alone."""
    truth = np.zeros((4, 12, 12), np.uint8)
    truth[:, :4], truth[:, 4:8] = 1, 2
    write(tmp_path / "data" / "labels" / "c_ink.tif", truth)
    write(tmp_path / "full" / "c_ink.tif", truth)
    write(tmp_path / "less" / "c_ink.tif", (truth == 1).astype(np.uint8))
    paths = [str(tmp_path / name) for name in ("full", "less")]
    comparison = compare(paths, EvaluateRequest("", str(tmp_path / "data"), str(tmp_path / "out")))
    assert comparison.differences["less"]["ink/dice/2"].mean == pytest.approx(-1)
    assert comparison.differences["less"]["ink/dice/1"].mean == pytest.approx(0)


def test_what_does_not_compare_is_refused_in_a_line(models):
    with pytest.raises(VolumenError, match=r"predictions of different models, found .* twice"):
        run(models, "base", "base")
    write(models / "other" / "found" / "x_ink.tif", bars(4))
    write(models / "data" / "labels" / "x_ink.tif", bars(4))
    with pytest.raises(VolumenError, match=r"cases and targets of the first -p: c0/ink.* found x/ink"):
        run(models, "base", "other")
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"region": (slice(0, 2), slice(0, 6), slice(0, 40))}, "region of the label"),
        ({"ignore": 2}, "ignore label"),
        ({"kind": "instances"}, "kind of scores"),
        ({"labelled_only": True}, "labelled voxels"),
        ({"spacing": (2.0, 1.0, 1.0)}, "voxel size"),
    ],
)
def test_other_voxels_and_other_rules_are_refused(models, monkeypatch, change, line):
    from volumen.evaluation import comparison as module

    def pairs_of(request, find=module.find_pairs):
        pairs = find(request)
        second = "new" in request.predictions
        return replace(pairs, cases=[replace(case, **change) for case in pairs.cases]) if second else pairs

    monkeypatch.setattr(module, "find_pairs", pairs_of)
    with pytest.raises(VolumenError, match=line):
        run(models, "base", "new")


def test_models_are_named_by_what_tells_them_apart():
    assert model_names(["/a/base/found", "/a/new/found"]) == ["base", "new"]
    assert model_names(["/a/one.tif", "/a/two.tif"]) == ["one.tif", "two.tif"]
    assert model_names(["/a/x/1", "/b/x/1", "/b/y/1"]) == ["a/x", "b/x", "b/y"]
    assert len(set(model_names(["/x", "/y/x"]))) == 2


def test_recorded_models_that_derive_a_target_differently_compare_by_the_others(tmp_path):
    from test_evaluate_derived import TASKS, record, sheets

    labels = sheets()
    write(tmp_path / "data" / "labels" / "a_ink.tif", labels)
    values = {"sdt": (np.zeros((1, *labels.shape), np.float32), "distance")}
    labelled = {"ink": ((labels[None] > 0).astype(np.float32), "binary")}
    inside = {**TASKS, "sdt": {**TASKS["sdt"], "distance_type": "inside"}}
    for name, tasks in (("base", TASKS), ("same", TASKS), ("other", inside)):
        record(tmp_path / name / "found", "a", {**labelled, **values}, tasks)
    assert "sdt/mae" in run(tmp_path, "base", "same", metrics=None).differences["same"]
    with pytest.raises(VolumenError, match=r"derive sdt differently.*--targets"):
        run(tmp_path, "base", "other", metrics=None)
    compared = run(tmp_path, "base", "other", metrics=None, targets=("ink",)).differences["other"]
    assert compared["ink/dice"].mean == 0


def blobs(folder):
    """Two models of the same ball: one misses a cap of it, the other adds a ball elsewhere."""
    z, y, x = np.ogrid[:40, :40, :40]
    truth = ((z - 20) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 < 100).astype(np.uint8)
    cut, added = truth.copy(), truth.copy()
    cut[26:] = 0
    added[2:6, 2:6, 2:6] = 1
    for n in range(2):
        write(folder / "data" / "labels" / f"c{n}_ink.tif", truth)
        write(folder / "cut" / "found" / f"c{n}_ink.tif", cut)
        write(folder / "added" / "found" / f"c{n}_ink.tif", added)
    return truth, cut, added


def test_errors_by_geometry_are_side_by_side(tmp_path):
    truth, cut, added = blobs(tmp_path)
    comparison = run(tmp_path, "cut", "added", diagnostics=True)
    (section,) = compared_sections({n: found.diagnosis for n, found in comparison.evaluations.items()})
    missed, false = (truth > cut).sum() / truth.sum(), (added > truth).sum() / added.sum()
    assert section["totals"] == [
        {"name": "cut", "missed": f"{100 * missed:.3g} %", "false": "0 %"},
        {"name": "added", "missed": "0 %", "false": f"{100 * false:.3g} %"},
    ]
    titles = [figure["title"] for figure in section["figures"]]
    assert "missed by mean curvature, 1/voxel" in titles
    assert "false by thickness, voxels" in titles
    alone = comparison.evaluations["cut"].diagnosis.tallies["ink"][""].tables()["thickness"]
    drawn = next(figure for figure in section["figures"] if figure["title"].startswith("missed by thickness"))
    assert drawn["columns"] == ("true", "cut", "added")
    assert [row["range"] for row in drawn["rows"]] == ["19 or more", "not measured"]
    for row, cells in zip(alone, drawn["rows"], strict=False):
        rate = "–" if not row.truth_voxels else f"{100 * row.missed / row.truth_voxels:.3g} %"
        assert cells["cells"][:2] == [f"{row.truth_voxels:,}", rate]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "missed by thickness, voxels" in page
    assert page.count("<polyline") >= 2 * len(titles)


def test_errors_by_geometry_of_other_cases_are_not_compared(tmp_path):
    blobs(tmp_path)
    (tmp_path / "added" / "found" / "c1_ink.tif").unlink()
    comparison = run(tmp_path, "cut", "added", diagnostics=True)
    assert compared_sections({n: found.diagnosis for n, found in comparison.evaluations.items()}) == []
    assert run(tmp_path, "cut", "added", diagnostics=False).evaluations["cut"].diagnosis is None
