"""The last and the best epoch are scored on the whole part when training ends, which changes nothing else."""

from __future__ import annotations

import csv
import json
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.main import main
from volumen.engines.evaluator import EvaluateStep
from volumen.handlers.final_scores import read_scores
from volumen.handlers.metric import KeyMetric
from volumen.handlers.validation import FINAL
from volumen.sharing.metadata import read_metrics
from volumen.utils.errors import VolumenError

EPOCHS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a data set of one volume with sparse labels."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    label = (rng.random((24, 48, 48)) < 0.02).astype(np.uint8)
    label[:, 10:20, 10:20] = 1
    image = (120 * label + rng.integers(0, 100, label.shape)).astype(np.uint8)
    for part, suffix, values in (("images", "", image), ("labels", "_ink", label)):
        (folder / part).mkdir()
        tifffile.imwrite(folder / part / f"a{suffix}.tif", values, metadata={"axes": "ZYX"})
    return folder


def train(data, out, *words, code=0):
    """Train a few epochs; return the run's folder."""
    command = ["train", "-i", str(data), "-o", str(out), "--device", "cpu", "--quiet", "--workers", "0"]
    command += [
        "--patch-size",
        "8,16,16",
        "--max-epochs",
        str(EPOCHS),
        "--steps-per-epoch",
        "2",
        "--amp",
        "off",
    ]
    command += ["--set", "model_config.features_per_stage=[4,8]"]
    assert main([*command, *words]) == code
    return out / "model"


def rows(run):
    """Return the scores of every epoch, without losses, by epoch."""
    return {
        int(row["epoch"]): {
            name.removeprefix("val/"): float(value)
            for name, value in row.items()
            if name.startswith("val/") and not name.startswith("val/loss") and value
        }
        for row in csv.DictReader((run / "metrics.csv").open())
    }


def weights(run, name):
    return load_checkpoint(run / f"model_{name}.pth")["model"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Return a run that validates on the whole part."""
    return train(data, tmp_path_factory.mktemp("whole"), "--set", "tr_config.max_val_steps_per_epoch=null")


@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_last_and_the_best_epoch_have_the_scores_of_everything(data, whole, tmp_path, decay):
    words = ["--set", f"tr_config.ema_decay={decay}"] if decay else []
    everything = (
        train(data, tmp_path / "all", *words, "--set", "tr_config.max_val_steps_per_epoch=null")
        if decay
        else whole
    )
    run = train(data, tmp_path / "drawn", *words, "--val-steps", "2")
    assert not (everything / "model_scores.json").exists()
    best = load_checkpoint(run / "model_best.pth")["epoch"]
    assert load_checkpoint(run / "model_best.pth")["best_metric_epoch"] == best
    scores = read_scores(run)
    assert set(scores) == {best, EPOCHS}
    for epoch, row in scores.items():
        assert row["scored"].endswith("all of the validation part")
        found = {name: value for name, value in row["metrics"].items() if not name.startswith("loss")}
        assert found == pytest.approx(rows(everything)[epoch], abs=1e-6)
        assert read_metrics(run, epoch) == found
        assert found != pytest.approx(rows(run)[epoch], abs=1e-6)
    # Neither the weights nor the checkpoints depend on it.
    assert all(
        torch.equal(a, b) for a, b in zip(weights(run, EPOCHS).values(), weights(everything, EPOCHS).values())
    )


def test_a_finished_run_is_scored_once_and_again_only_where_it_was_not(data, tmp_path, capsys):
    run = train(data, tmp_path, "--val-steps", "2")
    path = run / "model_scores.json"
    first = path.read_text()
    names = ["--val-steps", "2", "--resume"]
    path.write_text(json.dumps({key: {**row, "scored": "kept"} for key, row in json.loads(first).items()}))
    train(data, tmp_path, *names)
    assert "kept" in path.read_text()
    path.unlink()  # as after a run that was killed while it scored
    train(data, tmp_path, *names)
    assert json.loads(path.read_text()) == json.loads(first)
    path.write_text("{")
    train(data, tmp_path, *names)
    assert "cannot be read" in capsys.readouterr().err
    assert json.loads(path.read_text()) == json.loads(first)
    train(data, tmp_path, *names, "--max-epochs", str(EPOCHS + 1))
    assert EPOCHS + 1 in read_scores(run)


def test_a_signal_while_the_last_epoch_is_scored_leaves_it_to_the_resumed_run(data, tmp_path, monkeypatch):
    run = train(data, tmp_path / "whole", "--val-steps", "2")
    step = EvaluateStep.__call__

    def interrupted(self, engine, batch):
        if getattr(engine.state, FINAL, False):
            signal.raise_signal(signal.SIGTERM)
        return step(self, engine, batch)

    monkeypatch.setattr(EvaluateStep, "__call__", interrupted)
    stopped = train(data, tmp_path / "stopped", "--val-steps", "2", code=143)
    assert not (stopped / "model_scores.json").exists()
    assert not (stopped / "model_interrupted.pth").exists()  # the last epoch is saved
    monkeypatch.undo()
    train(data, tmp_path / "stopped", "--val-steps", "2", "--resume")
    assert read_scores(stopped) == read_scores(run)


def test_a_limit_for_the_last_and_the_best_epoch(data, tmp_path):
    run = train(data, tmp_path, "--val-steps", "2", "--set", "tr_config.final_val_steps=6")
    assert all(" of " in row["scored"] for row in read_scores(run).values())
    other = train(data, tmp_path / "same", "--val-steps", "2", "--set", "tr_config.final_val_steps=2")
    assert read_scores(other) == {}


@pytest.mark.parametrize(
    ("stated", "unit"),
    [
        ({}, "voxels"),
        ({"resolution": (0.5, 0.5), "metadata": {"axes": "ZYX", "spacing": 2.0, "unit": "um"}}, "µm"),
    ],
    ids=["no size", "micrometres"],
)
def test_surface_distances_are_logged_in_the_unit_of_the_voxel_size(data, tmp_path, capsys, stated, unit):
    words = [
        "--set",
        "tr_config.validation_metrics=[dice,hd95]",
        "--set",
        "tr_config.max_val_steps_per_epoch=1",
    ]
    folder = tmp_path / "data"
    for part, name in (("images", "a"), ("labels", "a_ink")):
        (folder / part).mkdir(parents=True)
        values = tifffile.imread(data / part / f"{name}.tif")
        extra = {"imagej": True, **stated} if stated else {"metadata": {"axes": "ZYX"}}
        tifffile.imwrite(folder / part / f"{name}.tif", values, **extra)
    train(folder, tmp_path, *words, "--verbose")
    said = [line for line in capsys.readouterr().err.splitlines() if "hd95 " in line]
    assert len(said) >= EPOCHS
    assert all(re.search(rf"hd95 [0-9.e+]+ {unit}", line) for line in said), said


def test_a_resumed_finished_run_names_its_metric(data, tmp_path, capsys):
    words = ["--val-steps", "2", "--set", "tr_config.key_metric=val/ink/iou", "--verbose"]
    command = [*words, "--set", "tr_config.val_every_n=1"]
    train(data, tmp_path, *command)
    first = [line for line in capsys.readouterr().err.splitlines() if "best epoch:" in line]
    train(data, tmp_path, *command, "--resume")
    again = [line for line in capsys.readouterr().err.splitlines() if "best epoch:" in line]
    assert "val/ink/iou" in first[0]
    assert first[0].split("best epoch:")[1] == again[0].split("best epoch:")[1]


def test_a_resumed_finished_run_names_the_default_metric(data, tmp_path, capsys):
    train(data, tmp_path, "--val-steps", "2")
    capsys.readouterr()
    train(data, tmp_path, "--val-steps", "2", "--resume", "--verbose")
    assert ", val/mean_dice " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("val/ink/dise", "val/ink/dice"), ("ink/dice", "val/ink/dice"), ("val/ink/hd59", None), ("loss", None)],
)
def test_a_key_metric_that_does_not_exist_is_refused_before_the_first_step(
    data, tmp_path, capsys, name, remedy
):
    train(data, tmp_path, "--set", f"tr_config.key_metric={name}", code=2)
    error = capsys.readouterr().err
    assert "tr_config.key_metric: expected one of val/ink/dice, val/ink/iou, val/mean_dice, val/loss" in error
    assert f"found '{name}'" in error
    assert remedy is None or remedy in error.split("found")[1]
    assert not (tmp_path / "model").exists()


def test_every_column_of_validation_may_be_the_key_metric(data, whole, tmp_path):
    columns = next(csv.reader((whole / "metrics.csv").open()))
    for name in [column for column in columns if column.startswith("val/")]:
        run = train(
            data,
            tmp_path / name.replace("/", "_"),
            "--max-epochs",
            "1",
            "--set",
            f"tr_config.key_metric={name}",
        )
        assert load_checkpoint(run / "model_best.pth")["best_metric"] is not None


def test_the_score_that_is_the_key_metric_is_measured(data, tmp_path):
    run = train(data, tmp_path, "--max-epochs", "1", "--set", "tr_config.key_metric=val/ink/b1_error@16")
    (row,) = csv.DictReader((run / "metrics.csv").open())
    best = load_checkpoint(run / "model_best.pth")["best_metric"]
    assert best == pytest.approx(float(row["val/ink/b1_error@16"]))
    assert "val/ink/b0_error@16" not in row


def test_a_key_metric_that_is_undefined_in_an_epoch_is_no_error():
    engine = SimpleNamespace(state=SimpleNamespace(metrics={"val/loss": 1.0}, key_metric="val/mean_dice"))
    assert KeyMetric("val/ink/hd95", names=["ink/hd95"]).value(engine) is None
    with pytest.raises(VolumenError, match="expected one of val/loss"):
        KeyMetric("val/ink/hd95").value(engine)
    assert KeyMetric(default="val/loss").resolve(engine) == "val/loss"
    assert KeyMetric("val/ink/dice", default="val/loss").resolve(engine) == "val/ink/dice"


@pytest.mark.slow
def test_two_processes_score_what_one_does(data, tmp_path):
    run = train(data, tmp_path, "--val-steps", "2", "--nproc", "2")
    path = run / "model_scores.json"
    together = read_scores(run)
    path.unlink()
    train(data, tmp_path, "--val-steps", "2", "--resume")
    alone = read_scores(run)
    assert together.keys() == alone.keys()
    for epoch, row in alone.items():
        assert together[epoch]["metrics"] == pytest.approx(row["metrics"], abs=1e-6)
