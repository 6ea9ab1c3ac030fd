"""`volumen train --folds`: one command trains, predicts and goes on, whenever and however it was stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zarr
from data_folders import shells, write_tiff_folder

from volumen.checkpoints.file import load_checkpoint
from volumen.cli import folds
from volumen.cli.main import main

HERE = Path(__file__).parent
TINY = [
    "--patch-size", "8,8,8", "--set", "model_config.features_per_stage=[4, 8]", "--max-epochs", "2",
    "--steps-per-epoch", "2", "--val-steps", "2", "--workers", "0", "--batch-size", "1", "--device", "cpu",
    "--amp", "off",
]  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    return write_tiff_folder(tmp_path / "data", {name: {"ink": shells((16, 16, 20))} for name in "abcd"})


def words(root, out, *more, count=3):
    return ["train", "-i", str(root), "-o", str(out), "--folds", str(count), *TINY, *more]


def start(arguments, script="fold_command.py", **environment):
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, start_new_session=True
    )


def finish(process, code=0):
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code, said
    return said


def toy_log(out):
    return [line.split(maxsplit=2)[2] for line in (out / "model" / "toy.log").read_text().splitlines()]


def test_folds_are_trained_and_predicted_one_after_the_other(root, tmp_path):
    finish(start(words(root, tmp_path / "out", "--group-by", ".", "--time-budget", "1h")))
    done = toy_log(tmp_path / "out")
    names = [line.split()[1] for line in done]
    assert names == [f"fold_{n}" for n in range(3) for _ in range(3)]
    budgets = [int(line.split()[3].removesuffix("s")) for line in done if line.startswith("train ")]
    # An hour in three parts, less 5 % for the predictions; what one does not need is left for the others.
    assert budgets[0] == round(3600 / 3 * 0.95)
    assert budgets[0] <= budgets[1] <= budgets[2] <= 3600
    splits = json.loads((tmp_path / "out" / "model" / "splits.json").read_text())
    assert sorted(name for split in splits for name in split["val"]) == list("abcd")
    assert json.loads((tmp_path / "out" / "model" / "ensemble.json").read_text())["predicted"] == [0, 1, 2]
    said = finish(start(words(root, tmp_path / "out", "--group-by", ".", "--time-budget", "1h")))
    assert "3 of 3 folds are trained" in said
    assert toy_log(tmp_path / "out") == done


def test_several_at_once(root, tmp_path):
    finish(start(words(root, tmp_path / "out", "--nproc", "2", count=2), TOY_PAUSE="0.3"))
    done = toy_log(tmp_path / "out")
    assert {line.split()[1] for line in done[:2]} == {"fold_0", "fold_1"}
    assert (tmp_path / "out" / "model" / "fold_0.log").is_file()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_the_same_command_goes_on_after_a_stop_at_any_moment(root, tmp_path, number):
    out, rng = tmp_path / "out", random.Random(int(number))
    for _ in range(3):
        process = start(words(root, out), TOY_PAUSE="0.15")
        limit = time.monotonic() + 60
        while not (out / "model" / "toy.log").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is not None:
            break
        os.kill(process.pid, number)
        process.communicate(timeout=120)
        assert process.returncode != 0
    finish(start(words(root, out), TOY_PAUSE="0.01"))
    done = toy_log(out)
    for fold in range(3):
        assert f"trained fold_{fold}" in done
        # What was trained is never trained again.
        last = done.index(f"trained fold_{fold}")
        assert all(not line.startswith(f"train fold_{fold} ") for line in done[last:])
        assert (out / "model" / "out_of_fold" / f"fold_{fold}").is_file()


def test_a_killed_command_takes_its_processes_with_it(root, tmp_path):
    process = start(words(root, tmp_path / "out"), TOY_PAUSE="30")
    log, limit = tmp_path / "out" / "model" / "toy.log", time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < limit:
        time.sleep(0.01)
    child = int(log.read_text().split()[1])
    process.kill()
    process.wait()
    while time.monotonic() < limit:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process of the fold still runs")


def test_a_fold_that_fails_stops_the_command_with_its_code(root, tmp_path):
    said = finish(start(words(root, tmp_path / "out"), TOY_FAIL="fold_1"), code=7)
    assert "fold 1 of 3 failed; give the same command again to go on" in said
    assert [line for line in toy_log(tmp_path / "out") if "fold_2" in line] == []


def refused(capsys, arguments):
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_refused(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folds, "MEMBER", (sys.executable, str(HERE / "fold_toy.py")))
    out = tmp_path / "out"
    assert "--folds: expected at least 2, found 1" in refused(capsys, words(root, out, count=1))
    assert "--fold names one" in refused(capsys, words(root, out, "--fold", "0/3"))
    assert "names what validates" in refused(capsys, words(root, out, "--val-volumes", "a"))
    assert "at least 5 groups with labels" in refused(capsys, words(root, out, "--group-by", ".", count=5))
    assert "names one checkpoint" in refused(capsys, words(root, out, "--resume", "x.pth"))
    assert not list(out.glob("*/ensemble.json"))
    (out / "model").mkdir(exist_ok=True)
    (out / "model" / "mine.txt").write_text("")
    assert "holds other files, such as mine.txt" in refused(capsys, words(root, out))
    (out / "model" / "mine.txt").unlink()
    finish(start(words(root, out)))
    assert "started with another folds" in refused(capsys, words(root, out, count=2))
    assert "started with another tr_config.initial_lr" in refused(
        capsys, words(root, out, "--set", "tr_config.initial_lr=0.1")
    )


@pytest.mark.slow
def test_folds_that_were_killed_end_with_the_weights_and_predictions_of_those_that_were_not(root, tmp_path):
    def run(out):
        return [sys.executable, "-m", "volumen", *words(root, out, count=2)]

    subprocess.run(run(tmp_path / "whole"), check=True, stderr=subprocess.DEVNULL)
    rng = random.Random(0)
    for wait in (rng.uniform(6, 14), rng.uniform(12, 25), rng.uniform(15, 35)):
        process = subprocess.Popen(run(tmp_path / "killed"), stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.kill()
        process.wait()
    subprocess.run(run(tmp_path / "killed"), check=True, stderr=subprocess.DEVNULL)
    for number in range(2):
        path = Path("model", f"fold_{number}", f"fold_{number}_final.pth")
        one, two = (load_checkpoint(tmp_path / name / path)["model"] for name in ("whole", "killed"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    for name in "abcd":
        place = Path("model", "out_of_fold", f"{name}.zarr", "ink", "0")
        one, two = (zarr.open_array(tmp_path / n / place, mode="r")[...] for n in ("whole", "killed"))
        assert one.tobytes() == two.tobytes()
