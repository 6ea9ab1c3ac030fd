"""`volumen train --nproc N`: one message and one exit code for all processes; signals; a run that is resumed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from data_folders import shells, write_tiff_folder
from training_toys import same_weights

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.running.execution import run_guarded
from volumen.cli.running.processes import LastMessage, conclude
from volumen.utils import distributed
from volumen.utils.errors import VolumenError

KILLED, CLOSED = -signal.SIGKILL, -signal.SIGTERM
LOST = "RuntimeError: connection closed by peer"


@pytest.mark.parametrize(
    ("codes", "told", "code", "words"),
    [
        ({}, {}, 0, ""),
        # All make the same mistake.
        ({0: 2, 1: 2}, {0: LastMessage(1.1, 2, "b"), 1: LastMessage(1.0, 2, "a")}, 2, "a"),
        # One makes it, and the others miss it.
        (
            {0: 1, 1: 2},
            {0: LastMessage(1.1, 1, LOST), 1: LastMessage(1.0, 2, "no such file")},
            2,
            "no such file",
        ),
        ({0: CLOSED, 1: 2}, {1: LastMessage(1.0, 2, "no such file")}, 2, "no such file"),
        (
            {0: 1, 1: 1},
            {0: LastMessage(1.1, 1, LOST), 1: LastMessage(1.0, 1, "KeyError: 'a'")},
            1,
            "KeyError: 'a'",
        ),
        # One was killed; the other may have noticed before it was told to end.
        ({0: CLOSED, 1: KILLED}, {}, 1, "process 1 was ended by SIGKILL"),
        ({0: 1, 1: KILLED}, {0: LastMessage(1.0, 1, LOST)}, 1, f"(process 0: {LOST})"),
        # Signals that came to the processes alone.
        ({0: 143, 1: 143}, {}, 143, ""),
        ({0: CLOSED, 1: 143}, {}, 143, ""),
        (
            {0: 130, 1: 130},
            {0: LastMessage(1.0, 130, "stopped"), 1: LastMessage(1.1, 130, "stopped")},
            130,
            "stopped",
        ),
    ],
)
def test_the_cause_is_told_rather_than_its_consequences(codes, told, code, words):
    found, line = conclude(codes, told)
    assert found == code
    assert words in line
    assert bool(line) == bool(words)


def test_one_of_several_processes_leaves_its_line_to_the_parent(tmp_path, monkeypatch, capsys):
    from argparse import Namespace

    from volumen.cli.running.processes import _read

    def fail(options):
        raise VolumenError("here", "wrong")

    options = Namespace(verbose=False, quiet=False)
    monkeypatch.setenv("RANK", "3")
    assert run_guarded(fail, options) == 2
    assert capsys.readouterr().err == "volumen: error: here: wrong\n"  # torchrun's own processes
    monkeypatch.setenv("VOLUMEN_TOLD", str(tmp_path))
    assert run_guarded(fail, options) == 2
    assert capsys.readouterr().err == ""
    ((rank, told),) = _read(tmp_path).items()
    assert (rank, told.code, told.line) == (3, 2, "here: wrong")


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_what_all_processes_find_is_told_once(monkeypatch, capsys, rank, told):
    from argparse import Namespace

    def warn(options):
        logging.getLogger("volumen.data.layout").warning("no masks")
        return 0

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TQDM_DISABLE", "0")  # which it may set
    assert run_guarded(warn, Namespace(verbose=False, quiet=False)) == 0
    assert ("no masks" in capsys.readouterr().err) is told


def test_more_processes_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VolumenError, match=r"--nproc: expected at most 1, one process per GPU .*found 2"):
        distributed.initialize("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiff_folder(tmp_path_factory.mktemp("nproc") / "data", {"a": {"ink": shells((24, 24, 64))}})


SMALL = [
    "--patch-size", "16,16,16", "--workers", "0", "--device", "cpu",
    "--set", "model_config.features_per_stage=[4,8]",
]  # fmt: skip


def start(folder: Path, out: Path, *words: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "volumen.cli.main",
        "train",
        "-i",
        str(folder),
        "-o",
        str(out),
        "--nproc",
        "2",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "bundle"),
        "OMP_NUM_THREADS": "1",
        "VOLUMEN_CACHE": str(out.parent / "cache"),
    }
    return subprocess.Popen(
        [*command, *SMALL, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, list[str]]:
    text, _ = process.communicate(timeout=120)
    return process.returncode, text.splitlines()


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_mistake_is_one_line_and_exit_code_2(folder, tmp_path):
    code, lines = end(start(folder, tmp_path / "out", "--quiet", "--set", "tr_config.batch=3"))
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("volumen: error: settings: tr_config.batch: unknown key")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_once_and_says_so(folder, tmp_path, number, expected):
    process = start(folder, tmp_path / "out", "--steps-per-epoch", "3000", "--quiet")
    wait_for((tmp_path / "out" / "model" / "model_config.yaml").is_file, process)
    time.sleep(1)
    process.send_signal(number)
    code, lines = end(process)
    assert code == expected, lines
    assert (tmp_path / "out" / "model" / "model_interrupted.pth").is_file()
    assert sum("go on with --resume" in line for line in lines) == 1, lines
    assert not any("Error" in line or "Traceback" in line for line in lines), lines


def processes_of(parent: int) -> list[int]:
    """The training processes: the children of the launcher, which is the child of the command."""
    (launcher,) = children(parent)
    return [
        child
        for child in children(launcher)
        if b"volumen.cli.main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def children(parent: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_in_one_line(folder, tmp_path):
    process = start(folder, tmp_path / "out", "--steps-per-epoch", "3000", "--quiet")
    wait_for((tmp_path / "out" / "model" / "model_config.yaml").is_file, process)
    time.sleep(1)
    os.kill(max(processes_of(process.pid)), signal.SIGKILL)
    code, lines = end(process)
    assert code == 1
    told = [line for line in lines if line.startswith("volumen: error")]
    assert len(told) == 1, lines
    assert "was ended by SIGKILL" in told[0]
    assert not any("Traceback" in line for line in lines), lines


@pytest.mark.slow
def test_a_budget_s_run_stopped_within_an_epoch_equals_one_trained_from_its_snapshot(folder, tmp_path):
    """One choice, one snapshot, and an exact resume: the budget is not asked again."""
    words = ["--time-budget", "12s", "--seed", "3"]
    run = tmp_path / "out" / "model"
    process = start(folder, tmp_path / "out", *words)
    wait_for((run / "model_2.pth").is_file, process)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, lines = end(process)
    assert code == 143, lines
    assert sum("s/step" in line for line in lines) == 1, lines
    stopped = load_checkpoint(run / "model_interrupted.pth")
    assert 0 < stopped["sampler"]["batch"] <= stopped["epoch_length"]
    text = (run / "model_config.yaml").read_text()
    snapshot = yaml.safe_load(text)
    assert "on 2 x cpu" in snapshot["tr_config"]["time_budget_choice"]

    shutil.copy(run / "model_config.yaml", tmp_path / "settings.yaml")
    code, lines = end(start(folder, tmp_path / "out", *words, "--resume"))
    assert code == 0, lines
    assert any("keeps what it chose" in line for line in lines)
    assert (run / "model_config.yaml").read_text() == text
    code, lines = end(
        start(folder, tmp_path / "again", "--config-path", str(tmp_path / "settings.yaml"), "--seed", "3")
    )
    assert code == 0, lines
    again = tmp_path / "again" / "model"
    assert (run / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()
    last = snapshot["tr_config"]["max_epoch"]
    weights = [load_checkpoint(folder / f"model_{last}.pth")["model"] for folder in (run, again)]
    assert same_weights(*weights)
