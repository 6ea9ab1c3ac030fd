"""What must be told that an epoch begins, and the schedule that steps when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ignite.engine import Events
from monai.engines import Workflow

from scripts.engines.sampler import ResumableSampler


class EpochStart:
    """Tell samplers, data sets and losses which epoch begins.

    They count epochs from 0. When a run resumes in the middle of an epoch, the sampler starts after the
    batches that were already used.

    Args:
        sampler: the one of the training data; None when there is none.
        others: have `set_epoch(epoch)`.
    """

    def __init__(self, sampler: ResumableSampler | None = None, others: Sequence[Any] = ()) -> None:
        if sampler is not None and not isinstance(sampler, ResumableSampler):
            raise TypeError(
                f"sampler must be a ResumableSampler around the {type(sampler).__name__}, or a run that is"
                " interrupted in an epoch could not go on there"
            )
        self.sampler = sampler
        self.others = list(others)

    def attach(self, engine: Workflow) -> None:
        """Call at the start of each epoch of the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Workflow) -> None:
        """Set the epoch that the engine starts."""
        epoch = engine.state.epoch - 1
        if self.sampler is not None:
            self.sampler.set_epoch(epoch, engine.state.iteration - epoch * engine.state.epoch_length)
        for item in self.others:
            item.set_epoch(epoch)


class StepSchedule:
    """Step a learning-rate schedule after each epoch, or after each iteration.

    Args:
        scheduler: has `step()`.
        interval: "epoch" or "iteration".
    """

    def __init__(self, scheduler: Any, interval: str = "epoch") -> None:
        if interval not in ("epoch", "iteration"):
            raise ValueError(f"interval must be 'epoch' or 'iteration', got {interval!r}")
        self.scheduler = scheduler
        self.interval = interval

    def attach(self, engine: Workflow) -> None:
        """Step with the trainer."""
        event = Events.EPOCH_COMPLETED if self.interval == "epoch" else Events.ITERATION_COMPLETED
        engine.add_event_handler(event, self)

    def __call__(self, engine: Workflow) -> None:
        """Step once."""
        self.scheduler.step()
