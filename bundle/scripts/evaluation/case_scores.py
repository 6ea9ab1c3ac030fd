"""Scores that look around a voxel, of a case that is read block by block, and where its errors are."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from volumen.evaluation.cases import Details
from volumen.evaluation.error_places import (
    place_in_window,
    place_of_object,
    region_of_object,
    wide_array,
    wide_spacing,
)
from volumen.metrics.grid import Region, inside
from volumen.metrics.label_scores import LOCATED, LabelDetails, LabelScores
from volumen.metrics.objects.errors import ObjectError, object_errors
from volumen.metrics.objects.numbering import Masks, ObjectNumbers

if TYPE_CHECKING:
    from volumen.evaluation.cases import ScoredCase
    from volumen.metrics.target_metrics import TargetMetrics
    from volumen.metrics.topology.blocks import Topology

logger = logging.getLogger(__name__)

LISTED = 50
"""Errors of each kind that are listed for a case, target and class, those of the most voxels first."""


class MaskReader:
    """Masks of one class of a case, in regions with three axes.

    The last region stays in memory, decided, so that other classes and smaller regions within it cost no reading.

    Args:
        case: what is read.
        metrics: decides which voxels are of a class.
    """

    def __init__(self, case: ScoredCase, metrics: TargetMetrics) -> None:
        self._case, self._metrics = case, metrics
        self._region: Region | None = None
        self._arrays: tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]

    @classmethod
    def of(cls, case: ScoredCase, threshold: float) -> MaskReader:
        """Return the reader of a case by itself.

        Args:
            case: what is read.
            threshold: probability from which on a voxel is foreground.
        """
        from volumen.metrics.target_metrics import build_metrics

        return cls(case, build_metrics({case.target: case.as_target}, threshold=threshold))

    def of_class(self, label: str, region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return prediction, truth and known voxels of a class, each bool (Z, Y, X)."""
        if self._region is None or not _holds(self._region, region):
            masks, known = self._read(region)
            if self._region is None or _size(region) >= _size(self._region) // 2:
                self._region, self._arrays = region, (masks, known)
            return (*masks[label], known)
        part = inside(region, self._region)
        masks, known = self._arrays
        pred, truth = masks[label]
        return pred[part], truth[part], known[part]

    def _read(self, region: Region) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
        axes = len(self._case.prediction.shape)
        shape = tuple(part.stop - part.start for part in region)
        found, truth, known = self._case.read(region[3 - axes :])
        masks = self._metrics.label_masks(self._case.target, found, truth)
        wide = {label: (pred.reshape(shape), true.reshape(shape)) for label, pred, true in masks}
        return wide, known.reshape(shape)


def _size(region: Region) -> int:
    return int(np.prod([part.stop - part.start for part in region]))


def _holds(outer: Region, region: Region) -> bool:
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(outer, region, strict=True))


def score_regions(
    case: ScoredCase, metrics: TargetMetrics, spacing: Sequence[float] | None
) -> tuple[dict[str, Details], dict[str, ObjectNumbers], dict[str, float]]:
    """Put the scores of a case into the metrics.

    Args:
        case: a case of labels.
        metrics: what is measured.
        spacing: voxel size.

    Returns:
        class to details, {} without a known voxel; class to the numbers of the objects that the details name; part of
        the work to its CPU seconds.
    """
    shape = case.prediction.shape
    settings = metrics.settings(case.target, len(shape), spacing)
    if not settings.names:
        return {}, {}, {}
    reader = MaskReader(case, metrics)
    scores = {label: LabelScores(shape, settings) for label in metrics.targets[case.target].classes}
    grid = next(iter(scores.values())).grid
    for number in grid:
        for label, tally in scores.items():
            tally.add(number, partial(reader.of_class, label))
    found: dict[str, Details] = {}
    numbers: dict[str, ObjectNumbers] = {}
    seconds: dict[str, float] = {}
    for label, tally in scores.items():
        if not tally.voxels["known"]:
            continue
        values, details = tally.result(partial(reader.of_class, label))
        metrics.put(case.target, label, case.name, values)
        before = time.process_time()
        masks = partial(reader.of_class, label)
        found[label] = _label_details(case, details, masks, spacing)
        kept = _named_objects(found[label]["objects"])
        numbers[label] = details.numbers.only(*kept)
        seconds["places"] = seconds.get("places", 0.0) + time.process_time() - before
        for part, cost in tally.seconds.items():
            seconds[part] = seconds.get(part, 0.0) + cost
    return found, numbers, seconds


def _named_objects(rows: Sequence[Details]) -> tuple[set[int], set[int]]:
    """Return the predicted and the true objects that errors name."""
    pred: set[int] = set()
    truth: set[int] = set()
    for row in rows:
        own, other = (pred, truth) if row["error"] in ("merged", "added") else (truth, pred)
        own.add(row["number"])
        other.update(row["parts"])
    return pred, truth


def _label_details(
    case: ScoredCase, details: LabelDetails, masks: Masks, spacing: Sequence[float] | None
) -> Details:
    sides = wide_spacing(spacing, len(case.region))
    numbering = partial(details.numbers.read, masks=masks)
    errors = details.errors.worst(LISTED)
    places = {
        (error.error, error.number): place_of_object(
            error, details.blocks[error.error, error.number], numbering, sides
        )
        for error in errors
        if (error.error, error.number) in details.blocks
    }
    return {
        "topology": {"prediction": _topology(details.pred), "truth": _topology(details.truth)},
        "objects": _objects(case, errors, places),
        "cavities": {
            side: [
                {"voxels": int(row[0]), "low": _place(case, row[1:4]), "high": _place(case, row[4:7])}
                for row in topology.cavity_boxes[:LISTED]
            ]
            for side, topology in (("prediction", details.pred), ("truth", details.truth))
        },
        "windows": {
            str(side): [_window(case, row, side, masks, sides) for row in details.worst_windows(side, LISTED)]
            for side in details.windows
        },
    }


def _window(case: ScoredCase, row: np.ndarray, side: int, masks: Masks, spacing: Sequence[float]) -> Details:
    """Return a window with errors of topology: its box, its numbers, and its most wrong voxel."""
    shape = (1,) * (3 - len(case.region)) + tuple(case.prediction.shape)
    region = tuple(slice(int(at), min(int(at) + side, n)) for at, n in zip(row[:3], shape, strict=True))
    place = place_in_window(region, masks, spacing)
    return {
        "low": _place(case, row[:3]),
        "high": _place(case, [part.stop for part in region]),
        "place": None if place is None else _place(case, place),
        "prediction": [int(v) for v in row[3:6]],
        "truth": [int(v) for v in row[6:9]],
    }


def instance_details(case: ScoredCase, table: np.ndarray, spacing: Sequence[float] | None) -> Details:
    """Return the wrong objects of a case of instances.

    Args:
        case: what was scored.
        table: overlaps of its objects, see `overlaps`.
        spacing: voxel size.
    """
    errors = object_errors(table)
    sides = wide_spacing(spacing, len(case.region))
    shape = (1,) * (3 - len(case.region)) + tuple(case.prediction.shape)
    numbering = partial(instances_at, case)
    places = {
        (error.error, error.number): place_of_object(
            error, region_of_object(error, table, shape), numbering, sides
        )
        for error in errors.worst(LOCATED)
    }
    return {"objects": _objects(case, errors.worst(LISTED), places)}


def instances_at(case: ScoredCase, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted and true instances of a region (Z, Y, X) of a case, int64, 0 where nothing is known."""
    found, truth, known = case.read(region[3 - len(case.region) :])
    return wide_array(found[0] * known), wide_array(truth[0] * known)


def _topology(topology: Topology) -> dict[str, int]:
    return {"b0": topology.b0, "b1": topology.b1, "b2": topology.b2, "euler": topology.euler}


def _objects(
    case: ScoredCase, errors: Sequence[ObjectError], places: Mapping[tuple[str, int], Sequence[int]]
) -> list[Details]:
    found = []
    for error in errors:
        place = places.get((error.error, error.number))
        found.append(
            {
                "error": error.error,
                "number": error.number,
                "voxels": error.voxels,
                "wrong": error.wrong,
                "low": _place(case, error.low),
                "high": _place(case, error.high),
                "place": None if place is None else _place(case, place),
                "parts": list(error.parts[:LISTED]),
            }
        )
    return found


def _place(case: ScoredCase, voxel: Sequence[int] | np.ndarray) -> list[int]:
    """Return a place of the prediction as one of the label's volume, in its own axes."""
    axes = len(case.region)
    start = [part.start for part in case.region]
    return [int(v) + s for v, s in zip(list(voxel)[3 - axes :], start, strict=True)]
