"""Fits, in each validation, how labels are read from several heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from volumen.data.sampling.regions import BLOCK_WEIGHT, RegionDataset
from volumen.handlers.validation import FINAL
from volumen.metrics.fusion import VoxelSample, crossed_gain, fitted_rule
from volumen.networks.fusion import FusionRules
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import mask_key

logger = logging.getLogger(__name__)


class FitFusion:
    """Fit a fusion for each target on the voxels of a validation, and measure its gain on voxels that did not fit it.

    The blocks form two halves, so that neighbours are mostly in the same one: the first blocks and the last ones; a
    single block is divided in the middle of its longest axis. Voxels are sampled as they come, so memory is bounded.
    The evaluator gets the metrics "<target>/fused_dice" and "<target>/fused_gain", see `Gain`.
    Checkpoints of an epoch contain the rules that its validation fitted.

    Args:
        fusions: target -> head -> sign of each channel; the target's own head first.
        always: targets whose fusion is used whether or not it helps.
        blocks: the data set of the validation.
    """

    def __init__(
        self,
        fusions: Mapping[str, Mapping[str, Sequence[int]]],
        always: Sequence[str] = (),
        blocks: RegionDataset | None = None,
    ) -> None:
        self.fusions = {name: dict(heads) for name, heads in fusions.items()}
        self.always, self.blocks = frozenset(always), blocks
        self._samples = {
            name: VoxelSample(sum(map(len, heads.values())), seed=distributed.rank())
            for name, heads in self.fusions.items()
        }
        self._half: dict[tuple[str, tuple[int, ...]], int] = {}
        self._fitted: tuple[int, FusionRules] = (-1, {})

    def rules(self, epoch: int) -> FusionRules:
        """Return the rules that the validation of an epoch fitted; empty without one."""
        return self._fitted[1] if self._fitted[0] == epoch else {}

    def attach(self, engine: Engine) -> None:
        """Collect voxels in every iteration of the evaluator, and fit when its epoch ends."""
        if self.fusions:
            engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._fit)

    def _clear(self, engine: Engine) -> None:
        for sample in self._samples.values():
            sample.clear()
        self._half = {}
        if self.blocks is not None and len(self.blocks) > 1:
            names = [case.name for case in self.blocks.cases]
            for number, block in enumerate(self.blocks.locations):
                place = names[block.case], tuple(map(int, block.start))
                self._half[place] = int(2 * number >= len(self.blocks))

    def _add(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        predictions, labels = output["pred"], output["label"]
        for name, heads in self.fusions.items():
            if name not in labels:
                continue
            mask = labels.get(mask_key(name))
            for i in range(len(labels[name])):
                truth = labels[name][i, 0] > 0
                known = torch.ones_like(truth) if mask is None else mask[i, 0].bool()
                weight = float(batch[BLOCK_WEIGHT][i]) if BLOCK_WEIGHT in batch else 1.0
                evidence = [
                    sign * _finest(predictions[head])[i, channel]
                    for head, signs in heads.items()
                    for channel, sign in enumerate(signs)
                ]
                for half, part in self._parts(batch, i, tuple(truth.shape)):
                    here = known[part]
                    values = torch.stack([one[part][here] for one in evidence]).float().cpu().numpy()
                    self._samples[name].add(values, truth[part][here].cpu().numpy(), half, weight)

    def _parts(self, batch: Any, i: int, shape: tuple[int, ...]) -> list[tuple[int, tuple[slice, ...]]]:
        """Return the half, or halves, that a block belongs to, with the part of it."""
        whole = [slice(None)] * len(shape)
        if self._half:
            return [(self._half[batch["volume_name"][i], tuple(batch["start"][i].tolist())], tuple(whole))]
        axis = int(np.argmax(shape))
        parts = []
        for half, side in enumerate((slice(None, shape[axis] // 2), slice(shape[axis] // 2, None))):
            parts.append((half, (*whole[:axis], side, *whole[axis + 1 :])))
        return parts

    def _fit(self, engine: Engine) -> None:
        rules: FusionRules = {}
        for name, heads in self.fusions.items():
            sample = self._samples[name]
            if distributed.is_distributed():
                others = distributed.gather(sample.rows)
                sample.clear()
                for rows in others:
                    sample.merge(rows)
            try:
                sample.check(f"targets.{name}.fuse")
            except VolumenError as error:
                logger.warning("%s", error)
                continue
            gain = crossed_gain(sample, own=0)
            engine.state.metrics[f"{name}/fused_dice"] = gain.fused
            engine.state.metrics[f"{name}/fused_gain"] = gain.gain
            used = gain.helps or name in self.always
            # The last scoring of a run changes no checkpoint.
            verdict = "" if getattr(engine.state, FINAL, False) else ": used" if used else ": not used"
            logger.info("  fusion of %s from %s: %s%s", name, ", ".join(heads), gain, verdict)
            if used:
                rules[name] = fitted_rule(sample, heads)
        self._fitted = (int(engine.state.epoch), rules)


def _finest(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list | tuple) else value
