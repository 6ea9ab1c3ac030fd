"""Averages the weights over the optimizer steps; the average validates and predicts better than the last weights."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Workflow

from volumen.handlers.state import register_state
from volumen.networks.placement import unwrap

STATE = "weight_average"


class WeightAverage:
    """Exponential moving average of the network's weights; validation runs with it.

    After optimizer step n the average moves by `1 - min(decay, (1 + n) / (10 + n))` towards the weights, so
    that it quickly forgets the first, poor weights (as in TensorFlow's ExponentialMovingAverage).
    Checkpoints hold the average in addition to the weights with which training continues.

    Args:
        network: the network.
        decay: between 0 and 1; None disables the average.
        validator: the evaluator that runs with the average.
    """

    def __init__(
        self, network: torch.nn.Module, decay: float | None = 0.999, validator: Engine | None = None
    ) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        self.network = unwrap(network)
        self.decay = decay
        self.validator = validator
        self.steps = 0
        self.average: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] | None = None

    def attach(self, engine: Engine) -> None:
        """Average after each optimizer step of the trainer."""
        if self.decay is None:
            return
        # The initial weights (perhaps of another model) are loaded before the first epoch starts.
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        register_state(engine, STATE, self)
        if self.validator is not None:
            self.validator.add_event_handler(Events.STARTED, self._swap_in)
            self.validator.add_event_handler(Events.COMPLETED, self._swap_out)
            self.validator.add_event_handler(Events.EXCEPTION_RAISED, self._swap_out_and_raise)

    def _start(self, engine: Engine) -> None:
        if not self.average:
            self.average = self._weights(copy=True)

    def _weights(self, *, copy: bool) -> dict[str, torch.Tensor]:
        state = self.network.state_dict()
        return {name: value.detach().clone() if copy else value.detach() for name, value in state.items()}

    @torch.no_grad()
    def _update(self, engine: Workflow) -> None:
        if not engine.state.output.get("stepped"):
            return
        assert self.decay is not None
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in self._weights(copy=False).items():
            if value.is_floating_point():
                self.average[name].lerp_(value, share)
            else:
                self.average[name].copy_(value)

    def _swap_in(self, engine: Engine) -> None:
        self._own = self._weights(copy=True)
        self.network.load_state_dict(self.average)

    def _swap_out(self, engine: Engine) -> None:
        if self._own is not None:
            self.network.load_state_dict(self._own)
            self._own = None

    def _swap_out_and_raise(self, engine: Engine, error: BaseException) -> None:
        # A signal in the middle of validation saves a checkpoint, which must hold the network's own weights.
        self._swap_out(engine)
        raise error

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of steps in it."""
        return {"steps": self.steps, "weights": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average, onto the device of the weights."""
        self.steps = int(state["steps"])
        own = self._weights(copy=False)
        self.average = {name: value.to(own[name].device).clone() for name, value in state["weights"].items()}
