"""A toy run in a separate process, forked so that no module is imported again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from ignite.engine import Events
from training_toys import ToyData, make_trainer

from volumen.utils.errors import VolumenError

USER_ERROR = 2


class SlowData(ToyData):
    """Toy samples whose loading takes some time."""

    def __init__(self, length: int = 8, delay: float = 0.0) -> None:
        super().__init__(length)
        self.delay = delay

    def __getitem__(self, key: Any) -> dict[str, Any]:
        time.sleep(self.delay)
        return super().__getitem__(key)


class ToyProcess:
    """Start a run whose steps can be waited for.

    Args:
        out: the output folder.
        delay: seconds that each sample takes.
        pause_at: a step in which the run pauses for longer than any test waits.
        options: options of `make_trainer`.
    """

    def __init__(self, out: Path, *, delay: float = 0.0, pause_at: int | None = None, **options: Any) -> None:
        reading, writing = os.pipe()
        self._steps = os.fdopen(reading)
        self._errors = out.parent / f"{out.name}.stderr"
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=_run, args=(out, delay, pause_at, options, writing, self._errors)
        )
        self._process.start()
        os.close(writing)
        self.pid: int = self._process.pid or 0

    def wait_for_step(self, step: int) -> None:
        """Return when the run begins this step."""
        for line in self._steps:
            if int(line) == step:
                return
        raise AssertionError(f"ended before step {step}: {self.finish()}")

    def wait_for_words(self, words: str) -> None:
        """Return when the run has written these words."""
        while words not in self._errors.read_text():
            assert self._process.is_alive(), self.finish()
            time.sleep(0.02)

    def finish(self, timeout: float = 30) -> tuple[int, str]:
        """Return the exit code (negative for a signal that killed it) and the run's output."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"does not end: {self._errors.read_text()}")
        self._steps.close()
        return self._process.exitcode, self._errors.read_text()

    def kill_group(self, number: int) -> None:
        """Send a signal to the process and its workers, as a terminal does."""
        os.killpg(self.pid, number)

    def kill(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)


def _run(
    out: Path, delay: float, pause_at: int | None, options: dict[str, Any], writing: int, errors: Path
) -> None:
    os.setsid()
    with errors.open("w") as stderr:
        logging.basicConfig(level=logging.WARNING, stream=stderr, format="%(message)s", force=True)
        trainer = make_trainer(
            out, data=SlowData(options.get("length", 8), delay), stop_on_signal=True, **options
        )
        trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: os.write(writing, f"{engine.state.iteration}\n".encode())
        )
        if pause_at is not None:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=pause_at), lambda: time.sleep(300))
        try:
            trainer.run()
        except VolumenError as error:
            stderr.write(f"{error}\n")
            stderr.flush()
            os._exit(USER_ERROR)
