"""Keeps rare classes learned: draws them as their share and score demand, and notices when one is unlearned."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from volumen.data.index.patch_index import PatchIndex
from volumen.data.sampling.sampler import PatchSampler
from volumen.engines.schedules import Schedule
from volumen.handlers.state import register_state

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Number of consecutive validations below half of a class's best score that count as a collapse."""
LEARNED = 0.2
"""A class is learned once two consecutive validations reach this score."""
RATE = 0.3
"""Factor of the learning rate after a collapse."""
MOST = 0.5
"""Largest share of the samples that are drawn by class."""
COMMON = 0.33
"""A class that this share of the patches shows in its middle is common: it is not drawn more often."""


@dataclass
class ClassHistory:
    """The scores of a class so far.

    Args:
        best: the best score that two consecutive validations reached, so that a single lucky value does not count.
        last: the score of the last validation.
        low: number of consecutive validations below half of the best.
    """

    best: float = 0.0
    last: float = 0.0
    low: int = 0

    def add(self, score: float) -> bool:
        """Add the score of a validation; return whether the class is unlearned now."""
        self.best = max(self.best, min(self.last, score))
        self.last = score
        self.low = self.low + 1 if self.best >= LEARNED and score < self.best / 2 else 0
        return self.low >= PATIENCE


class RareClasses:
    """Follow the Dice of each class, and adapt the training once if a learned class is unlearned.

    A class is unlearned if its Dice is below half of its best for `PATIENCE` validations. Then one line reports it, the
    learning rate is lowered to `RATE` of its value, and the class is drawn into half of the patches if the index
    records it (`dataset_config.class_oversampling`). `<model_name>_best.pth` holds the best epoch in any case. This
    happens once in a run, also for several classes. It must follow `Validate` and precede `StepSchedule` in the list.

    Args:
        names: score in `state.metrics` without "val/" -> target and label value.
        index: the valid patches; its classes can be drawn.
        sampler: receives the shares of the classes.
        scheduler: its learning rate is lowered.
        follow: whether classes are drawn by their rarity and score from the beginning.
    """

    def __init__(
        self,
        names: Mapping[str, tuple[str, int]],
        index: PatchIndex,
        sampler: PatchSampler,
        scheduler: Schedule,
        *,
        follow: bool = False,
    ) -> None:
        self.names = dict(names)
        self.sampler = sampler
        self.scheduler = scheduler
        self.follow = follow
        self.history = {name: ClassHistory() for name in names}
        self.unlearned: list[str] = []
        self._classes = list(index.classes)
        self._rarity = [rarity(bits) for bits in index.foreground.class_shifts]
        self._share()

    def attach(self, engine: Engine) -> None:
        """Look at the scores when an epoch of the trainer ends."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        register_state(engine, "rare_classes", self)

    def __call__(self, engine: Engine) -> None:
        """Add the scores of this epoch's validation, if there was one."""
        fallen = []
        measured = engine.state.metrics
        for name, history in self.history.items():
            score = measured.get(f"val/{name}")
            if score is not None and not math.isnan(score) and history.add(float(score)):
                fallen.append(name)
        if fallen and not self.unlearned:
            self.unlearned = fallen
            self.scheduler.lower(RATE)
            self._report(engine, fallen)
        self._share()

    def shares(self) -> tuple[float, ...]:
        """Return the share of the samples for each class of the index, at most `MOST` together."""
        lost = {self.names[name] for name in self.unlearned}
        scores: dict[tuple[str, int], float] = {}
        for name, key in self.names.items():
            scores[key] = min(scores.get(key, 1.0), self.history[name].last)
        needs = []
        for key, rare in zip(self._classes, self._rarity):
            need = rare * (1 - scores.get(key, 0.0) / 2) if self.follow else 0.0
            needs.append(1.0 if key in lost else need)
        total = max(1.0, sum(needs))
        return tuple(round(MOST * need / total, 3) for need in needs)

    def _share(self) -> None:
        if self._classes and (self.follow or self.unlearned):
            self.sampler.class_shares = self.shares()

    def _report(self, engine: Engine, fallen: list[str]) -> None:
        drawn = any(self.names[name] in self._classes for name in fallen)
        sampling = (
            "and draws these classes into half of the patches"
            if drawn
            else "; with dataset_config.class_oversampling: auto these classes would be drawn more often, too"
        )
        logger.warning(
            "epoch %d: %s: unlearned, below half of the best for %d validations; training goes on at %g of the learning"
            " rate%s%s. The best epoch so far is stored",
            engine.state.epoch,
            ", ".join(
                f"{name} {self.history[name].last:.3g} (best {self.history[name].best:.3g})"
                for name in fallen
            ),
            PATIENCE,
            RATE,
            " " if drawn else "",
            sampling,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the scores so far and the classes that were unlearned; the schedule stores its own rate."""
        return {
            "history": {name: [h.best, h.last, h.low] for name, h in self.history.items()},
            "unlearned": list(self.unlearned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scores of the classes that this run has, and the shares that follow from them."""
        for name, (best, last, low) in state["history"].items():
            if name in self.history:
                self.history[name] = ClassHistory(float(best), float(last), int(low))
        self.unlearned = [name for name in state["unlearned"] if name in self.names]
        self._share()


def rarity(class_shifts: np.ndarray) -> float:
    """Return 1 for a class that no patch shows in its middle, down to 0 if a share of `COMMON` shows it.

    Args:
        class_shifts: (N,) a row of `PatchTable.class_shifts`; a patch whose bits are all 0 does not show the class.
    """
    if not len(class_shifts):
        return 0.0
    return max(0.0, 1.0 - float(np.mean(class_shifts != 0)) / COMMON)
