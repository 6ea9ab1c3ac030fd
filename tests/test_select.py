"""Runs, ensembles and augmentation compared on what they have not seen, and what a prediction takes of the choice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from data_folders import shells, write_tiff_folder

from volumen.cli.main import main
from volumen.data.sampling.split import Split
from volumen.inference.predictor import load_predictor
from volumen.inference.record.reproduce import provenance_of
from volumen.tuning.candidates import Member, Run, common_regions, load_runs, make_candidates
from volumen.tuning.held_out import experiment_of, held_out_regions
from volumen.tuning.out_of_fold import predict_out_of_fold
from volumen.utils.errors import VolumenError

SMALL = [
    "--patch-size", "8,8,8", "--set", "model_config.features_per_stage=[4, 8]",
    "--steps-per-epoch", "2", "--val-steps", "2", "--workers", "0", "--batch-size", "1",
    "--device", "cpu", "--amp", "off", "--quiet",
]  # fmt: skip


def train(root, out, name, *words):
    words = ["train", "-i", str(root), "-o", str(out), "--model-name", name, *SMALL, *words]
    assert main(words) == 0
    return out / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folds as `volumen train --folds 2` leaves them, and a single run on the first fold's training part."""
    folder = tmp_path_factory.mktemp("select")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOLUMEN_CACHE", str(folder / "cache"))
        root = write_tiff_folder(folder / "data", {name: {"ink": shells((16, 16, 20))} for name in "abcd"})
        splits = [{"train": ["a", "b"], "val": ["c", "d"]}, {"train": ["c", "d"], "val": ["a", "b"]}]
        (folder / "splits.json").write_text(json.dumps(splits))
        chosen = ["--split", str(folder / "splits.json"), "--fold"]
        for number in range(2):
            train(root, folder / "cv", f"fold_{number}", "--max-epochs", "1", *chosen, f"{number}/2")
        (folder / "cv" / "ensemble.json").write_text(json.dumps({"members": ["fold_0", "fold_1"]}))
        train(root, folder, "single", "--max-epochs", "3", *chosen, "0/2")
    return folder


def test_out_of_fold_predictions_are_those_of_the_network_that_has_not_seen_the_image(runs, tmp_path):
    for number, names in enumerate(("cd", "ab")):
        member = runs / "cv" / f"fold_{number}"
        paths = predict_out_of_fold(member, tmp_path / "oof", "cpu")
        assert [path.name for path in paths] == [f"{name}.zarr" for name in names]
        for path in paths:
            assert provenance_of(path)["model"]["path"] == str(member / f"fold_{number}_best.pth")
    alone = ["predict", "-m", str(runs / "cv" / "fold_1"), "-i", str(runs / "data" / "images" / "a.tif"),
             "-o", str(tmp_path / "a.zarr"), "--dtype", "float16", "--device", "cpu", "--quiet"]  # fmt: skip
    assert main(alone) == 0
    values = [
        zarr.open_array(p / "ink" / "0", mode="r")[...]
        for p in (tmp_path / "oof" / "a.zarr", tmp_path / "a.zarr")
    ]
    assert values[0].tobytes() == values[1].tobytes()
    # A second call finds all of it done.
    before = (tmp_path / "oof" / "a.zarr" / "zarr.json").stat().st_mtime_ns
    predict_out_of_fold(runs / "cv" / "fold_1", tmp_path / "oof", "cpu")
    assert (tmp_path / "oof" / "a.zarr" / "zarr.json").stat().st_mtime_ns == before


def test_the_choice_is_the_best_score_and_prediction_takes_it(runs, tmp_path, capsys):
    out = tmp_path / "choice"
    words = ["select", str(runs / "cv"), str(runs / "single"), "-o", str(out), "--device", "cpu", "--quiet"]
    assert main(words) == 0
    found = json.loads((out / "selection.json").read_text())
    assert len((out / "selection.csv").read_text().splitlines()) == 7
    means = [entry["mean"] for entry in found["candidates"]]
    assert means == sorted(means, reverse=True)
    names = {entry["name"] for entry in found["candidates"]}
    assert names == {n + t for n in ("cv", "single", "cv + single") for t in ("", ", tta mirror")}
    # The single run has seen a and b, so the common part is c and d.
    assert all(set(entry["cases"]) == {"c", "d"} for entry in found["candidates"])
    chosen = found["candidates"][0]
    assert (
        len(found["members"])
        == chosen["networks"]
        == {"cv": 2, "single": 1}.get(chosen["name"].split(",")[0], 3)
    )
    assert chosen["difference_to_chosen"] is None
    image = str(runs / "data" / "images" / "a.tif")
    assert (
        main(["predict", "-m", str(out), "-i", image, "-o", str(tmp_path / "p.zarr"), "--device", "cpu"]) == 0
    )
    recipe = provenance_of(tmp_path / "p.zarr")
    assert recipe["tta"] == found["inference_config"]["tta"]
    assert len(recipe["model"].get("members", [1])) == chosen["networks"]
    assert recipe["threshold"] == found["inference_config"].get("threshold")
    capsys.readouterr()
    assert main(words) == 2
    assert "exists already; give another -o, or --overwrite" in capsys.readouterr().err


def test_the_score_of_a_candidate_is_that_of_evaluate(runs, tmp_path):
    """Without augmentation and cleaning the single run's score is what `volumen evaluate` says of its prediction."""
    out = tmp_path / "choice"
    words = ["select", str(runs / "single"), "-o", str(out), "--device", "cpu", "--quiet"]
    assert main([*words, "--tta", "none", "--no-postprocess", "--score", "iou"]) == 0
    (entry,) = json.loads((out / "selection.json").read_text())["candidates"]
    for name in "cd":
        image = str(runs / "data" / "images" / f"{name}.tif")
        words = [
            "predict",
            "-m",
            str(runs / "single"),
            "-i",
            image,
            "-o",
            str(tmp_path / "p" / f"{name}.zarr"),
        ]
        assert main([*words, "--dtype", "float16", "--device", "cpu", "--quiet"]) == 0
    report = tmp_path / "report"
    assert (
        main(["evaluate", "-p", str(tmp_path / "p"), "-l", str(runs / "data"), "-o", str(report), "--quiet"])
        == 0
    )
    cases = json.loads((report / "metrics.json").read_text())["cases"]
    assert entry["cases"] == pytest.approx({name: cases[name]["ink/iou"] for name in "cd"})
    assert np.isfinite(entry["mean"])


def test_runs_without_a_common_part(runs, capsys):
    words = ["select", str(runs / "cv" / "fold_1"), str(runs / "single"), "--device", "cpu", "--quiet"]
    assert main(words) == 2
    assert "no validation voxel in common" in capsys.readouterr().err
    assert main([*words[:2], "--tta", "twice", "--device", "cpu"]) == 2
    assert "--tta: expected among none, mirror, rotate, found twice" in capsys.readouterr().err
    assert main(["select", str(runs / "single"), str(runs / "single"), "--device", "cpu"]) == 2
    assert "the same run is given twice" in capsys.readouterr().err


def fake(name, train, val):
    box = lambda a, b: ((a, b), (0, 8))  # noqa: E731
    parts = [{n: [box(*span) for span in spans] for n, spans in part.items()} for part in (train, val)]
    split = Split(*parts, 0.8, 0)
    return Run(name, name, (Member(None, split, None),))


def test_regions_that_no_network_of_a_candidate_has_seen():
    whole, half = fake("w", {"a": [(0, 16)]}, {"b": [(0, 16)]}), fake("h", {"b": [(0, 8)]}, {"b": [(8, 16)]})
    assert common_regions([whole]) == [("b", ((0, 16), (0, 8)))]
    # The first has not seen all of b, the other has not seen its second half.
    assert common_regions([whole, half]) == [("b", ((8, 16), (0, 8)))]
    with pytest.raises(VolumenError, match="no validation voxel in common"):
        common_regions([whole, fake("x", {"b": [(0, 16)]}, {"a": [(0, 16)]})])
    folds = Run("f", "f", (*whole.members, *half.members))
    assert folds.unseen_by("b", ((8, 16), (0, 8))) == folds.members
    assert folds.unseen_by("a", ((0, 16), (0, 8))) == half.members
    assert [c.name for c in make_candidates([whole, half], ["none", "mirror"])] == [
        "w", "h", "w + h", "w, tta mirror", "h, tta mirror", "w + h, tta mirror",
    ]  # fmt: skip


def test_held_out_regions_are_found_by_the_checkpoint_alone(runs):
    checkpoint = runs / "single" / "single_best.pth"
    config = experiment_of(load_predictor(checkpoint))
    regions = held_out_regions(config, config.split)
    (run,) = load_runs([str(runs / "single")], "cpu")
    assert run.members[0].patches == 3 * 2 * 1
    assert {region.name for region in regions} <= set("abcd")
    other = Split({}, {"z": [((0, 4),) * 3]}, 0.8, 0)
    with pytest.raises(VolumenError, match="the images of the validation part, such as z"):
        held_out_regions(config, other)
    wrong = Split({}, {"a": [((0, 400),) * 3]}, 0.8, 0)
    with pytest.raises(VolumenError, match="as it was when the run began"):
        held_out_regions(config, wrong)
