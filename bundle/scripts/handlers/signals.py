"""Handles Ctrl-C and SIGTERM: the first finishes the step, saves and exits; a second one exits at once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ignite.engine import Events
from monai.engines import SupervisedTrainer, Workflow
from torch.utils.data import DataLoader

from volumen.engines.trainer import accumulation_group
from volumen.handlers.checkpoint import Checkpointer
from volumen.utils import distributed

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: Seconds within which a second signal counts as a copy of the first: torchrun forwards a terminal's Ctrl-C, which its
#: processes also receive from the terminal.
ECHO = 1.0

#: Maximum seconds that a data loader's worker lives after SIGTERM; it ends earlier when its trainer ends.
WORKER_GRACE = 60.0
_LOOK = 0.5


class StopOnSignal:
    """Save and exit with 130 (Ctrl-C) or 143 (SIGTERM) at the first signal.

    The current step is finished, and with gradient accumulation its group, so that the saved state lies
    between two optimizer steps. A signal while the trainer waits for data saves at once; after one during
    validation the resumed run does the rest of the validation. The second signal exits at once; it damages no
    checkpoint, since checkpoints are written atomically.

    The workers of the data loaders, which receive a terminal's Ctrl-C too, do not end before the
    trainer.

    Args:
        checkpointer: saves the state.
        validator: the evaluator, which stops when a signal comes during validation.
    """

    def __init__(self, checkpointer: Checkpointer, validator: Workflow | None = None) -> None:
        self.checkpointer = checkpointer
        self.validator = validator
        self.received: int | None = None
        self._trainer: SupervisedTrainer | None = None
        self._former: dict[int, Any] = {}
        self._process = 0
        self._waiting = False
        self._save_at_end = False
        self._common = 0
        self._received_at = 0.0
        # Shared with the workers: whether the trainer no longer needs them.
        self._finished = multiprocessing.RawValue("b", 0)

    def attach(self, engine: SupervisedTrainer) -> None:
        """Handle signals while the trainer runs."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._wait)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._work)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._work)
        engine.add_event_handler(Events.COMPLETED, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._end)
        if self.validator is not None:
            self.validator.add_event_handler(Events.EPOCH_STARTED, self._start_validation)
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._validating)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._trainer = engine
        self._process = os.getpid()
        self._waiting = False
        self.received = None  # a trainer that was stopped may run again
        # Added now so that it comes after the handlers whose state it saves.
        for event, handler in (
            (Events.ITERATION_COMPLETED, self._between_steps),
            (Events.EPOCH_COMPLETED, self._after_epoch),
        ):
            if not engine.has_event_handler(handler, event):
                engine.add_event_handler(event, handler)
        for workflow in (engine, self.validator):
            protect_workers(getattr(workflow, "data_loader", None), self._finished)
        self._finished.value = 0
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _end(self, engine: SupervisedTrainer, *_: Any) -> None:
        if self._save_at_end:
            self._save_at_end = False
            self._save(engine)
        self._finished.value = 1
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that was forked with this handler: its trainer decides
        if self.received is not None:
            if distributed.is_distributed() and time.monotonic() - self._received_at < ECHO:
                return
            os._exit(128 + number)
        self.received, self._received_at = number, time.monotonic()
        logger.warning(
            "%s: finishing this step and saving; once more to leave at once", signal.Signals(number).name
        )
        if self._waiting and not distributed.is_distributed():
            self._save_and_exit()

    def _wait(self, engine: SupervisedTrainer) -> None:
        self._waiting = self._at_group_end(engine)
        if self._waiting and self.received is not None and not distributed.is_distributed():
            self._save_and_exit()

    def _work(self, engine: SupervisedTrainer) -> None:
        self._waiting = False

    def _between_steps(self, engine: SupervisedTrainer) -> None:
        if self._at_group_end(engine) and self._agreed():
            self._save_and_exit()

    def _after_epoch(self, engine: SupervisedTrainer) -> None:
        if self._agreed():
            self._save_and_exit()

    def _start_validation(self, engine: Workflow) -> None:
        self._common = distributed.smallest(engine.state.epoch_length or 0, engine.state.device)

    def _validating(self, engine: Workflow) -> None:
        # Processes may validate different numbers of batches, so they agree only while all of them have one.
        if engine.state.iteration <= self._common and self._agreed():
            assert self.received is not None
            # The trainer saves when it receives the exit: until then the network may hold averaged weights.
            self._save_at_end = True
            raise SystemExit(128 + self.received)

    def _agreed(self) -> bool:
        """Return whether to stop here; the result is the same in all processes at the same step."""
        assert self._trainer is not None
        stop = distributed.any_rank(self.received is not None, self._trainer.state.device)
        if stop and self.received is None:
            self.received = signal.SIGTERM
        return stop

    @staticmethod
    def _at_group_end(engine: SupervisedTrainer) -> bool:
        if engine.state.iteration == 0:
            return True
        return accumulation_group(
            engine.state.iteration, engine.state.epoch_length, engine.accumulation_steps
        )[1]

    def _save_and_exit(self) -> None:
        assert self._trainer is not None
        assert self.received is not None
        self._waiting = False
        self._save(self._trainer)
        raise SystemExit(128 + self.received)

    def _save(self, engine: SupervisedTrainer) -> None:
        path = self.checkpointer.save_interrupted(engine)
        if path is not None:
            logger.warning("saved %s; go on with --resume", path)
        elif distributed.is_main() and engine.state.iteration:
            logger.warning("the last checkpoint has every step already; go on with --resume")
        # When one process ends, the launcher ends the others, even one that is still saving.
        distributed.barrier()


def protect_workers(loader: Any, finished: Any) -> None:
    """Let a data loader's workers ignore signals that are meant for the trainer.

    Args:
        loader: changed in place, before it starts its workers; anything but a `DataLoader` is not changed.
        finished: a shared value that is not 0 once the trainer no longer needs the workers.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.worker_init_fn, _StartWorker):
        loader.worker_init_fn = _StartWorker(loader.worker_init_fn, finished)


class _StartWorker:
    """The first function that a worker runs: it sets signal handlers, then calls the loader's `worker_init_fn`.

    The worker ignores a terminal's Ctrl-C. A cluster sends SIGTERM to every process: the worker lives on while its
    trainer does, because the trainer must fetch the data of its last step, however slow the machine, and must not
    take the worker for crashed. When the trainer has finished or ended, the worker ends at once. A worker that hangs,
    which receives a SIGTERM from its loader too, ends after `WORKER_GRACE`.
    """

    def __init__(self, then: Callable[[int], None] | None, finished: Any) -> None:
        self.then = then
        self.finished = finished
        self._until = 0.0
        self._trainer = 0

    def __call__(self, worker: int) -> None:
        self._trainer = os.getppid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, self._look)
        signal.signal(signal.SIGTERM, self._outlive)
        if self.then is not None:
            self.then(worker)

    def _outlive(self, number: int, frame: FrameType | None) -> None:
        self._until = self._until or time.monotonic() + WORKER_GRACE
        signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
        self._look(number, frame)

    def _look(self, number: int, frame: FrameType | None) -> None:
        if self.finished.value or os.getppid() != self._trainer or time.monotonic() > self._until:
            os._exit(0)
