"""All scores of one class of labels in one volume, block by block: the same for blocks of any size and order.

Give every block to `LabelScores.add`, in any process; merge what the processes have; ask for the values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from volumen.metrics.centreline import block_skeleton, cldice, count_centrelines
from volumen.metrics.grid import BlockGrid, Region, inside, three_axes
from volumen.metrics.objects.contingency import add_overlaps, overlaps, renumbered
from volumen.metrics.objects.errors import SHARE, ObjectErrors, object_errors
from volumen.metrics.objects.numbering import Numbers, ObjectNumbers
from volumen.metrics.objects.places import blocks_of_errors
from volumen.metrics.objects.run_length import RunTally
from volumen.metrics.objects.scores import object_score
from volumen.metrics.score_names import split_name
from volumen.metrics.surface import SurfaceDistances, hausdorff, mean_distance, surface_dice
from volumen.metrics.surface_blocks import SurfaceTally
from volumen.metrics.surface_challenge import TOPOLOGY_WINDOW, ChallengeTopology, challenge_score
from volumen.metrics.topology.blocks import Topology, TopologyTally
from volumen.metrics.topology.counts import Connectivity, betti_numbers

BLOCK = 128
"""Voxels per axis of a block, in an image 16 times as many."""
FLAT_BLOCK = 2048
LOCATED = 10
"""Errors of objects of each kind of which the place is looked for, those of the most voxels first."""

Read = Callable[[Region], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Gives prediction, truth and known voxels, each bool (Z, Y, X), of a region of the volume."""


@dataclass(frozen=True)
class LabelSettings:
    """What shapes the scores.

    Args:
        names: scores to measure, of those of labels whose `pieces` is False; others are left out.
        spacing: voxel size per axis.
        tolerance: of `surface_dice`, in units of the spacing.
        connectivity: neighbourhoods of foreground and background.
        share: part of an object that must be covered for it to belong to another one.
        border: whether a surface is where the volume's border cuts a structure, as MONAI takes it.
    """

    names: tuple[str, ...]
    spacing: tuple[float, ...]
    tolerance: float
    connectivity: Connectivity = "26/6"
    share: float = SHARE
    border: bool = False

    def measures(self, *bases: str) -> bool:
        """Whether any of these scores is measured; names with a parameter end in "@"."""
        return any(split_name(name)[0] in bases for name in self.names)

    @property
    def surfaces(self) -> bool:
        """Whether distances between surfaces are needed."""
        return self.measures(
            "surface_dice", "surface_dice@", "hd95", "mean_surface_distance", "mean_distance_to_truth",
            "mean_distance_to_prediction",
        )  # fmt: skip

    @property
    def skeletons(self) -> bool:
        """Whether skeletons are needed."""
        return self.measures("cldice", "expected_run_length")

    @property
    def windows(self) -> tuple[int, ...]:
        """Sides of the windows in which topology is compared."""
        bases = ("b0_error@", "b1_error@", "b2_error@")
        found = {int(value or 0) for base, value in map(split_name, self.names) if base in bases}
        return tuple(sorted(found))


@dataclass(frozen=True)
class LabelDetails:
    """What stands behind the scores: counts, and where errors are.

    Args:
        pred: topology of the prediction.
        truth: topology of the truth.
        errors: wrong objects.
        windows: side to int64 (n, 9), a row per window that holds foreground: its first voxel (z, y, x), b0, b1, b2 of
            the prediction and of the truth.
        seconds: part of the work to the CPU seconds that it took.
        numbers: the object at every voxel.
        blocks: (kind of error, number of the object) to the block in which it is best seen, of the worst `LOCATED`
            errors of each kind.
    """

    pred: Topology
    truth: Topology
    errors: ObjectErrors
    windows: dict[int, np.ndarray]
    seconds: dict[str, float]
    numbers: ObjectNumbers
    blocks: dict[tuple[str, int], Region]

    def worst_windows(self, side: int, most: int) -> np.ndarray:
        """Return the rows of the windows with the largest differences in b0, b1 and b2 together, worst first."""
        rows = self.windows[side]
        wrong = np.abs(rows[:, 3:6] - rows[:, 6:9]).sum(axis=1)
        order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0], -wrong))
        return rows[order[wrong[order] > 0][:most]]


@dataclass
class LabelScores:
    """The scores of one class in one volume, from blocks in any order.

    Unknown voxels count as background of both in topology and objects; they have no surface and no skeleton.

    Args:
        shape: of the volume, two or three axes.
        settings: what is measured, and how.
        side: voxels per axis of a block; None: `BLOCK`, in an image `FLAT_BLOCK`.
    """

    shape: tuple[int, ...]
    settings: LabelSettings
    side: int | Sequence[int] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    voxels: dict[str, int] = field(default_factory=lambda: {"pred": 0, "truth": 0, "known": 0})

    def __post_init__(self) -> None:
        flat = len(self.shape) == 2
        side = self.side or (FLAT_BLOCK if flat else BLOCK)
        self.grid = BlockGrid.of(self.shape, side)
        self._pred = TopologyTally(self.grid, self.settings.connectivity, flat)
        self._truth = TopologyTally(self.grid, self.settings.connectivity, flat)
        self._surfaces = SurfaceTally(self.grid, self.settings.spacing, self.settings.border)
        self._runs = RunTally(self.grid, tuple(self.settings.spacing))
        self._lines = np.zeros(4, np.int64)
        self._overlaps: list[np.ndarray] = []
        self._windows: dict[int, list[np.ndarray]] = {window: [] for window in self.settings.windows}
        # The challenge counts voxels, takes the border for a surface and unknown voxels for background.
        self._challenge = (
            (SurfaceTally(self.grid, (1.0,) * len(self.shape), border=True), ChallengeTopology())
            if self.settings.measures("surface_challenge")
            else None
        )

    def outer(self, number: int) -> Region:
        """Return the region that a block is read with."""
        halo = (1, 1, 1)
        tallies = [self._surfaces] if self.settings.surfaces else []
        tallies += [self._challenge[0]] if self._challenge else []
        for tally in tallies:
            halo = tuple(max(pair) for pair in zip(halo, tally.halo, strict=True))  # type: ignore[assignment]
        return tuple(
            slice(max(0, part.start - width), min(n, part.stop + width))
            for part, width, n in zip(self.grid.box(number), halo, self.grid.shape, strict=True)
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        before = time.thread_time()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.thread_time() - before

    def add(self, number: int, read: Read) -> None:
        """Add a block.

        Args:
            number: which block.
            read: gives any region of the volume; it is asked for `outer(number)` first.
        """
        outer, box = self.outer(number), self.grid.box(number)
        with self._timed("reading"):
            arrays = read(outer)
        pred, truth, known = arrays
        own = inside(box, outer)
        for name, mask in (("pred", pred & known), ("truth", truth & known), ("known", known)):
            self.voxels[name] += int(np.count_nonzero(mask[own]))
        # One plane behind the block on every axis, by which components of neighbours are joined.
        wide = self.grid.around(box, 0, 1)
        part = inside(wide, outer)
        with self._timed("objects"):
            of_pred = self._pred.add(number, np.ascontiguousarray((pred & known)[part]))
            of_truth = self._truth.add(number, np.ascontiguousarray((truth & known)[part]))
            self._add_overlaps(box, of_pred, of_truth)
        if self.settings.surfaces:
            with self._timed("surfaces"):
                self._surfaces.add(number, outer, pred, truth, known)
        if self.settings.skeletons:
            with self._timed("skeletons"):
                self._add_skeletons(number, outer, arrays, read, of_pred)
        for window in self._windows:
            with self._timed("windows"):
                self._add_windows(window, box, read)
        if self._challenge:
            with self._timed("surface_challenge"):
                self._challenge[0].add(number, outer, pred & known, truth & known, None)
                for region in self._windows_from(TOPOLOGY_WINDOW, box):
                    found, wanted, certain = read(region)
                    self._challenge[1].add(found & certain, wanted & certain)

    def _add_overlaps(
        self, box: Region, of_pred: tuple[np.ndarray, int], of_truth: tuple[np.ndarray, int]
    ) -> None:
        own = tuple(slice(0, part.stop - part.start) for part in box)
        table = overlaps(of_pred[0][own], of_truth[0][own], start=[part.start for part in box])
        for column, first in ((0, of_truth[1]), (1, of_pred[1])):
            table[:, column] += np.where(table[:, column] > 0, first, 0)
        self._overlaps.append(table)

    def _add_skeletons(
        self,
        number: int,
        outer: Region,
        arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
        read: Read,
        of_pred: tuple[np.ndarray, int],
    ) -> None:
        box = self.grid.box(number)
        # Lengths of skeleton voxels depend on their neighbours on all sides.
        around = self.grid.around(box, 1)
        found = block_skeleton(0, box, self.grid, read, outer, arrays)
        wanted = block_skeleton(1, around, self.grid, read, outer, arrays)
        pred, truth, _ = (array[inside(box, outer)] for array in arrays)
        self._lines += count_centrelines(found, wanted[inside(box, around)], pred, truth)
        self._runs.add(number, around, wanted, *of_pred)

    def _windows_from(self, side: int, box: Region) -> Iterator[Region]:
        """Yield the windows of the volume whose first voxel lies in a block."""
        steps = [range(-(-part.start // side) * side, part.stop, side) for part in box]
        for z in steps[0]:
            for y in steps[1]:
                for x in steps[2]:
                    yield tuple(
                        slice(at, min(at + side, n)) for at, n in zip((z, y, x), self.grid.shape, strict=True)
                    )

    def _add_windows(self, side: int, box: Region, read: Read) -> None:
        for region in self._windows_from(side, box):
            pred, truth, known = read(region)
            numbers = [self._betti(mask & known) for mask in (pred, truth)]
            if any(b0 for b0, _, _ in numbers):
                place = [part.start for part in region]
                self._windows[side].append(np.array([*place, *numbers[0], *numbers[1]], np.int64))

    def _betti(self, mask: np.ndarray) -> tuple[int, int, int]:
        flat = mask[0] if len(self.shape) == 2 else mask
        return betti_numbers(flat, self.settings.connectivity)

    def merge(self, other: LabelScores) -> None:
        """Add the blocks of another accumulator of the same volume and settings."""
        pred, truth = self._pred.merge(other._pred), self._truth.merge(other._truth)
        for table in other._overlaps:
            moved = table.copy()
            for column, shift in ((0, truth), (1, pred)):
                moved[:, column] += np.where(table[:, column] > 0, shift, 0)
            self._overlaps.append(moved)
        self._surfaces.merge(other._surfaces)
        self._runs.merge(other._runs, pred)
        self._lines += other._lines
        for window, rows in other._windows.items():
            self._windows[window] += rows
        if self._challenge and other._challenge:
            self._challenge[0].merge(other._challenge[0])
            self._challenge[1].merge(other._challenge[1])
        for part, seconds in other.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        for name, count in other.voxels.items():
            self.voxels[name] += count

    def result(self, read: Read) -> tuple[dict[str, float], LabelDetails]:
        """Return the scores by name, NaN where undefined, and what stands behind them.

        Args:
            read: gives any region of the volume, for surface voxels that are far from the other surface.
        """
        result = _Result(self, read)
        values = {name: result.value(name) for name in self.settings.names}
        return values, result.details


class _Result:
    """Values of a complete accumulator; each intermediate one is computed once."""

    def __init__(self, scores: LabelScores, read: Read) -> None:
        self._scores, self._read = scores, read
        self._settings = scores.settings

    def value(self, name: str) -> float:
        """Return a score by its name."""
        base, parameter = split_name(name)
        if base in _DIMENSION:
            return self._topology_error(_DIMENSION[base], parameter)
        if base == "cldice":
            return cldice(self._scores._lines)
        if base == "expected_run_length":
            return self._run_length()
        if base == "surface_challenge":
            return self._challenge()
        if self._settings.surfaces and base in _SURFACE:
            voxels = min(self._settings.spacing)
            tolerance = self._settings.tolerance if parameter is None else parameter * voxels
            return _SURFACE[base](self._distances, tolerance)
        return object_score(name, self._table, self._errors)

    @cached_property
    def _windows(self) -> dict[int, np.ndarray]:
        return {
            side: np.array(sorted(map(tuple, rows)), np.int64).reshape(-1, 9)
            for side, rows in self._scores._windows.items()
        }

    @cached_property
    def details(self) -> LabelDetails:
        scores, topologies, roots = self._scores, self._topologies, self._roots
        numbers = ObjectNumbers(
            scores.grid,
            self._settings.connectivity,
            Numbers.of(scores._pred.objects, roots[1] - 1),
            Numbers.of(scores._truth.objects, roots[0] - 1),
        )
        with scores._timed("objects"):
            worst = self._errors.worst(LOCATED)
            joins = (scores._truth.objects.touching(), scores._pred.objects.touching())
            blocks = blocks_of_errors(scores._overlaps, roots, joins, scores.grid, worst)
        return LabelDetails(
            topologies[0], topologies[1], self._errors, self._windows, dict(scores.seconds), numbers, blocks
        )

    @cached_property
    def _topologies(self) -> tuple[Topology, Topology]:
        with self._scores._timed("objects"):
            return self._scores._pred.topology(), self._scores._truth.topology()

    @cached_property
    def _roots(self) -> tuple[np.ndarray, np.ndarray]:
        """Joined numbers of the components of truth and prediction, from 1."""
        return self._scores._truth.objects.roots() + 1, self._scores._pred.objects.roots() + 1

    @cached_property
    def _table(self) -> np.ndarray:
        with self._scores._timed("objects"):
            return renumbered(add_overlaps(self._scores._overlaps), *self._roots)

    @cached_property
    def _errors(self) -> ObjectErrors:
        return object_errors(self._table, self._settings.share)

    @cached_property
    def _distances(self) -> SurfaceDistances:
        with self._scores._timed("surfaces"):
            return self._scores._surfaces.distances(self._read)

    def _topology_error(self, dimension: int, window: float | None) -> float:
        if window is not None:
            rows = self._windows[int(window)]
            if not len(rows):
                return math.nan
            return float(np.abs(rows[:, 3 + dimension] - rows[:, 6 + dimension]).mean())
        pred, truth = self._topologies
        return float(abs((pred.b0, pred.b1, pred.b2)[dimension] - (truth.b0, truth.b1, truth.b2)[dimension]))

    def _run_length(self) -> float:
        merged = np.array([error.number for error in self._errors.merged], np.int64)
        return self._scores._runs.length(self._roots[1], merged)

    def _challenge(self) -> float:
        assert self._scores._challenge is not None
        surfaces, topology = self._scores._challenge
        with self._scores._timed("surface_challenge"):
            distances = surfaces.distances(self._known_only)
        return challenge_score(distances, self._table, topology)

    def _known_only(self, region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a region in which unknown voxels are background."""
        pred, truth, known = self._read(region)
        return pred & known, truth & known, np.ones_like(known)


_DIMENSION = {f"b{k}_error{at}": k for k in range(3) for at in ("", "@")}
_SURFACE: dict[str, Callable[[SurfaceDistances, float], float]] = {
    "surface_dice": surface_dice,
    "surface_dice@": surface_dice,
    "hd95": lambda distances, _: hausdorff(distances),
    "mean_surface_distance": lambda distances, _: mean_distance(distances.to_truth, distances.to_pred),
    "mean_distance_to_truth": lambda distances, _: mean_distance(distances.to_truth),
    "mean_distance_to_prediction": lambda distances, _: mean_distance(distances.to_pred),
}


def score_masks(
    pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None, settings: LabelSettings
) -> dict[str, float]:
    """Return the scores of masks in memory.

    Args:
        pred: bool (Y, X) or (Z, Y, X).
        truth: bool, same shape.
        known: bool, same shape; None: all voxels are known.
        settings: what is measured, and how.
    """
    certain = np.ones(pred.shape, bool) if known is None else known
    pred, truth, certain = (three_axes(x) for x in (pred, truth, certain))

    def read(region: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return pred[region], truth[region], certain[region]

    shape = pred.shape[3 - len(settings.spacing) :]
    scores = LabelScores(shape, settings, shape)
    scores.add(0, read)
    return scores.result(read)[0]
