"""Faults of the environment: each has a clear message, no older data are lost, and the run can be resumed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ignite.engine import Events
from toy_process import ToyProcess
from training_toys import ToyData, make_trainer, same_weights, weights

from volumen.checkpoints.file import load_checkpoint
from volumen.handlers.faults import explain
from volumen.handlers.records.logs import TensorBoardLog
from volumen.utils.errors import VolumenError


class Failing(ToyData):
    """A data set that fails at one sample."""

    def __init__(self, at: tuple[int, int], act) -> None:
        super().__init__(8)
        self.at = at
        self.act = act

    def __getitem__(self, key):
        if key == self.at:
            self.act()
        return super().__getitem__(key)


def damaged_chunk() -> None:
    raise VolumenError("images/a.zarr", "chunk 0.0.0 is damaged", remedy="write it anew")


def vanished() -> None:
    Path("/nowhere/images/a.tif").read_bytes()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("act", "workers", "message"),
    [
        (damaged_chunk, 0, r"^images/a\.zarr: chunk 0\.0\.0 is damaged; write it anew$"),
        (damaged_chunk, 1, r"^images/a\.zarr: chunk 0\.0\.0 is damaged; write it anew$"),
        (vanished, 1, r"^reading data: FileNotFoundError: .*'/nowhere/images/a\.tif'; bring the file back"),
        # The data loader checks for dead workers every five seconds.
        pytest.param(
            die,
            1,
            r"^tr_config\.num_dataloader_workers: a worker process died .*; use fewer workers",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_trouble_with_data_is_one_line_and_costs_an_epoch_at_most(tmp_path, act, workers, message):
    with pytest.raises(VolumenError, match=message) as caught:
        make_trainer(tmp_path / "out", data=Failing((1, 3), act), workers=workers).run()
    assert "\n" not in str(caught.value)
    resumed = make_trainer(tmp_path / "out", resume=True)
    resumed.run()
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    assert same_weights(weights(whole), weights(resumed))


def test_other_errors_stay_what_they_are():
    error = RuntimeError("DataLoader is a nice word")
    assert explain(error) is error


def test_the_clock_does_not_matter(tmp_path, monkeypatch):
    """The clock jumps back by a year in the middle of training."""
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    jumping = make_trainer(tmp_path / "jumping")
    now = time.time

    def jump(engine):
        monkeypatch.setattr(time, "time", lambda: now() - 3e7)

    jumping.add_event_handler(Events.EPOCH_COMPLETED(once=1), jump)
    jumping.add_event_handler(Events.ITERATION_COMPLETED(once=9), lambda engine: engine.terminate())
    jumping.run()
    resumed = make_trainer(tmp_path / "jumping", resume=True)
    resumed.run()
    assert same_weights(weights(whole), weights(resumed))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL at 30 random moments of one run, with changing worker counts."""
    epochs, length = 6, 8
    whole = make_trainer(tmp_path / "whole", epochs=epochs, length=length, ema=0.9)
    whole.run()
    rng = random.Random(0)
    for number in range(30):
        process = ToyProcess(
            tmp_path / "out",
            delay=0.01,
            epochs=epochs,
            length=length,
            ema=0.9,
            workers=rng.choice([0, 1]),
            # After a kill before the first checkpoint nothing can be resumed, and `resume` starts from the beginning.
            resume=True if number else None,
        )
        time.sleep(rng.uniform(0.05, 0.6))
        process.kill(signal.SIGKILL)
        code, errors = process.finish()
        assert code in (-signal.SIGKILL, 0), errors
        for path in (tmp_path / "out" / "toy").glob("toy_*.pth"):
            load_checkpoint(path)  # every existing file is complete
    resumed = make_trainer(tmp_path / "out", epochs=epochs, length=length, ema=0.9, resume=True)
    resumed.run()
    assert same_weights(weights(whole), weights(resumed))
    for name in ("metrics.csv", "toy_config.yaml"):
        assert (tmp_path / "whole" / "toy" / name).read_bytes() == (
            tmp_path / "out" / "toy" / name
        ).read_bytes()
    assert sorted(path.name for path in (tmp_path / "whole" / "toy").iterdir()) == sorted(
        path.name for path in (tmp_path / "out" / "toy").iterdir()
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("tensorboard", [False, True])
def test_full_disk_stops_with_a_message_and_loses_nothing(small_disk, tensorboard):
    trainer = make_trainer(small_disk, epochs=40, length=2)
    if tensorboard:
        TensorBoardLog(trainer.toy_directory, trainer.optimizer, every=1).attach(trainer)
    (small_disk / "ballast").write_bytes(bytes(250_000))
    with pytest.raises(
        VolumenError, match=r"the disk is full, toy_\d+\.pth was not written; free space and go on"
    ):
        trainer.run()
    saved = sorted((small_disk / "toy").glob("toy_*.pth"))
    assert saved
    last = max(load_checkpoint(path)["epoch"] for path in saved)
    assert not [path for path in (small_disk / "toy").iterdir() if path.name.endswith(".tmp")]
    (small_disk / "ballast").unlink()
    resumed = make_trainer(small_disk, epochs=last + 2, length=2, keep=2, resume=True)
    resumed.run()
    assert resumed.state.epoch == last + 2


@pytest.mark.slow
def test_a_read_only_disk_is_reported(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(VolumenError, match=r"cannot be written \(Read-only file system\)"):
        make_trainer(small_disk).run()
