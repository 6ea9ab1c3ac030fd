"""Warns of heads for which the validation data have no valid voxel."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events

from volumen.data.sampling.regions import RegionDataset
from volumen.utils import distributed
from volumen.utils.sample_keys import confidence_key, mask_key

logger = logging.getLogger(__name__)


class EmptyHeads:
    """Warn once of every head without a valid voxel in a complete validation, and name the cause; it has no scores.

    Args:
        targets: name -> {"source_target": name of the labelled target that it is derived from, or None}.
        blocks: the data set of the validation.
    """

    def __init__(self, targets: Mapping[str, Mapping[str, Any]], blocks: RegionDataset) -> None:
        self.sources = {name: target.get("source_target") for name, target in targets.items()}
        self.blocks = blocks
        self._valid: dict[str, torch.Tensor] = {}
        self._informed: set[str] = set()
        self._warned: set[str] = set()

    def attach(self, engine: Engine) -> None:
        """Check the masks of every batch of the evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._warn)

    def _clear(self, engine: Engine) -> None:
        self._valid = {}

    def _add(self, engine: Engine) -> None:
        output: Any = engine.state.output
        labels = output["label"]
        for name in self.sources:
            if confidence_key(name) in labels:
                self._informed.add(name)
            mask = labels.get(mask_key(name))
            if mask is not None:
                # The result stays on the device, because copying it to the host would wait for the device.
                found = mask.any()
                self._valid[name] = self._valid[name] | found if name in self._valid else found

    def _warn(self, engine: Engine) -> None:
        counted = distributed.sum_over_ranks({name: float(value) for name, value in self._valid.items()})
        for name, ranks in counted.items():
            if not ranks and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "validation: %s has no valid voxel, so it has no scores: %s",
                    name,
                    self._why(name, counted),
                )

    def _why(self, name: str, counted: Mapping[str, float]) -> str:
        source = self.sources[name]
        if source is None or not counted.get(source, 0.0):
            of_it = "it" if source is None else f"{source}, which it is derived from,"
            return (
                f"no voxel of {of_it} is known in {self.blocks.describe()}; check labels/, masks/ and ignore_label, or "
                "choose another tr_setup.seed or tr_val_split"
            )
        if name in self._informed:
            return (
                f"near unknown voxels of {source} it learns from bounds and estimates, and scores compare exact values"
                " only; label a thicker part to score it"
            )
        return (
            f"it is derived from {source} within a reach that nowhere in the validation part lies inside the known "
            f"voxels and near a surface; label a thicker part, or set a smaller auxiliary_tasks.{name}.reach"
        )
