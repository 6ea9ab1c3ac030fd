"""Errors of cases by the geometry around them, and labels that may be wrong: streamed by blocks with a halo."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volumen.evaluation.diagnosis import Diagnosis, Listed
from volumen.evaluation.diagnostics.suspect_files import SuspectVolume, remove_earlier
from volumen.inference.windows.heads import PROBABILITIES
from volumen.metrics.geometry.scale import Scale
from volumen.metrics.geometry.suspects import (
    MISSING,
    WRONG,
    Suspect,
    SuspectPiece,
    SuspectTally,
    piece_region,
)
from volumen.metrics.geometry.tally import Piece
from volumen.metrics.grid import BlockGrid, Region, three_axes
from volumen.metrics.label_scores import BLOCK, FLAT_BLOCK
from volumen.metrics.objects.contingency import PRED, TRUTH, VOXELS
from volumen.metrics.units import length_unit, short_unit
from volumen.utils import distributed
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.evaluation.cases import ScoredCase
    from volumen.evaluation.request import EvaluateRequest
    from volumen.metrics.target_metrics import TargetMetrics

logger = logging.getLogger(__name__)

LISTED = 50
"""Suspects of each kind that are listed for a case, target and class."""


def empty_diagnosis(scored: Sequence[ScoredCase], request: EvaluateRequest) -> Diagnosis:
    """Return a diagnosis of cases without anything found yet; what an earlier one wrote there is removed."""
    folder = Path(request.output) / "suspects"
    if distributed.is_main():
        remove_earlier(folder)
    distributed.barrier()
    sizes = [case.spacing or (1.0,) for case in scored]
    finest = min(request.spacing or [side for size in sizes for side in size])
    return Diagnosis(finest, folder)


def diagnose(
    case: ScoredCase, metrics: TargetMetrics, spacing: Sequence[float] | None, diagnosis: Diagnosis
) -> None:
    """Count the errors of a case and look for suspects; cases of other kinds than labels have neither.

    Args:
        case: labels or instances.
        metrics: decides which voxels are of a class, and knows which objects overlap.
        spacing: voxel size; None is 1.
        diagnosis: where the findings are put.
    """
    if case.kind not in PROBABILITIES and case.kind != "instances":
        return
    shape = case.prediction.shape
    size = tuple(float(side) for side in spacing or (1.0,) * len(shape))
    unit = length_unit(case.stated_unit, spacing)
    diagnosis.units[case.target] = short_unit(unit)
    blocks = _CaseBlocks(case, metrics, Scale(size))
    suspects = {
        label: [SuspectTally(blocks.grid, blocks.scale, kind) for kind in (MISSING, WRONG)]
        for label in blocks.classes
    }
    for number in blocks.grid:
        for label, piece in blocks.pieces(number):
            diagnosis.tally(case.target, label).add(piece, blocks.scale, blocks.borders)
        for label, suspect_piece in blocks.suspect_pieces(number):
            for side in suspects[label]:
                side.add(number, suspect_piece)
    for label, sides in suspects.items():
        diagnosis.suspects += _listed(case, label, sides, blocks, diagnosis)


def _listed(
    case: ScoredCase, label: str, sides: Sequence[SuspectTally], blocks: _CaseBlocks, diagnosis: Diagnosis
) -> list[Listed]:
    """Return the suspects of a class of a case, and write the volume in which they are numbered."""
    lists = [side.suspects(LISTED) for side in sides]
    if not any(lists):
        return []
    volume = SuspectVolume(case, label, diagnosis.folder, blocks.scale.spacing)
    places: dict[int, tuple[float, tuple[int, ...]]] = {}
    first = 1
    for side, found in zip(sides, lists, strict=True):
        rank = {suspect.number: first + i for i, suspect in enumerate(found)}
        for number in _blocks_of(found, blocks.grid):
            piece = dict(blocks.suspect_pieces(number))[label]
            own = tuple(slice(0, part.stop - part.start) for part in piece.box)
            numbers = side.numbers(number, side.components(piece)[0][own])
            ranks = _ranked(numbers, rank)
            volume.add(piece.box, ranks)
            _nearest_to_centres(ranks, piece.box, found, first, blocks.scale, places)
        first += len(found)
    unit = diagnosis.units[case.target]
    every = enumerate((suspect for found in lists for suspect in found), start=1)
    rows = [_placed(case, label, suspect, i, places[i][1], blocks.scale, unit) for i, suspect in every]
    volume.write_points(rows)
    return rows


class _CaseBlocks:
    """The blocks of a case, with all that diagnostics need of them.

    Args:
        case: what is read.
        metrics: decides which voxels are of a class.
        scale: voxel sizes.
    """

    def __init__(self, case: ScoredCase, metrics: TargetMetrics, scale: Scale) -> None:
        self._case, self._metrics, self.scale = case, metrics, scale
        shape = case.prediction.shape
        self.grid = BlockGrid.of(shape, FLAT_BLOCK if len(shape) == 2 else BLOCK)
        self.classes = metrics.targets[case.target].classes if case.kind in PROBABILITIES else ("",)
        self._partners = (
            None if case.kind in PROBABILITIES else partners(metrics.tables(case.target).get(case.name))
        )
        self._image = image_of_case(case)
        whole = case.label.shape
        flat = 3 - len(shape)
        starts = [part.start for part in case.region]
        # Where the image begins and ends, in voxels of the prediction.
        self.borders = [(0, 1)] * flat + [(-start, n - start) for start, n in zip(starts, whole, strict=True)]
        all_known = (
            case.mask is None and case.ignore is None and not case.labelled_only and case.truth is None
        )
        self._halo = scale.halo if all_known else scale.wide_halo

    def pieces(self, number: int) -> Iterator[tuple[str, Piece]]:
        """Yield the arrays of a block, by class; none where nothing is to be counted."""
        box = self.grid.box(number)
        found, truth, known = self._read(box)
        if not (known & ((truth != 0).any(axis=0) | self._predicted(found, truth))).any():
            return
        outer = piece_region(box, self.grid, self._halo)
        wide_truth, wide_known = self._case.read_truth(self._own_axes(outer))
        wide_truth, wide_known = _spatial(wide_truth), three_axes(wide_known)
        image = None if self._image is None else self._image_part(outer)
        inner = tuple(
            slice(part.start - around.start, part.stop - around.start)
            for part, around in zip(box, outer, strict=True)
        )
        for label, pred, numbers in self._masks(found, truth, wide_truth):
            own = numbers[inner]
            hit = pred.astype(bool) & (own > 0) if self._partners is None else self._partners.right(own, pred)
            arrays = [np.zeros(numbers.shape, bool) for _ in range(2)]
            arrays[0][inner], arrays[1][inner] = pred != 0, hit
            yield label, Piece(box, outer, numbers, arrays[0], arrays[1], wide_known, image)

    def suspect_pieces(self, number: int) -> Iterator[tuple[str, SuspectPiece]]:
        """Yield the arrays of a block that tell its suspects, by class."""
        box = self.grid.box(number)
        outer = piece_region(box, self.grid, SuspectTally(self.grid, self.scale, MISSING).halo)
        found, truth, known = self._read(outer)
        for i, (label, pred, numbers) in enumerate(self._masks(found, truth, truth)):
            probability = self._probability(found, i)
            yield label, SuspectPiece(box, outer, numbers > 0, pred != 0, known, probability)

    def _read(self, region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found, truth, known = self._case.read(self._own_axes(region))
        return _spatial(found), _spatial(truth), three_axes(known)

    def _own_axes(self, region: Region) -> Region:
        return region[3 - len(self._case.prediction.shape) :]

    def _predicted(self, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        if self._partners is not None:
            return np.asarray(found[0] != 0)
        masks = self._metrics.label_masks(self._case.target, found, truth)
        return np.asarray(np.any([pred for _, pred, _ in masks], axis=0))

    def _masks(
        self, found: np.ndarray, truth: np.ndarray, wide: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield class, prediction of a region, and truth of a region around it: masks, or numbers of instances."""
        if self._partners is not None:
            yield "", found[0], wide[0]
            return
        preds = self._metrics.label_masks(self._case.target, found, truth)
        # Only the truth of the wide region counts, so its own channels stand for a prediction.
        truths = (
            preds
            if wide is truth
            else self._metrics.label_masks(self._case.target, _stand_in(found, wide), wide)
        )
        for (label, pred, _), (_, _, true) in zip(preds, truths, strict=True):
            yield label, pred, true

    def _probability(self, found: np.ndarray, place: int) -> np.ndarray | None:
        """Return the probability of a class, None where decided labels came."""
        first = 1 if self._case.kind == "multiclass" else 0
        if not np.issubdtype(found.dtype, np.floating) or len(found) < first + len(self.classes):
            return None
        return np.asarray(found[place + first], np.float32)

    def _image_part(self, region: Region) -> np.ndarray:
        assert self._image is not None
        there = self._case.place_of(self._own_axes(region))
        return three_axes(self._image.read(there).astype(np.float32).mean(axis=0))


def _stand_in(found: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """Return an array that stands for a prediction of a region of which only the truth is read."""
    return np.broadcast_to(np.zeros((), found.dtype), (len(found), *wide.shape[1:]))


def _spatial(values: np.ndarray) -> np.ndarray:
    """Return (C, Z, Y, X) of (C, Y, X) or (C, Z, Y, X)."""
    return values.reshape(values.shape[0], *(1,) * (4 - values.ndim), *values.shape[1:])


def image_of_case(case: ScoredCase) -> Volume | None:
    """Return the image of a case as its label's volume has it; None, with a warning, where it is another one."""
    from volumen.data.formats.opening import open_volume

    if case.image is None:
        return None
    try:
        image = open_volume(case.image, ndim=len(case.label.shape))
    except (VolumenError, OSError) as error:
        logger.warning(
            "%s: the contrast at surfaces is not measured, as the image cannot be read (%s)", case.name, error
        )
        return None
    if tuple(image.shape) != tuple(case.label.shape):
        logger.warning(
            "%s: the contrast at surfaces is not measured: expected shape %s, as the label %s, found %s",
            case.image, case.label.shape, case.label.path, image.shape,
        )  # fmt: skip
        return None
    return image


@dataclass(frozen=True)
class Partners:
    """Which predicted object stands for which true one: the pairs that overlap each other most.

    Args:
        true: int64 (n,), true objects with a partner, ascending.
        predicted: int64 (n,), their partners.
    """

    true: np.ndarray
    predicted: np.ndarray

    def right(self, truth: np.ndarray, pred: np.ndarray) -> np.ndarray:
        """Return where a prediction has the object that stands for the true one, bool."""
        if not len(self.true):
            return np.zeros(truth.shape, bool)
        numbers = truth.astype(np.int64)
        place = np.minimum(np.searchsorted(self.true, numbers), len(self.true) - 1)
        return np.asarray((self.true[place] == numbers) & (self.predicted[place] == pred.astype(np.int64)))


def partners(table: np.ndarray | None) -> Partners:
    """Return which objects stand for each other: of a pair, each is the other's largest overlap.

    Args:
        table: see `overlaps`; None without any object.
    """
    none = np.zeros(0, np.int64)
    if table is None:
        return Partners(none, none)
    both = table[(table[:, TRUTH] != 0) & (table[:, PRED] != 0)]
    order = np.lexsort((both[:, PRED], both[:, TRUTH], -both[:, VOXELS]))
    both = both[order]
    firsts = [set(np.unique(both[:, column], return_index=True)[1].tolist()) for column in (TRUTH, PRED)]
    pairs = both[sorted(firsts[0] & firsts[1])]
    pairs = pairs[np.argsort(pairs[:, TRUTH])]
    return Partners(pairs[:, TRUTH], pairs[:, PRED])


def _blocks_of(suspects: Sequence[Suspect], grid: BlockGrid) -> list[int]:
    """Return the numbers of the blocks that the boxes of suspects meet, ascending."""
    found = set()
    for suspect in suspects:
        ranges = [
            range(low // side, -(-high // side))
            for low, high, side in zip(suspect.low, suspect.high, grid.block, strict=True)
        ]
        found |= {
            int(np.ravel_multi_index((z, y, x), grid.counts))
            for z in ranges[0]
            for y in ranges[1]
            for x in ranges[2]
        }
    return sorted(found)


def _ranked(numbers: np.ndarray, rank: dict[int, int]) -> np.ndarray:
    """Return the place in the list of each number, 0 for those that are not listed: uint16."""
    values, index = np.unique(numbers, return_inverse=True)
    places = np.array([rank.get(int(value), 0) for value in values], np.uint16)
    return places[index.reshape(numbers.shape)]


def _nearest_to_centres(
    ranks: np.ndarray,
    box: Region,
    suspects: Sequence[Suspect],
    first: int,
    scale: Scale,
    places: dict[int, tuple[float, tuple[int, ...]]],
) -> None:
    """Put into `places` the voxel of each suspect that is nearest to the centre of its box, with its distance."""
    where = np.argwhere(ranks)
    owners = ranks[tuple(where.T)]
    where = where + [part.start for part in box]
    for owner in np.unique(owners):
        suspect = suspects[int(owner) - first]
        voxels = where[owners == owner]
        centre = (np.array(suspect.low) + np.array(suspect.high) - 1) / 2
        distances = np.sqrt((((voxels - centre) * scale.step) ** 2).sum(axis=1))
        nearest = int(distances.argmin())
        found = float(distances[nearest]), tuple(int(v) for v in voxels[nearest])
        places[int(owner)] = min(found, places.get(int(owner), (math.inf, ())))


def _placed(
    case: ScoredCase, label: str, suspect: Suspect, number: int, place: Sequence[int], scale: Scale, unit: str
) -> Listed:
    """Return a suspect by its place in the label's volume and in space."""
    axes = len(case.region)
    start = [part.start for part in case.region]
    low, high, at = (
        tuple(int(v) + s for v, s in zip(list(voxel)[3 - axes :], start, strict=True))
        for voxel in (suspect.low, suspect.high, place)
    )
    space_low, space_high = physical_box(case, low, high, scale.spacing)
    size = suspect.voxels * math.prod(scale.spacing)
    return Listed(
        case.name, case.target, label, suspect, number, at, low, high, space_low, space_high, size, unit
    )


def physical_box(
    case: ScoredCase, low: Sequence[int], high: Sequence[int], spacing: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the ends in space of a box of voxels of the label's volume, faces included.

    Where the label states its place and direction, it is the box around the turned one, per axis of the space;
    elsewhere the first voxel's centre is 0.
    """
    geometry = case.label.geometry
    ends = np.array([low, high], float) - 0.5
    if geometry.is_placed and tuple(geometry.spacing or ()) == tuple(spacing):
        matrix = geometry.matrix()
        corners = np.stack(np.meshgrid(*ends.T, indexing="ij"), axis=-1).reshape(-1, len(low))
        space = corners @ matrix[:-1, :-1].T + matrix[:-1, -1]
    else:
        space = ends * np.array(spacing)
    return tuple(map(float, space.min(axis=0))), tuple(map(float, space.max(axis=0)))
