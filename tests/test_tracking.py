"""MLflow by MONAI's `--tracking mlflow`: a local store, every curve under its own name, no network access."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT
from data_folders import shells, write_tiff_folder

from volumen.cli.main import main
from volumen.handlers.records.run_directory import RunDirectory
from volumen.handlers.records.tracking import adapt_tracking, stay_local, step_numbers

SETTINGS = [
    *("--tr_config#patch_size", "[16,16,16]", "--model_config#features_per_stage", "[4,8]"),
    *("--tr_config#max_steps_per_epoch", "2", "--tr_config#max_val_steps_per_epoch", "1"),
    *("--tr_config#num_dataloader_workers", "0", "--tr_config#amp", "off"),
]

# Runs MONAI's command and reports every address that the process looked up or connected to.
WATCHED = """
import runpy, sys
seen = []
sys.addaudithook(lambda name, args: seen.append(name) if name in ("socket.connect", "socket.getaddrinfo") else None)
try:
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
finally:
    print("CONNECTIONS", len(seen))
"""


def test_a_step_is_logged_with_every_loss():
    output = {"losses": {"loss": 1.5, "ink/SoftDiceLoss": 0.5}, "gradient_norm": None}
    assert step_numbers(output) == {"iteration/loss": 1.5, "iteration/ink/SoftDiceLoss": 0.5}
    assert step_numbers({**output, "gradient_norm": 2.0})["iteration/gradient_norm"] == 2.0


def test_other_handlers_are_left_alone(tmp_path):
    handler = object()
    adapt_tracking([handler], [handler], RunDirectory(tmp_path, "model"))


def test_usage_statistics_are_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    stay_local()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    stay_local()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_tracking_by_something_else_is_refused(tmp_path, capsys, monkeypatch):
    command = ["train", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "--tracking"]
    assert main([*command, "mlfow"]) == 2
    assert (
        "--tracking: expected mlflow, or a file of MONAI's settings, found 'mlfow'" in capsys.readouterr().err
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*command, "mlflow"]) == 2
    assert "mlflow is not installed; pip install 'volumen[mlflow]'" in capsys.readouterr().err


def _train(data: Path, cwd: Path, *words: str) -> str:
    command = [sys.executable, "-c", WATCHED, "run", "training", "--config_file"]
    command += [str(ROOT / "bundle/configs/train.yaml"), "--dataset_dir", str(data), "--output_dir", "out"]
    done = subprocess.run(
        [*command, "--device_name", "cpu", "--tracking", "mlflow", *SETTINGS, *words],
        cwd=cwd,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "PYTEST"))},
            "PYTHONPATH": str(ROOT / "bundle"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _read(store: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(store)) as database:
        return database.execute(query).fetchall()


@pytest.mark.slow
def test_a_run_is_tracked_in_a_local_store_and_goes_on_in_it(tmp_path):
    pytest.importorskip("mlflow")
    data = write_tiff_folder(tmp_path / "data", {"scroll": {"surface": shells((24, 24, 64))}})
    assert "CONNECTIONS 0" in _train(data, tmp_path, "--tr_config#max_epoch", "1")
    store = tmp_path / "out" / "mlruns.db"
    [(name, status, artifacts)] = _read(store, "select name, status, artifact_uri from runs")
    assert (name, status) == ("model", "FINISHED")
    assert (Path(artifacts.removeprefix("file://")) / "model_config.yaml").is_file()
    counts = dict(_read(store, "select key, count(*) from metrics group by key"))
    # The validation is logged once per epoch and separately from the training, the training once per step.
    assert counts["loss"] == counts["val/loss"] == counts["val/surface/dice"] == 1
    assert counts["iteration/loss"] == counts["iteration/surface/SoftDiceLoss"] == 2
    assert "mean_dice" not in counts

    # A run that was stopped is unfinished in the store; the resumed run continues the same record.
    with closing(sqlite3.connect(store)) as database:
        database.execute("update runs set status = 'RUNNING'")
        database.commit()
    _train(data, tmp_path, "--tr_config#max_epoch", "2", "--tr_setup#resume", "True")
    assert _read(store, "select name, status from runs") == [("model", "FINISHED")]
    assert _read(store, "select step from metrics where key = 'val/loss' order by step") == [(1,), (2,)]
