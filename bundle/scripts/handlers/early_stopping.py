"""Stops the training when the key metric no longer improves."""

from __future__ import annotations

import logging
from typing import Any

from ignite.engine import Engine, Events

from volumen.handlers.metric import KeyMetric
from volumen.handlers.state import register_state
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


class EarlyStopping:
    """End training after `patience` validations without a better key metric. It must follow `Validate` in the list.

    Args:
        key_metric: the metric.
        patience: number of validations without improvement before training stops; None never stops.
    """

    def __init__(self, key_metric: KeyMetric | None = None, patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            raise VolumenError("tr_config.early_stopping_patience", expected="at least 1", found=patience)
        self.key_metric = key_metric or KeyMetric()
        self.patience = patience
        self.best: float | None = None
        self.waited = 0
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Check the metric when an epoch of the trainer ends."""
        if self.patience is None:
            return
        self._engine = engine
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        register_state(engine, "early_stopping", self)

    def __call__(self, engine: Engine) -> None:
        """Count this epoch's validation, if there was one."""
        value = self.key_metric.value(engine)
        if value is None:
            return
        if self.best is None or self.key_metric.better(value, self.best, engine):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self._is_over():
            logger.info(
                "epoch %d: %s has not been better than %.4g for %d validations, training ends early",
                engine.state.epoch,
                self.key_metric.resolve(engine),
                self.best,
                self.waited,
            )
            engine.terminate()

    def _is_over(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, the number of validations since then, and the metric."""
        return {"best": self.best, "waited": self.waited, "metric": self.key_metric.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the count; a run that had stopped early stops again at once. Counts of another metric are dropped."""
        if self.key_metric.replaces(state.get("metric")):
            return
        self.best, self.waited = state["best"], int(state["waited"])
        if self._is_over() and self._engine is not None:
            self._engine.terminate()
