"""Refuses what gives no scores, or scores without a meaning: empty volumes, and classes scored as instances."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from volumen.inference.windows.heads import PROBABILITIES
from volumen.metrics.grid import BlockGrid
from volumen.metrics.objects.contingency import PRED, TRUTH, objects_of
from volumen.metrics.topology.components import ComponentJoin, label_components
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.evaluation.cases import ScoredCase

logger = logging.getLogger(__name__)

BLOCK = 128
"""Voxels per axis of the blocks in which pieces of a class are counted, in an image 16 times as many."""


def holds_anything(
    case: ScoredCase, found: np.ndarray, truth: np.ndarray, known: np.ndarray, threshold: float
) -> bool:
    """Return whether prediction or truth have a known voxel of an object or class; regressions always do.

    Args:
        case: what is scored.
        found: prediction (C, *box).
        truth: truth (Ct, *box).
        known: bool (*box).
        threshold: probability from which on a voxel is foreground.
    """
    if case.kind not in (*PROBABILITIES, "instances"):
        return True
    if ((truth != 0).any(axis=0) & known).any():
        return True
    if case.kind == "multiclass" and len(found) > 1:
        return bool(((found.argmax(axis=0) > 0) & known).any())
    least = threshold if case.scale else 1
    return bool(((found >= least).any(axis=0) & known).any())


Seen = Mapping[str, tuple[int, int]]
"""Case and target to how many of its pieces have a known voxel, and how many hold foreground of either side."""


def refuse_nothing(labels: str, seen: Seen) -> None:
    """Refuse cases that are all masked out, or all empty.

    Args:
        labels: one of the labels, for the message.
        seen: what the pieces of the cases hold.

    Raises:
        VolumenError: no piece has a known voxel, or none holds foreground.
    """
    count = "it" if len(seen) == 1 else f"all {len(seen)} cases"
    if not any(known for known, _ in seen.values()):
        raise VolumenError(
            labels, f"nothing to score: every voxel of {count} is masked out or ignored",
            remedy="check --masks and --ignore-label",
        )  # fmt: skip
    if not any(filled for _, filled in seen.values()):
        raise VolumenError(
            labels, f"nothing to score: prediction and label of {count} are empty",
            remedy="check the paths, and --threshold where probabilities were predicted",
        )  # fmt: skip


def warn_of_nothing(seen: Seen) -> None:
    """Warn of cases in which there is nothing to score."""
    for name, (known, filled) in seen.items():
        if not known:
            logger.warning("%s: every voxel is masked out or ignored, so it is not scored", name)
        elif not filled:
            logger.warning("%s: prediction and label are empty, so most scores are undefined", name)


def refuse_class_map(case: ScoredCase, table: np.ndarray) -> None:
    """Refuse a class scored against instances: the value 1 alone, in several pieces, where the other side numbers.

    A single object of a single piece is scored, with a warning where the other side has several.

    Args:
        case: a case of instances.
        table: overlaps of its objects, see `overlaps`.

    Raises:
        VolumenError: prediction or label is a class.
    """
    numbers = {side: objects_of(table, side)[0].tolist() for side in (PRED, TRUTH)}
    for side, other, path, what in (
        (TRUTH, PRED, case.label.path, "label"),
        (PRED, TRUTH, case.prediction.path, "prediction"),
    ):
        if numbers[side] != [1] or len(numbers[other]) < 2:
            continue
        pieces = _pieces(case, side)
        if pieces > 1:
            raise VolumenError(
                path,
                expected=f"numbers of instances, as the {'prediction' if side == TRUTH else 'label'} has",
                found=f"the value 1 alone in {pieces} pieces, which is a class",
                remedy=f"leave {case.target} out of --instances, or number the objects of the {what}",
            )
        logger.warning(
            "%s: the value 1 alone where the other side numbers %d instances", path, len(numbers[other])
        )


def _pieces(case: ScoredCase, side: int) -> int:
    """Return how many connected components prediction or truth have, 26 neighbours, block by block."""
    shape = case.prediction.shape
    grid = BlockGrid.of(shape, BLOCK if len(shape) == 3 else 16 * BLOCK)
    join = ComponentJoin(grid)
    for number in grid:
        region = grid.around(grid.box(number), 0, 1)
        found, truth, known = case.read(region[3 - len(shape) :])
        mask = ((truth if side == TRUTH else found)[0] != 0) & known
        wide = mask.reshape([part.stop - part.start for part in region])
        join.add(number, *label_components(wide, 26))
    return len(np.unique(join.roots()))
