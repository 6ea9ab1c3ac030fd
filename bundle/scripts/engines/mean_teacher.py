"""A mean teacher: the running average of the weights labels unlabelled patches, and the network learns from it.

Tarvainen & Valpola 2017 (arXiv:1703.01780). Of every unlabelled patch there are two views on the same grid, one with
changed intensities. The teacher predicts the unchanged one, the network (its student) the changed one, and both are
compared voxel by voxel. A box of the student's view may come from another patch (CutMix, French et al. 2020,
arXiv:1906.01916); what the teacher says is then put together by the same box.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.func import functional_call

from volumen.losses.base import LABEL_KINDS
from volumen.losses.consistency import consistency, entropy, teaching
from volumen.losses.masking import zero_of
from volumen.networks.placement import unwrap
from volumen.utils import distributed
from volumen.utils.sample_keys import STRONG, UNLABELLED, WEAK, mask_key

logger = logging.getLogger(__name__)

SURE_START = 0.75
"""Share of the largest entropy below which a voxel is certain when the training begins (Yu et al. 2019)."""
MIXED_SHARE = 0.5
"""Share of a patch's voxels in the box of another patch, the mean of French et al. 2020."""
COLLAPSED_SHARE = 1e-4
"""A teacher whose decisions for all but one class together are rarer than this has collapsed ..."""
LABELLED_SHARE = 1e-2
"""... if at least this share of the labelled voxels has another class."""


class Averaged(Protocol):
    """What holds the teacher's weights, such as `volumen.handlers.weight_average.WeightAverage`."""

    average: dict[str, Tensor]


@dataclass
class _Decisions:
    """Voxels by class: those that the teacher decided, and those of the labels; they stay on the device."""

    taught: dict[str, Tensor] = field(default_factory=dict)
    labelled: dict[str, Tensor] = field(default_factory=dict)


class MeanTeacher:
    """Computes what a network learns from the unlabelled patches of a batch.

    The weight of the consistency is `weight * exp(-5 (1 - t)^2)`; t rises from 0 to 1 over the first `ramp_up` of the
    training. With `uncertainty`, voxels count whose entropy, by the teacher, is below a limit that rises from 3/4 of
    the largest entropy to the largest (Yu et al. 2019, arXiv:1907.07034, who estimate the entropy from eight passes
    with dropout; here it is that of the one pass of the averaged weights).

    With several processes the loss is the mean of their losses.

    A teacher that decides one class everywhere, in an epoch after the ramp-up, although the labels have several, has
    collapsed: the training says so and goes on without it.

    Args:
        average: holds the teacher's weights.
        kinds: kind of each target whose head learns from the teacher.
        target_weights: weight of each of these targets; None or a missing one: 1.
        weight: of the consistency after the ramp-up.
        ramp_up: share of the training.
        uncertainty: leave out voxels of which the teacher is uncertain.
        mix: probability of a box from another patch.
    """

    def __init__(
        self,
        average: Averaged,
        kinds: Mapping[str, str],
        *,
        target_weights: Mapping[str, float] | None = None,
        weight: float = 10.0,
        ramp_up: float = 0.3,
        uncertainty: bool = False,
        mix: float = 0.5,
    ) -> None:
        for name, value in (("ramp_up", ramp_up), ("mix", mix)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        self.average, self.kinds = average, dict(kinds)
        self.target_weights = dict(target_weights or {})
        self.weight, self.ramp_up, self.uncertainty, self.mix = weight, ramp_up, uncertainty, mix
        self.collapsed = False
        self._decided = _Decisions()

    def take(self, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Remove the views of the unlabelled patches from a batch; None if it has none, or the teacher has collapsed.

        Returns:
            The view for the teacher and the one for the student, each (U, C, *patch).
        """
        weak, strong = targets.get(WEAK), targets.get(STRONG)
        for key in [key for key in targets if key.startswith(UNLABELLED)]:
            del targets[key]
        return None if self.collapsed or weak is None or strong is None else (weak, strong)

    def loss(self, engine: SupervisedTrainer, views: tuple[Tensor, Tensor]) -> Tensor:
        """Return the weighted consistency of the student with the teacher: a float32 scalar with gradients.

        Args:
            engine: the trainer, whose network is in training mode.
            views: the result of `take`.
        """
        weak, strong = views
        rise = self.rise(engine)
        outputs = self._teach(engine.network, weak)
        taught = {name: teaching(outputs[name], kind) for name, kind in self.kinds.items()}
        self._count(taught)
        certain = self._certain(taught, rise) if self.uncertainty else {}
        box = self._box(strong)
        if box is not None:
            strong = _mixed(strong, box)
            taught = {name: _mixed(one, box) for name, one in taught.items()}
            certain = {name: _mixed(one, box) for name, one in certain.items()}
        student = engine.inferer(strong, engine.network)
        # Every head belongs to the graph, since distributed training waits for the gradients of all of them.
        total = sum((zero_of(_finest(output)) for output in student.values()), zero_of(strong))
        for name, kind in self.kinds.items():
            difference = consistency(_finest(student[name]), taught[name], kind, certain.get(name))
            total = total + self.target_weights.get(name, 1.0) * difference
        return total * (self.weight * rise)

    def rise(self, engine: SupervisedTrainer) -> float:
        """Return the share of the weight that counts at the trainer's iteration."""
        return math.exp(-5 * (1 - self._progress(engine)) ** 2)

    def _progress(self, engine: SupervisedTrainer) -> float:
        steps = self.ramp_up * engine.state.max_epochs * engine.state.epoch_length
        return 1.0 if steps <= 0 else min(1.0, (engine.state.iteration - 1) / steps)

    @torch.no_grad()
    def _teach(self, network: nn.Module, image: Tensor) -> Mapping[str, Tensor]:
        if not self.average.average:
            raise RuntimeError(
                "a mean teacher needs the running average of the weights (tr_config.ema_decay)"
            )
        alone = unwrap(network)
        alone.eval()
        try:
            outputs = functional_call(alone, self.average.average, (image,))
        finally:
            alone.train()
        return {name: _finest(output) for name, output in outputs.items()}

    def _certain(self, taught: Mapping[str, Tensor], rise: float) -> dict[str, Tensor]:
        limit = SURE_START + (1 - SURE_START) * rise
        return {
            name: (entropy(taught[name], kind) < limit).float()
            for name, kind in self.kinds.items()
            if kind in LABEL_KINDS
        }

    def _box(self, image: Tensor) -> tuple[slice, ...] | None:
        """Draw the box that comes from another patch, by the generator that is seeded for every iteration."""
        drawn = torch.rand(1 + image.dim() - 2)
        if len(image) < 2 or drawn[0] >= self.mix:
            return None
        part = MIXED_SHARE ** (1 / (image.dim() - 2))
        sides = [max(1, round(part * size)) for size in image.shape[2:]]
        starts = [
            int(where * (size - side + 1))
            for where, size, side in zip(drawn[1:].tolist(), image.shape[2:], sides)
        ]
        return tuple(slice(start, start + side) for start, side in zip(starts, sides))

    def _count(self, taught: Mapping[str, Tensor]) -> None:
        """Count the voxels of every class that the teacher decides."""
        for name, kind in self.kinds.items():
            if kind in LABEL_KINDS:
                _add(self._decided.taught, name, _class_counts(taught[name], kind))

    def count_labels(self, targets: Mapping[str, Tensor]) -> None:
        """Count the labelled voxels of every class in a batch."""
        for name, kind in self.kinds.items():
            if kind in LABEL_KINDS and name in targets and not self.collapsed:
                _add(self._decided.labelled, name, _label_counts(targets, name))

    def end_epoch(self, engine: SupervisedTrainer) -> None:
        """Recognise a collapse in the epoch whose last step was just done; every process must call this."""
        decided, self._decided = self._decided, _Decisions()
        length = engine.state.epoch_length
        after = self.ramp_up * engine.state.max_epochs * length
        if self.collapsed or engine.state.iteration - length < after or not engine.state.max_epochs:
            return
        taught, labelled = _variety(decided.taught), _variety(decided.labelled)
        for name in taught:
            if taught[name] <= COLLAPSED_SHARE and labelled.get(name, 0.0) >= LABELLED_SHARE:
                self.collapsed = True
                logger.warning(
                    "epoch %d: the teacher of %s predicts one class everywhere in the unlabelled patches, though %.2g"
                    " of the labelled voxels differ from the rest: training goes on without unlabelled patches; lower"
                    " tr_config.unlabelled.weight, or give more labels",
                    engine.state.epoch,
                    name,
                    labelled[name],
                )

    def state_dict(self) -> dict[str, Any]:
        """Return whether the teacher has collapsed, and the counts of the epoch so far."""
        return {
            "collapsed": self.collapsed,
            "taught": {name: counts.tolist() for name, counts in self._decided.taught.items()},
            "labelled": {name: counts.tolist() for name, counts in self._decided.labelled.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.collapsed = bool(state["collapsed"])
        self._decided = _Decisions(
            *(
                {name: torch.tensor(counts) for name, counts in state[key].items()}
                for key in ("taught", "labelled")
            )
        )


def _finest(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _mixed(values: Tensor, box: tuple[slice, ...]) -> Tensor:
    """Return a batch in which a box of each sample comes from the next sample."""
    mixed = values.clone()
    inside = (slice(None), slice(None), *box)
    mixed[inside] = values.roll(-1, dims=0)[inside]
    return mixed


def _class_counts(probability: Tensor, kind: str) -> Tensor:
    """Return how many voxels have each class, or each map, and how many have not: int64 (C, 2)."""
    if kind == "multiclass":
        chosen = probability.argmax(dim=1)
        counts = torch.bincount(chosen.flatten(), minlength=probability.shape[1])
        return torch.stack([counts, chosen.numel() - counts], dim=1)
    positive = (probability > 0.5).transpose(0, 1).flatten(1).sum(dim=1)
    return torch.stack([positive, probability[:, :1].numel() - positive], dim=1)


def _label_counts(targets: Mapping[str, Tensor], name: str) -> Tensor:
    """Return how many known voxels have a label above 0, and how many have not: int64 (1, 2)."""
    label, mask = targets[name], targets.get(mask_key(name))
    labelled = (label > 0).any(dim=1, keepdim=True)
    known = torch.ones_like(labelled) if mask is None else mask.bool()
    return torch.stack([(known & labelled).sum(), (known & ~labelled).sum()])[None]


def _add(counts: dict[str, Tensor], name: str, more: Tensor) -> None:
    counts[name] = counts[name].to(more.device) + more if name in counts else more


def _variety(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return by target, over all processes, the largest share of voxels that differ from the others in some class."""
    flat = {
        f"{i} {k} {name}": float(value)
        for name, one in counts.items()
        for i, row in enumerate(one.tolist())
        for k, value in enumerate(row)
    }
    total = distributed.sum_over_ranks(flat)
    return {
        name: max(
            min(total[f"{i} 0 {name}"], total[f"{i} 1 {name}"])
            / max(1.0, total[f"{i} 0 {name}"] + total[f"{i} 1 {name}"])
            for i in range(len(one))
        )
        for name, one in counts.items()
    }
