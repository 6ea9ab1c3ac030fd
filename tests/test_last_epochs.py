"""The average of the weights of the last epochs: against NumPy over checkpoints, and chosen only if better."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_folders import ball, write_tiff_folder
from ignite.engine import Engine

from volumen.checkpoints.file import load_checkpoint
from volumen.checkpoints.finetune import inference_weights
from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.handlers import last_epochs
from volumen.handlers.last_epochs import LastEpochs
from volumen.utils.errors import VolumenError

EPOCHS = 5
FLAGS = ["--device", "cpu", "--quiet", "--workers", "0", "--patch-size", "8,16,16", "--batch-size", "1"]
FLAGS += ["--steps-per-epoch", "2", "--amp", "off", "--set", "model_config.features_per_stage=[4,8]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    labels = {name: {"ball": ball((16, 24, 24), radius)} for name, radius in (("a", 0.3), ("b", 0.4))}
    return write_tiff_folder(tmp_path_factory.mktemp("data"), labels)


def train(folder, out, *words, epochs=EPOCHS, val=()):
    command = ["train", "-i", str(folder), "-o", str(out), *FLAGS, "--max-epochs", str(epochs)]
    assert main([*command, *(val or ("--val-volumes", "b")), *words]) == 0
    return out / "model"


def weights(path):
    return {name: value.numpy() for name, value in load_checkpoint(path)["model"].items()}


def mean_of(run, epochs):
    every = [weights(run / f"model_{epoch}.pth") for epoch in epochs]
    return {name: np.mean([one[name].astype(np.float64) for one in every], axis=0) for name in every[0]}


@pytest.mark.parametrize(("count", "first"), [("3", 3), ("0.4", 4), ("50", 1)])
def test_the_average_is_the_mean_of_the_checkpoints(folder, tmp_path, count, first):
    run = train(folder, tmp_path, "--set", f"tr_config.average_last={count}")
    content = load_checkpoint(run / "model_average.pth")
    assert content["averaged_epochs"] == list(range(first, EPOCHS + 1))
    expected = mean_of(run, range(first, EPOCHS + 1))
    for name, value in weights(run / "model_average.pth").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)
    assert not any(
        path.name.startswith("model_average") for path in train(folder, tmp_path / "off").iterdir()
    )


def chosen(run):
    """Return whether the best model is the average, and both values of the key metric."""
    best, average = load_checkpoint(run / "model_best.pth"), load_checkpoint(run / "model_average.pth")
    return (
        "averaged_epochs" in best,
        average["best_metric"],
        load_checkpoint(run / "model_5.pth")["best_metric"],
    )


def test_it_is_the_best_model_only_if_it_validates_better(folder, tmp_path, monkeypatch):
    words = ("--set", "tr_config.average_last=3", "--set", "tr_config.initial_lr=0.01")
    run = train(folder, tmp_path / "own", *words)
    is_average, value, best = chosen(run)
    assert is_average == (value > best)
    for name, shift in (("better", 1.0), ("worse", -1.0)):
        values = LastEpochs._values
        monkeypatch.setattr(
            LastEpochs,
            "_values",
            lambda self, engine, s=shift, v=values: (v(self, engine)[1] + s, v(self, engine)[1]),
        )
        run = train(folder, tmp_path / name, *words)
        monkeypatch.setattr(LastEpochs, "_values", values)
        assert chosen(run)[0] == (shift > 0)
        used = inference_weights(load_checkpoint(run / "model_best.pth"))
        average = weights(run / "model_average.pth")
        assert all(np.array_equal(used[key], average[key]) for key in average) == (shift > 0)


def test_its_score_is_that_of_volumen_evaluate(folder, tmp_path):
    run = train(folder, tmp_path, "--set", "tr_config.average_last=3", "--set", "tr_config.initial_lr=0.01")
    value = load_checkpoint(run / "model_average.pth")["best_metric"]
    out, report = tmp_path / "p", tmp_path / "r"
    predict = ["predict", "-i", str(folder / "images" / "b.tif"), "-m", str(run / "model_average.pth")]
    assert main([*predict, "-o", str(out), "--device", "cpu", "--amp", "off"]) == 0
    assert main(["evaluate", "-p", str(out), "-l", str(folder), "-o", str(report)]) == 0
    found = json.loads((report / "metrics.json").read_text())["mean"]["ball/dice"]
    assert found == pytest.approx(
        value, abs=0.02
    )  # predictions are stored in 8 bits, windows overlap otherwise


def test_a_resumed_run_ends_with_the_same_average(folder, tmp_path):
    words = ("--set", "tr_config.average_last=3")
    whole = train(folder, tmp_path / "whole", *words)
    part = train(folder, tmp_path / "part", *words, "--set", "tr_config.max_epoch=5", epochs=EPOCHS)
    for name in ("model_5.pth", "model_final.pth", "model_best.pth", "model_average.pth"):
        (part / name).unlink()
    part = train(folder, tmp_path / "part", *words, "--resume")
    a, b = weights(whole / "model_average.pth"), weights(part / "model_average.pth")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    # Resumed once more at its end nothing changes; with more epochs the average is that of the new end.
    part = train(folder, tmp_path / "part", *words, "--resume")
    assert all(np.array_equal(a[name], value) for name, value in weights(part / "model_average.pth").items())
    part = train(folder, tmp_path / "part", *words, "--resume", epochs=8)
    expected = mean_of(part, (6, 7, 8))
    for name, value in weights(part / "model_average.pth").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)


def test_with_a_moving_average_and_without_validation(folder, tmp_path):
    words = ("--set", "tr_config.average_last=2", "--set", "tr_config.ema_decay=0.9")
    run = train(folder, tmp_path / "ema", *words)
    content = load_checkpoint(run / "model_average.pth")
    assert "weight_average" not in content["handlers"]
    expected = mean_of(run, (4, 5))
    assert all(np.allclose(value, expected[n], atol=1e-6) for n, value in inference_weights(content).items())
    run = train(
        folder, tmp_path / "none", "--set", "tr_config.average_last=2", epochs=3, val=("--train-split", "1")
    )
    assert load_checkpoint(run / "model_average.pth")["averaged_epochs"] == [2, 3]
    assert not (run / "model_best.pth").exists()


def test_a_run_that_stops_early_has_no_average(caplog):
    checkpointer = SimpleNamespace(network=torch.nn.Linear(2, 2))
    handler = LastEpochs(checkpointer, None, 3)
    engine = Engine(lambda *_: None)
    handler.attach(engine)
    engine.state.max_epochs = 20
    with caplog.at_level("INFO", logger=last_epochs.__name__):
        for epoch in range(1, 6):
            engine.state.epoch = epoch
            handler._add(engine)
        handler._choose(engine)
    assert "this one has none" in caplog.text


@pytest.mark.parametrize("value", [1, 2.5, 0, -1, "some"])
def test_a_count_that_is_none(value):
    with pytest.raises(VolumenError, match=r"tr_config\.average_last: expected"):
        ConfigManager(tr_config={"average_last": value})
