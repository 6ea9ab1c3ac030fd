"""A signal finishes the step and saves, and the resumed run equals the uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ignite.engine import Events
from toy_process import ToyProcess
from training_toys import make_trainer, same_weights, weights

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.running.launch import run_passing_signals
from volumen.utils.errors import VolumenError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the weights and metrics of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(out, epochs=2)
    trainer.run()
    return weights(trainer), (out / "toy" / "metrics.csv").read_bytes()


def check_resumed(out: Path, whole) -> None:
    """Resume and compare with the uninterrupted run."""
    trainer = make_trainer(out, epochs=2, resume=True)
    trainer.run()
    assert same_weights(weights(trainer), whole[0])
    assert (out / "toy" / "metrics.csv").read_bytes() == whole[1]
    assert sorted(path.name for path in (out / "toy").iterdir()) == [
        "metrics.csv",
        "toy_1.pth",
        "toy_2.pth",
        "toy_best.pth",
        "toy_config.yaml",
        "toy_final.pth",
    ]


@pytest.mark.parametrize(
    ("number", "step", "workers"),
    [(signal.SIGINT, 2, 0), (signal.SIGTERM, 6, 1), (signal.SIGINT, 4, 0), (signal.SIGINT, 2, 2)],
    ids=["first epoch", "second epoch, worker", "last step of the first epoch", "two workers"],
)
def test_signal_saves_and_resumes_exactly(tmp_path, whole, number, step, workers):
    process = ToyProcess(tmp_path / "out", delay=0.15, epochs=2, workers=workers)
    process.wait_for_step(step)
    process.kill_group(number)
    code, errors = process.finish()
    assert code == 128 + number, errors
    assert "go on with --resume" in errors
    run = tmp_path / "out" / "toy"
    # On a busy machine the signal may come so late that the epoch's own checkpoint has the step.
    late = step == 4 and not (run / "toy_interrupted.pth").exists()
    saved = load_checkpoint(run / ("toy_1.pth" if late else "toy_interrupted.pth"))
    assert step <= saved["iteration"] <= step + 1
    check_resumed(tmp_path / "out", whole)


@pytest.mark.slow
def test_workers_outlive_a_step_that_takes_longer_than_a_moment(tmp_path, whole):
    """On a busy machine the last batch can come seconds after the signal, which every process received."""
    process = ToyProcess(tmp_path / "out", delay=2.5, epochs=2, workers=1, accumulation=2)
    process.wait_for_step(1)
    process.kill_group(signal.SIGTERM)
    code, errors = process.finish()
    assert code == 143, errors
    assert load_checkpoint(tmp_path / "out" / "toy" / "toy_interrupted.pth")["iteration"] == 2


def test_a_worker_ends_when_its_trainer_is_gone(tmp_path):
    process = ToyProcess(tmp_path / "out", delay=0.1, workers=1, epochs=2)
    process.wait_for_step(2)
    workers = [
        int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    process.kill(signal.SIGKILL)
    process.finish()
    wait_for(lambda: not any(_alive(worker) for worker in workers))


_kept: list = []


def _fail(out):
    def stop():
        raise VolumenError("here", "stop")

    trainer = make_trainer(out, workers=2, epochs=1, stop_on_signal=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
    _kept.append(trainer)  # as a traceback does, which also holds the workers
    with pytest.raises(VolumenError):
        trainer.run()


def test_workers_end_at_once_when_training_ended_in_an_error(tmp_path):
    """At exit Python sends them SIGTERM and waits for them; they must then not wait for `WORKER_GRACE`."""
    process = multiprocessing.get_context("fork").Process(target=_fail, args=(tmp_path / "out",))
    process.start()
    process.join(40)
    assert process.exitcode == 0


def _alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended without being waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("ema", [None, 0.9])
def test_signal_during_validation(tmp_path, whole, ema):
    process = ToyProcess(tmp_path / "out", epochs=2, validation_delay=0.8, ema=ema)
    process.wait_for_step(4)
    time.sleep(0.4)
    process.kill(signal.SIGTERM)
    code, errors = process.finish()
    assert code == 143, errors
    saved = load_checkpoint(tmp_path / "out" / "toy" / "toy_interrupted.pth")
    assert (saved["iteration"], saved["epoch"]) == (4, 0)
    if ema is None:
        check_resumed(tmp_path / "out", whole)
    else:
        # Averaging does not change training: the network's own weights were saved, not the average.
        trainer = make_trainer(tmp_path / "out", epochs=2, resume=True, ema=ema)
        trainer.run()
        assert same_weights(weights(trainer), whole[0])


def test_signal_after_an_epoch_was_saved_says_so(tmp_path, whole):
    """Nothing is left to save, so there is no file to name; what to do is the same."""
    process = ToyProcess(tmp_path / "out", delay=1.0, epochs=2)
    checkpoint = tmp_path / "out" / "toy" / "toy_1.pth"
    wait_for(checkpoint.exists, 60)
    time.sleep(0.3)
    process.kill(signal.SIGTERM)
    code, errors = process.finish()
    assert code == 143, errors
    assert "the last checkpoint has every step already; go on with --resume" in errors
    assert not checkpoint.with_name("toy_interrupted.pth").exists()
    check_resumed(tmp_path / "out", whole)


def test_signal_before_the_first_step_leaves_nothing(tmp_path):
    process = ToyProcess(tmp_path / "out", delay=2.0)
    deadline = time.monotonic() + 30
    while not (tmp_path / "out" / "toy" / "toy_config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill(signal.SIGINT)
    code, errors = process.finish()
    assert code == 130, errors
    assert not (tmp_path / "out").exists()


def test_second_signal_leaves_at_once(tmp_path):
    process = ToyProcess(tmp_path / "out", pause_at=5, accumulation=4)
    process.wait_for_step(5)  # the first of a group of four: saving has to wait
    process.kill(signal.SIGINT)
    process.wait_for_words("once more to leave at once")
    process.kill(signal.SIGINT)
    code, _ = process.finish()
    assert code == 130
    assert load_checkpoint(tmp_path / "out" / "toy" / "toy_1.pth")["epoch"] == 1
    assert not (tmp_path / "out" / "toy" / "toy_interrupted.pth").exists()


def test_signals_work_as_before_when_training_is_over(tmp_path):
    former = signal.getsignal(signal.SIGINT)
    make_trainer(tmp_path, epochs=1, stop_on_signal=True).run()
    assert signal.getsignal(signal.SIGINT) is former


CHILD = """
trap 'echo first >> told; exit 7' TERM
trap 'echo INT >> told; [ -n "$again" ] && exit 9; again=1' INT
echo ready > ready
while true; do sleep 0.05; done
"""


def _launch(folder):
    os.chdir(folder)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell's background ignores some
        signal.signal(number, signal.SIG_DFL)
    os._exit(run_passing_signals(["bash", "-c", CHILD]))


@pytest.mark.parametrize(
    ("signals", "code", "told"),
    [
        ([signal.SIGTERM], 143, ["first"]),
        ([signal.SIGINT, signal.SIGINT], 130, ["INT", "INT"]),
        ([signal.SIGHUP], 129, ["first"]),
    ],
)
def test_a_launcher_hands_signals_on_once_each(tmp_path, signals, code, told):
    process = multiprocessing.get_context("fork").Process(target=_launch, args=(tmp_path,))
    process.start()
    wait_for(lambda: (tmp_path / "ready").is_file())
    for count, number in enumerate(signals):
        os.kill(process.pid, number)
        wait_for(lambda count=count: len(lines(tmp_path / "told")) > count)
    process.join(60)
    assert process.exitcode == code
    assert lines(tmp_path / "told") == told


def _launch_late(folder):
    """Send the signal while the launcher starts."""
    os.chdir(folder)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    begin = subprocess.Popen

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        process = begin(*arguments, **options)
        wait_for(lambda: (folder / "ready").is_file())
        return process

    subprocess.Popen = interrupted
    os._exit(run_passing_signals(["bash", "-c", CHILD]))


def test_a_signal_while_the_launcher_starts_is_handed_on(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_launch_late, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 143
    assert lines(tmp_path / "told") == ["first"]


def lines(path):
    return path.read_text().split() if path.is_file() else []


def wait_for(condition, timeout=60.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
