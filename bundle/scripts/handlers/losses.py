"""Averages the losses over an epoch, for training and validation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Workflow

from volumen.data.sampling.regions import BLOCK_WEIGHT
from volumen.handlers.state import between_epochs, register_state
from volumen.utils import distributed
from volumen.utils.device import sent
from volumen.utils.sample_keys import counted_voxels

logger = logging.getLogger(__name__)


class LossAverages:
    """Average the total loss, each target's loss and each single loss over an epoch, into `engine.state.metrics`.

    The keys are "loss", "loss/<target>" and "loss/<target>/<LossName>". The weights are the batch sizes; in validation
    they are the number of blocks that a batch represents. Steps whose loss is not finite are left out. A component
    that is absent from a batch, for example of a target without a valid voxel, does not count in that batch; one that
    is absent from all batches has no value. With several processes the mean is over all of them. The trainer's
    instance also averages "gradient_norm" over the optimizer steps, and warns once of a target of which no voxel
    counted in a complete epoch: its head learns nothing.

    Args:
        save_as: the name under which checkpoints store an unfinished epoch's sums; None (for the
            evaluator) stores none.
    """

    def __init__(self, save_as: str | None = None) -> None:
        self.save_as = save_as
        self._totals = _Totals()
        self._counted: dict[str, torch.Tensor | bool] = {}
        self._warned: set[str] = set()
        self._averaged: set[str] = set()

    def attach(self, engine: Workflow) -> None:
        """Add the losses after each iteration of a trainer or evaluator, and average them when its epoch ends."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        if self.save_as is not None:
            register_state(engine, self.save_as, self)

    def _add(self, engine: Workflow) -> None:
        output: dict[str, Any] = engine.state.output
        losses, size = output.get("losses"), _weight(engine)
        if losses:
            names = tuple(name if name == "loss" else f"loss/{name}" for name in losses.names)
            values, counted = losses.values_on_device, losses.counted
            finite = (torch.isfinite(values) | ~counted).all()
            self._totals.add(names, values, (counted & finite) * size)
        if self.save_as is not None:
            self._notice(output.get("label") or {})
        norm = output.get("gradient_norm")
        if norm is not None:
            norm = torch.as_tensor(norm).reshape(1)
            self._totals.add(("gradient_norm",), norm, torch.isfinite(norm) * 1.0)

    def _notice(self, labels: Mapping[str, torch.Tensor]) -> None:
        """Record which targets had a voxel that counts; the result stays on the device to avoid waiting for it."""
        for name in labels:
            counts = counted_voxels(labels, name)
            if counts is not None:
                self._counted[name] = self._counted.get(name, False) | counts.any()

    def _warn_of_targets_without_voxels(self, engine: Workflow) -> None:
        counted = distributed.sum_over_ranks({name: float(value) for name, value in self._counted.items()})
        for name, ranks in counted.items():
            if not ranks and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "epoch %d: no voxel of target %s counted, so its head learned nothing: check its labels, masks/, "
                    "ignore_label and compute_loss_on_labeled_only",
                    engine.state.epoch,
                    name,
                )

    def _finish(self, engine: Workflow) -> None:
        sums, counts = (distributed.sum_over_ranks(part) for part in self._totals.read())
        for name in self._averaged - set(sums):  # of an earlier epoch
            engine.state.metrics.pop(name, None)
        self._averaged = set(sums)
        engine.state.metrics.update({name: sums[name] / counts[name] for name in sums})
        self._warn_of_targets_without_voxels(engine)

    def _clear(self, engine: Workflow) -> None:
        # This is not done at the epoch's end: a signal during validation saves the epoch's sums as they are.
        if between_epochs(engine):
            self._totals, self._counted = _Totals(), {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts of the epoch so far."""
        counted = {name: bool(value) for name, value in self._counted.items()}
        sums, counts = self._totals.read()
        return {"sums": sums, "counts": counts, "counted": counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the sums of a checkpoint."""
        self._totals = _Totals(state["sums"], state["counts"])
        self._counted = dict(state.get("counted", {}))

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Add the sums and counts of several processes."""
        together: dict[str, Any] = {"sums": {}, "counts": {}, "counted": {}}
        for state in states:
            for part, values in together.items():
                for name, value in state.get(part, {}).items():
                    values[name] = values[name] + value if name in values else value
        return together


class _Totals:
    """Weighted sums of named values, which stay on the device until they are read.

    Args:
        sums: the sums so far by name.
        counts: the sums of weights so far.
    """

    def __init__(
        self, sums: Mapping[str, float] | None = None, counts: Mapping[str, float] | None = None
    ) -> None:
        self._sums, self._counts = dict(sums or {}), dict(counts or {})
        self._tables: dict[tuple[str, ...], torch.Tensor] = {}

    def add(self, names: tuple[str, ...], values: torch.Tensor, weights: torch.Tensor) -> None:
        """Add values (K,) with weights (K,); a value of weight 0 does not count, even if it is not finite."""
        if names not in self._tables:
            for other in [other for other in self._tables if set(other) & set(names)]:
                self._fetch(other)
            before = [[part.get(name, 0.0) for name in names] for part in (self._sums, self._counts)]
            # Some devices have no float64.
            kind = torch.float32 if values.device.type == "mps" else torch.float64
            self._tables[names] = sent(before, values.device, kind)
        table = self._tables[names]
        weights = weights.to(table.dtype)
        table[0] += torch.where(weights > 0, values.to(table.dtype) * weights, 0.0)
        table[1] += weights

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the sums and the sums of weights by name, of all names that count."""
        for names in list(self._tables):
            self._fetch(names)
        return dict(self._sums), dict(self._counts)

    def _fetch(self, names: tuple[str, ...]) -> None:
        sums, counts = self._tables.pop(names).tolist()
        for name, total, count in zip(names, sums, counts):
            if count:
                self._sums[name], self._counts[name] = total, count


def _weight(engine: Workflow) -> float:
    """Return the weight of the engine's batch: its number of samples, or of the blocks that they represent."""
    batch = engine.state.batch
    if isinstance(batch, Mapping) and BLOCK_WEIGHT in batch:
        return float(batch[BLOCK_WEIGHT].sum())
    return len(engine.state.output["image"])
