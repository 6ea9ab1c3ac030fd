"""Notifies samplers, data sets and losses when an epoch begins, and steps the learning-rate schedule."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from ignite.engine import Events
from monai.engines import Workflow
from torch.utils.data import DataLoader

from volumen.data.sampling.loader import PatchLoader

logger = logging.getLogger(__name__)


class EpochStart:
    """Notify samplers, data sets and losses which epoch begins.

    They count epochs from 0. When a run resumes in the middle of an epoch, the trainer's data loader starts
    after the batches that were already used, without loading them.

    Args:
        sampler: an object with `set_epoch(epoch)`; None when there is none.
        others: further objects with `set_epoch(epoch)`.
    """

    def __init__(self, sampler: Any = None, others: Sequence[Any] = ()) -> None:
        self.listeners = [item for item in (sampler, *others) if item is not None]
        self._shortened = False

    def attach(self, engine: Workflow) -> None:
        """Call this handler at the start of each epoch of the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Workflow) -> None:
        """Set the epoch that the engine starts."""
        epoch = engine.state.epoch - 1
        for item in self.listeners:
            item.set_epoch(epoch)
        done = engine.state.iteration - epoch * engine.state.epoch_length
        if done:
            engine.state.dataloader = remaining_batches(engine.data_loader, done)
            self._shortened = True
        elif self._shortened:
            engine.state.dataloader = engine.data_loader
            self._shortened = False


def remaining_batches(loader: Iterable[Any], done: int) -> Iterable[Any]:
    """Return a copy of a data loader that yields an epoch's batches without the first `done`."""
    if not isinstance(loader, DataLoader):
        return list(itertools.islice(loader, done, None))
    kind: Any = DataLoader
    options: dict[str, Any] = {}
    if isinstance(loader, PatchLoader):
        kind, options = PatchLoader, {"device": loader.device}
    return kind(
        loader.dataset,
        batch_sampler=list(itertools.islice(iter(loader.batch_sampler), done, None)),  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        **options,
    )


class StepSchedule:
    """Step a learning-rate schedule after each epoch, or after each iteration.

    A schedule over fewer epochs than the trainer runs would end at a learning rate of nearly 0 for the rest: it is
    extended to all of them, as for a run that is resumed with a larger `max_epoch`.

    Args:
        scheduler: has `step()`; where it also has `total`, that is the number of steps of the whole run.
        interval: "epoch" or "iteration".
    """

    def __init__(self, scheduler: Any, interval: str = "epoch") -> None:
        if interval not in ("epoch", "iteration"):
            raise ValueError(f"interval must be 'epoch' or 'iteration', got {interval!r}")
        self.scheduler = scheduler
        self.interval = interval

    def attach(self, engine: Workflow) -> None:
        """Step when an epoch or an iteration of the trainer completes."""
        event = Events.EPOCH_COMPLETED if self.interval == "epoch" else Events.ITERATION_COMPLETED
        engine.add_event_handler(event, self)
        engine.add_event_handler(Events.STARTED, self._fit)

    def _fit(self, engine: Workflow) -> None:
        """Compare the schedule's length with the trainer's."""
        total = getattr(self.scheduler, "total", None)
        steps = engine.state.max_epochs * (1 if self.interval == "epoch" else engine.state.epoch_length)
        if total is None or steps == total:
            return
        if steps > total:
            self.scheduler.extend(steps)
        elif not engine.state.iteration:
            logger.info(
                "the learning rate is planned over %d %ss (tr_config.max_epoch), and this run ends after %d",
                total, self.interval, steps,
            )  # fmt: skip

    def __call__(self, engine: Workflow) -> None:
        """Step once."""
        self.scheduler.step()
