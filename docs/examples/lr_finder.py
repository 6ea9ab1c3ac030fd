"""Finds a learning rate: raises it at every step, records the loss, and stops when the loss diverges."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path

import torch
from ignite.engine import Engine, Events

from volumen.utils import distributed

logger = logging.getLogger(__name__)


class LearningRateFinder:
    """The range test of Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.

    The rate grows by the same factor at every step from `lowest` to `highest`; the loss is smoothed
    exponentially. Training ends after `steps` steps, or when the loss is over `explode` times its lowest value.
    The rate at which it decreased fastest is a good `initial_lr`. Use a separate run, since this changes the weights.

    Args:
        optimizer: the trainer's optimizer.
        path: CSV file for rate and smoothed loss.
        lowest, highest: range of the learning rate.
        steps: length of the test; an epoch must have at least as many steps.
        smoothing: weight of the past in the smoothed loss.
        explode: ratio of the loss to its lowest value that ends the test.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        path: str | Path,
        lowest: float = 1e-6,
        highest: float = 1.0,
        steps: int = 100,
        smoothing: float = 0.9,
        explode: float = 4.0,
    ) -> None:
        if not 0 < lowest < highest or steps < 2:
            raise ValueError(f"0 < lowest < highest and steps > 1 wanted, got {lowest}, {highest}, {steps}")
        self.optimizer, self.path = optimizer, Path(path)
        self.lowest, self.highest, self.steps = lowest, highest, steps
        self.smoothing, self.explode = smoothing, explode
        self.rows: list[tuple[float, float]] = []
        self._average = 0.0
        self._told = False

    def attach(self, engine: Engine) -> None:
        """Set the rate before each step, and record the loss after it."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._raise_rate)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._tell)

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss decreased fastest; None if it never decreased.

        Decreases are measured over a tenth of the steps, without the first tenth, since single steps vary by chance.
        """
        tenth = len(self.rows) // 10
        width = max(1, tenth)
        falls = [
            (self.rows[start + width][1] - self.rows[start][1], self.rows[start + width // 2][0])
            for start in range(tenth, len(self.rows) - width)
        ]
        steepest = min(falls, default=(0.0, 0.0))
        return steepest[1] if steepest[0] < 0 else None

    def _raise_rate(self, engine: Engine) -> None:
        progress = min(1.0, (engine.state.iteration - 1) / (self.steps - 1))
        rate = self.lowest * (self.highest / self.lowest) ** progress
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _note(self, engine: Engine) -> None:
        loss = engine.state.output["losses"]["loss"]
        self._average = self.smoothing * self._average + (1 - self.smoothing) * loss
        # Without the division the first averages would be biased towards their initial value 0.
        smooth = self._average / (1 - self.smoothing ** (len(self.rows) + 1))
        self.rows.append((self.optimizer.param_groups[0]["lr"], smooth))
        best = min(row[1] for row in self.rows)
        if len(self.rows) >= self.steps or not math.isfinite(smooth) or smooth > self.explode * best:
            engine.terminate()

    def _tell(self, engine: Engine) -> None:
        # Ending early fires both events.
        if self._told or not distributed.is_main() or not self.rows:
            return
        self._told = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([("learning_rate", "loss"), *self.rows])
        said = "the loss never fell" if self.suggestion is None else f"steepest at {self.suggestion:.2g}"
        logger.warning(
            "%s: learning rates %.1g to %.1g, %s", self.path, self.rows[0][0], self.rows[-1][0], said
        )
