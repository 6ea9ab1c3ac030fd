"""Metrics that need a whole region at once, of predictions that come in blocks."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from volumen.metrics.grid import Region
from volumen.metrics.label_scores import LabelScores
from volumen.metrics.score_names import LABELS, family_of, measures, names_of
from volumen.metrics.target_metrics import CHEAP_METRICS, build_metrics

MOST_VOXELS = 2**27
"""Voxels of a region that is assembled as a whole."""


def measured_names(targets: Mapping[str, Mapping[str, Any]], names: Sequence[str] | None = None) -> list[str]:
    """Return the names of all scores that a validation measures.

    Args:
        targets: as `build_metrics` takes them.
        names: metrics besides those that cost one pass over the arrays.
    """
    found = list(build_metrics(targets, names=CHEAP_METRICS).compute())
    wanted = [name for name in names or () if name not in names_of(LABELS, pieces=True)]
    more = WholeRegions(targets, None, wanted).compute() if wanted else {}
    return [*found, *(name for name in more if name not in found)]


@dataclass(frozen=True)
class _Block:
    """A block's labels: where it starts, predicted and true classes (C, *size), and known voxels (*size).

    And the voxel size of its volume, None for that of the others.
    """

    start: tuple[int, ...]
    pred: np.ndarray
    truth: np.ndarray
    known: np.ndarray
    spacing: tuple[float, ...] | None = None


class WholeRegions:
    """Keeps the blocks of labels and scores each case once they are put together.

    Distances to a surface and skeletons look far around a voxel, so blocks must not be scored one by one. What no
    block covers is unknown. Memory: three bytes for every voxel of the regions, target and channel, and `MOST_VOXELS`
    at most of what lies between blocks. If the box around all blocks of a case has more voxels, as around a few blocks
    drawn from a huge volume, each connected group of blocks is a region of its own, and the score of the case is the
    mean over them; a group with a larger box is read block by block, with the same result.

    Args:
        targets: as `build_metrics` takes them; those that are no labels are left out.
        spacing: voxel size in spatial order of volumes that come without one; None is 1.
        names: metrics of labels.
        tolerance: of the surface Dice, in units of the spacing; None: one voxel.
    """

    def __init__(
        self,
        targets: Mapping[str, Mapping[str, Any]],
        spacing: Sequence[float] | None,
        names: Sequence[str],
        tolerance: float | None = None,
    ) -> None:
        labels = {
            name: target for name, target in targets.items() if family_of(str(target["kind"])) == LABELS
        }
        wanted = [name for name in names if measures(name, LABELS)]
        self._metrics = build_metrics(labels, spacing, names=wanted, tolerance=tolerance)
        self.reset()

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that are scored."""
        return tuple(self._metrics.targets)

    def reset(self) -> None:
        """Forget all blocks."""
        self._blocks: dict[tuple[str, Hashable], list[_Block]] = {}

    def add(
        self,
        target: str,
        case: Hashable,
        start: Sequence[int],
        pred: np.ndarray,
        truth: np.ndarray,
        known: np.ndarray | None = None,
        spacing: Sequence[float] | None = None,
    ) -> None:
        """Add a block.

        Args:
            target: one of `targets`.
            case: which volume it is of.
            start: its first voxel in the volume.
            pred: decided labels (C, *size): class indices, or 0 and 1.
            truth: labels (C, *size).
            known: bool (*size), or None for all.
            spacing: voxel size of the volume; None: that given at construction.
        """
        known = np.ones(pred.shape[1:], bool) if known is None else known.astype(bool)
        block = _Block(
            tuple(int(s) for s in start),
            _small(pred),
            _small(truth),
            known,
            tuple(spacing) if spacing else None,
        )
        self._blocks.setdefault((target, case), []).append(block)

    def state(self) -> Any:
        """Return the blocks, to be merged in another process."""
        return self._blocks

    def merge(self, state: Any) -> None:
        """Add the blocks of another process."""
        for key, blocks in state.items():
            self._blocks.setdefault(key, []).extend(blocks)

    def compute(self) -> dict[str, float]:
        """Return every metric as its mean over cases, keyed as of `TargetMetrics.compute`."""
        self._metrics.reset()
        for (target, case), blocks in sorted(self._blocks.items(), key=lambda item: str(item[0])):
            for group in [blocks] if _box_voxels(blocks) <= MOST_VOXELS else connected_groups(blocks):
                if _box_voxels(group) <= MOST_VOXELS:
                    self._score(target, case, group)
                else:
                    self._stream(target, case, group)
        return self._metrics.compute()

    def _score(self, target: str, case: Hashable, blocks: Sequence[_Block]) -> None:
        pred, truth, known = _assembled(blocks, *_box(blocks))
        self._metrics.update(
            {target: pred[None]},
            {target: truth[None]},
            {target: known[None, None]},
            cases=[case],
            spacing=blocks[0].spacing,
        )

    def _stream(self, target: str, case: Hashable, blocks: Sequence[_Block]) -> None:
        """Score a region without assembling it as a whole."""
        low, high = _box(blocks)
        shape = tuple(int(size) for size in high - low)
        settings = self._metrics.settings(target, len(shape), blocks[0].spacing or self._metrics.spacing)
        labels = self._metrics.targets[target].classes
        scores = {label: LabelScores(shape, settings) for label in labels}

        def read(label: str, region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            own = region[3 - len(shape) :]
            first = low + [part.start for part in own]
            pred, truth, known = _assembled(blocks, first, low + [part.stop for part in own])
            size = tuple(part.stop - part.start for part in region)
            masks = {name: (one, two) for name, one, two in self._metrics.label_masks(target, pred, truth)}
            one, two = masks[label]
            return one.reshape(size), two.reshape(size), known.reshape(size)

        for label, tally in scores.items():
            for number in tally.grid:
                tally.add(number, partial(read, label))
            if tally.voxels["known"]:
                values, _ = tally.result(partial(read, label))
                self._metrics.put(target, label, case, values)


def connected_groups(blocks: Sequence[_Block]) -> list[list[_Block]]:
    """Divide blocks into groups in which each touches or overlaps another one, also at an edge or corner."""
    starts = np.array([block.start for block in blocks])
    stops = starts + np.array([block.known.shape for block in blocks])
    left, groups = set(range(len(blocks))), []
    while left:
        group, waiting = [], [min(left)]
        left.discard(waiting[0])
        while waiting:
            one = waiting.pop()
            group.append(one)
            rest = np.array(sorted(left), int)
            near = (starts[rest] <= stops[one]).all(axis=1) & (stops[rest] >= starts[one]).all(axis=1)
            waiting += rest[near].tolist()
            left.difference_update(rest[near].tolist())
        groups.append([blocks[number] for number in sorted(group)])
    return groups


def _small(labels: np.ndarray) -> np.ndarray:
    """Return labels as uint8; an ignored value beyond that, which no mask leaves known, may become any other."""
    return labels.astype(np.uint8)


def _box(blocks: Sequence[_Block]) -> tuple[np.ndarray, np.ndarray]:
    """Return first and end voxel of the smallest box that holds all blocks."""
    low = np.min([block.start for block in blocks], axis=0)
    high = np.max([np.add(block.start, block.known.shape) for block in blocks], axis=0)
    return low, high


def _box_voxels(blocks: Sequence[_Block]) -> int:
    low, high = _box(blocks)
    return math.prod(int(size) for size in high - low)


def _assembled(
    blocks: Sequence[_Block], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return prediction, truth (C, *box) and known (*box) of a box; what no block covers is unknown."""
    box = tuple(int(size) for size in high - low)
    pred = np.zeros((len(blocks[0].pred), *box), np.uint8)
    truth = np.zeros((len(blocks[0].truth), *box), np.uint8)
    known = np.zeros(box, bool)
    for block in blocks:
        begin = np.maximum(block.start, low)
        end = np.minimum(np.add(block.start, block.known.shape), high)
        if (begin >= end).any():
            continue
        part, own = (
            tuple(slice(int(a), int(b)) for a, b in zip(begin - first, end - first, strict=True))
            for first in (low, np.asarray(block.start))
        )
        pred[(slice(None), *part)] = block.pred[(slice(None), *own)]
        truth[(slice(None), *part)] = block.truth[(slice(None), *own)]
        known[part] |= block.known[own]
    return pred, truth, known
