"""Averages the weights of the last epochs; the average becomes the best model where validation says so."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer

from volumen.checkpoints.file import plain, save_checkpoint
from volumen.handlers.checkpoint import Checkpointer
from volumen.handlers.final_scores import FinalScores
from volumen.handlers.state import register_state, saved_states
from volumen.handlers.validation import PREFIX
from volumen.handlers.weight_average import STATE as MOVING_AVERAGE
from volumen.networks.placement import unwrap
from volumen.utils import distributed

logger = logging.getLogger(__name__)

STATE = "last_epochs"
FILE = "average.pth"


class LastEpochs:
    """Average the weights after each of the last epochs with equal shares, and validate the average when training ends.

    The average is stored as `<model_name>_average.pth`. If its key metric on the whole validation part is better than
    that of the best epoch, it becomes `<model_name>_best.pth`; else nothing changes. Averaging the weights along a
    training finds flatter minima (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
    Generalization", https://arxiv.org/abs/1803.05407). Statistics of batch normalisation are averaged like weights.

    It must follow `FinalScores` in the list.

    Args:
        checkpointer: writes the checkpoints and knows the best epoch.
        scores: validates weights on the whole validation part.
        count: number of epochs; below 1: fraction of all epochs; None disables the average.
    """

    def __init__(
        self, checkpointer: Checkpointer, scores: FinalScores | None, count: float | None = None
    ) -> None:
        self.checkpointer, self.scores, self.count = checkpointer, scores, count
        self.network = unwrap(checkpointer.network)
        self.epochs: list[int] = []
        self.average: dict[str, torch.Tensor] = {}

    def attach(self, engine: SupervisedTrainer) -> None:
        """Average when an epoch of the trainer ends, before its checkpoint is written."""
        if self.count is None:
            return
        register_state(engine, STATE, self)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._choose)

    def first_epoch(self, epochs: int) -> int:
        """Return the first epoch that counts, of a run of so many."""
        assert self.count is not None
        number = self.count if self.count >= 1 else math.ceil(self.count * epochs)
        return max(1, epochs - int(number) + 1)

    @torch.no_grad()
    def _add(self, engine: Engine) -> None:
        epoch, first = engine.state.epoch, self.first_epoch(engine.state.max_epochs or engine.state.epoch)
        # A longer run, or one that continues from an earlier epoch, begins a new average.
        if self.epochs and (self.epochs[0] != first or self.epochs[-1] != epoch - 1):
            self.epochs, self.average = [], {}
        if epoch < first:
            return
        self.epochs.append(epoch)
        for name, value in self.network.state_dict().items():
            if name in self.average and value.is_floating_point():
                self.average[name].lerp_(value, 1 / len(self.epochs))
            else:
                self.average[name] = value.detach().clone()

    def _choose(self, engine: SupervisedTrainer) -> None:
        """Validate the average, store it, and make it the best model if it is better."""
        if len(self.epochs) < 2:
            logger.info(
                "weights are averaged over the last epochs of a run that ends as planned: this one has none"
            )
            return
        value, best = self._values(engine)
        if distributed.is_main():
            path = self.checkpointer.directory.file(FILE)
            save_checkpoint(self._content(engine, value), path)
        else:
            saved_states(engine)
        name = self.checkpointer.key_metric.resolve(engine)
        said = f"average of the weights of epochs {self.epochs[0]} to {self.epochs[-1]}"
        if value is None or best is None:
            logger.info("%s: stored, not validated", said)
            return
        better = self.checkpointer.key_metric.better(value, best, engine)
        logger.info(
            "%s: %s %.4g against %.4g of the best epoch: %s",
            said,
            name,
            value,
            best,
            "it is the best model now" if better else "the best epoch stays",
        )
        if better:
            self.checkpointer.replace_best(FILE, f"{said}, {name} {value:.4g}")

    def _values(self, engine: SupervisedTrainer) -> tuple[float | None, float | None]:
        """Return the key metric of the average and that of the best epoch, both on the whole validation part."""
        if self.scores is None or not self.checkpointer.ranking:
            return None, None
        name = self.checkpointer.key_metric.resolve(engine).removeprefix(PREFIX)
        measured = self.scores.measure(engine, self.average).get(name)
        return measured, self.scores.best_value(name)

    def _content(self, engine: SupervisedTrainer, value: float | None) -> dict[str, Any]:
        """Return what the file of the average holds: a checkpoint of the last epoch with other weights."""
        handlers = {key: state for key, state in saved_states(engine).items() if key != MOVING_AVERAGE}
        content = self.checkpointer.content(engine, handlers)
        averaged = {"model": self.average, "averaged_epochs": list(self.epochs), "best_metric": value}
        return plain({**content, **averaged, "best_metric_epoch": engine.state.epoch})

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its epochs."""
        return {"epochs": list(self.epochs), "weights": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the average, onto the device of the weights."""
        own = self.network.state_dict()
        self.epochs = [int(epoch) for epoch in state["epochs"]]
        self.average = {name: value.to(own[name].device).clone() for name, value in state["weights"].items()}
