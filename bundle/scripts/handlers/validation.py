"""Validates every few epochs and copies the results to the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler

from volumen.handlers.state import register_state
from volumen.networks.placement import unwrap
from volumen.utils.distributed import broadcast_buffers

PREFIX = "val/"
KEY_METRIC = "key_metric"
FINAL = "scores_final_epochs"
"""Name of the evaluator's state attribute that is true while the last and the best epoch are scored again."""


class Validate(ValidationHandler):
    """Run an evaluator and put its metrics into the trainer's `state.metrics` under "val/...".

    After an epoch without validation those keys are absent. It must precede the handlers that read
    metrics. With several processes each evaluates its own batches with the first one's buffers, and the evaluator's
    handlers reduce what they measure.

    Args:
        validator: the evaluator.
        interval: epochs between validations; the last epoch is always validated.
    """

    def __init__(self, validator: Evaluator, interval: int = 1) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        super().__init__(interval=interval, validator=validator)
        self.evaluator = validator

    def attach(self, engine: Engine) -> None:
        """Run when an epoch of the trainer ends."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        register_state(engine, "validation", self)
        # Averaged weights are loaded when the evaluator starts, so the buffers are shared after that.
        self.evaluator.add_event_handler(Events.EPOCH_STARTED, self._broadcast_buffers)

    def _broadcast_buffers(self, evaluator: Engine) -> None:
        broadcast_buffers(unwrap(self.evaluator.network))  # type: ignore[attr-defined]

    def _forget(self, engine: Engine) -> None:
        for name in [name for name in engine.state.metrics if name.startswith(PREFIX)]:
            del engine.state.metrics[name]

    def __call__(self, engine: Engine) -> None:
        """Validate if this epoch requires it."""
        epoch = engine.state.epoch
        if epoch % self.interval and epoch != engine.state.max_epochs:
            return
        found = run_validator(self.evaluator, epoch)
        engine.state.metrics.update({PREFIX + name: value for name, value in found.items()})
        name = self.evaluator.state.key_metric_name
        setattr(engine.state, KEY_METRIC, PREFIX + name if name else None)

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluator's best metric."""
        state = self.evaluator.state
        return {"best_metric": float(state.best_metric), "best_metric_epoch": int(state.best_metric_epoch)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the evaluator's best metric."""
        self.evaluator.state.best_metric = saved["best_metric"]
        self.evaluator.state.best_metric_epoch = saved["best_metric_epoch"]


def run_validator(evaluator: Evaluator, epoch: int) -> dict[str, float]:
    """Run an evaluator and return its metrics. Metrics of an earlier run are removed first, as they may be absent now.

    Args:
        evaluator: runs once over its data.
        epoch: the trainer's epoch.
    """
    evaluator.state.metrics.clear()
    evaluator.run(epoch)
    return numbers_of(evaluator.state.metrics)


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluator that are numbers; NaN means not measured, so such metrics are left out."""
    found = {name: float(value) for name, value in metrics.items() if _is_number(value)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _is_number(value: Any) -> bool:
    if hasattr(value, "numel"):
        return value.numel() == 1
    return isinstance(value, (int, float)) or (hasattr(value, "ndim") and value.ndim == 0)
