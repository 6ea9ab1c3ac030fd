"""The page of a selection, and fused heads as a candidate of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_folders import shells, write_tiff_folder
from test_fusion_run import configured

from volumen.cli.main import main
from volumen.evaluation.differences import Difference
from volumen.inference.ensemble import load_model
from volumen.run import run_bundle
from volumen.tuning.selection import Entry, Selection
from volumen.tuning.selection_report import render_selection


class Cells(HTMLParser):
    """The text of every table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th") or (self._open and tag == "small")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def network(patches):
    return SimpleNamespace(patches=patches)


def entry(name, cases, *, members=(10,), difference=None, interval=None, passes=1, settings=None):
    run = SimpleNamespace(name=name, path=name, members=[network(patches) for patches in members])
    candidate = SimpleNamespace(name=name, runs=(run,), members=run.members)
    mean = sum(cases.values()) / len(cases)
    evaluation = SimpleNamespace(
        mean={"ink/dice": mean},
        interval={"ink/dice": interval},
        cases={case: {"ink/dice": value} for case, value in cases.items()},
    )
    return Entry(candidate, settings or {"threshold": 0.5}, evaluation, difference, passes, sum(members))


def selection(*entries):
    subject = SimpleNamespace(key="ink/dice", smaller=False, default={"threshold": 0.5})
    return Selection(subject, 2, entries, Path("out/selection.json"))


def less(mean, interval):
    return Difference(0.0, 0.0, mean, interval, {})


BEST = entry("a<b>", {"x": 0.8, "y": 0.6}, members=(40, 40), interval=(0.6, 0.8), settings={"threshold": 0.4})


def test_the_table_has_a_row_per_candidate_with_its_numbers():
    other = entry("single", {"x": 0.7, "y": 0.5}, members=(80,), difference=less(-0.1, (-0.15, -0.05)))
    page = render_selection(selection(BEST, other))
    rows = {row[0]: row[1:] for row in Cells(page).rows if row and len(row) > 5}
    assert rows["a<b>"] == ["0.7000", "0.6000 to 0.8000", "", "–", "–", "2", "1", "80", "threshold 0.4"]
    assert rows["single"] == ["0.6000", "–", "", "-0.1000", "-0.1500 to -0.0500", "1", "1", "80", "default"]
    assert ["a<b>", "0.8000", "0.6000"] in Cells(page).rows
    assert "<b>" not in re.sub(r"<b style", "", page.split("</style>")[-1])  # a name is no markup
    assert "One network trained as long as the folds together: single." in page
    assert "the difference is clear" in page


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (entry("s", {"x": 0.7, "y": 0.6}, difference=less(-0.05, (-0.1, 0.02))), "may be chance"),
        (entry("s", {"x": 0.7, "y": 0.6}, difference=less(-0.05, None)), "too few regions for an interval"),
        (entry("s", {"x": 0.8, "y": 0.6}, passes=8), "needs 8 forward passes per window instead of 1"),
        (None, "it is the only candidate"),
    ],
)
def test_the_reason_of_the_choice(other, words):
    found = selection(BEST, *([other] if other else []))
    assert words in found.reason()
    page = render_selection(found)
    assert words in page
    assert "No candidate is one network trained as long as the folds together" in page


def test_a_network_that_was_trained_as_long():
    assert [run.name for run in selection(BEST, entry("s", {"x": 0.1}, members=(72,))).as_long] == ["s"]
    assert not selection(BEST, entry("s", {"x": 0.1}, members=(71,))).as_long
    assert not selection(entry("s", {"x": 0.1}, members=(72,))).as_long  # there are no folds


@pytest.mark.parametrize("fused_is_better", [True, False])
def test_fused_heads_are_a_candidate(tmp_path, monkeypatch, fused_is_better):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    data = write_tiff_folder(tmp_path / "data", {"scroll": {"surface": shells((24, 24, 64))}})
    config = configured(data, tmp_path / "out")
    run_bundle("train.yaml", (), {"config": config})
    run, out = config.run_dir, tmp_path / "choice"
    select = [
        "select",
        str(run),
        "-o",
        str(out),
        "--tta",
        "none",
        "--no-postprocess",
        "--device",
        "cpu",
        "--quiet",
    ]
    if not fused_is_better:
        select += ["--score", "hd95"]
    assert main(select) == 0
    content = json.loads((out / "selection.json").read_text())
    names = {entry["name"]: entry["mean"] for entry in content["candidates"]}
    assert set(names) == {run.name, f"{run.name}, fused heads"}
    chosen = content["candidates"][0]["name"].endswith("fused heads")
    assert content["inference_config"]["fuse"] is chosen
    assert "fused heads" in (out / "selection.html").read_text()
    # Each score is that of a prediction with or without the rule, by the network that the choice loads.
    assert bool(load_model(out, fuse=None).fused) is chosen
    for fuse in ("true", "false"):
        split = json.loads(next(run.glob("*_split.json")).read_text())
        (box,) = split["val"]["scroll"]
        place = ",".join(f"{a}:{b}" for a, b in box)
        predicted, report = tmp_path / f"p_{fuse}", tmp_path / f"r_{fuse}"
        flag = [] if fuse == "true" else ["--no-fuse"]
        assert main(["predict", "-m", str(run), "-i", str(data / "images" / "scroll.tif"), "-o", str(predicted),
                     "--region", place, "--device", "cpu", "--amp", "off", "--quiet", *flag]) == 0  # fmt: skip
        score = "hd95" if not fused_is_better else "dice"
        assert main(["evaluate", "-p", str(predicted), "-l", str(data), "-o", str(report), "--targets", "surface",
                     "--metrics", score, "--quiet"]) == 0  # fmt: skip
        mean = json.loads((report / "metrics.json").read_text())["mean"][f"surface/{score}"]
        name = run.name + (", fused heads" if fuse == "true" else "")
        assert names[name] == pytest.approx(mean, rel=1e-3)
