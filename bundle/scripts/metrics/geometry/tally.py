"""Errors of a label by the geometry around them, block by block: the same for blocks of any size and order.

Give every block to `GeometryTally.add`, in any process; merge what the processes have; ask for the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from volumen.metrics.geometry.contrast import surface_contrast
from volumen.metrics.geometry.counts import Bin, QuantityCounts, error_kinds, power_of_ten
from volumen.metrics.geometry.curvature import mean_curvature, object_surfaces
from volumen.metrics.geometry.distances import filled, nearest_places, squared_to
from volumen.metrics.geometry.scale import PATCH, Scale
from volumen.metrics.geometry.thickness import local_thickness
from volumen.metrics.grid import Region, inside

ALL, CURVATURE, THICKNESS, GAP = "all", "curvature", "thickness", "gap"
BORDER, EDGE, CONTRAST = "border_distance", "edge_distance", "contrast"
QUANTITIES = (ALL, CURVATURE, THICKNESS, GAP, BORDER, EDGE, CONTRAST)

LENGTH, BENDING, NONE = "length", "1/length", ""
UNITS = {
    ALL: NONE,
    CURVATURE: BENDING,
    THICKNESS: LENGTH,
    GAP: LENGTH,
    BORDER: LENGTH,
    EDGE: LENGTH,
    CONTRAST: NONE,
}
"""Which unit each quantity has: that of the spacing, its inverse, or none."""


@dataclass(frozen=True)
class Piece:
    """Arrays of a region around a block, each (Z, Y, X).

    Args:
        box: the block, in the volume.
        outer: the region of the arrays, in the volume: the block and its halo, cut at the volume's end.
        numbers: integer, objects of the truth, 0 outside any; of a class 0 and 1.
        pred: bool, what is predicted.
        hit: bool, what is predicted rightly: within the truth and, of instances, as the object that it is.
        known: bool.
        image: float32, or None.
    """

    box: Region
    outer: Region
    numbers: np.ndarray
    pred: np.ndarray
    hit: np.ndarray
    known: np.ndarray
    image: np.ndarray | None = None

    def part(self, region: Region) -> Piece:
        """Return the arrays of a smaller region around the block."""
        within = inside(region, self.outer)
        arrays = [
            None if array is None else array[within]
            for array in (self.numbers, self.pred, self.hit, self.known, self.image)
        ]
        return Piece(self.box, region, *arrays)  # type: ignore[arg-type]


@dataclass
class GeometryTally:
    """Errors of one class by quantities.

    Args:
        finest: smallest voxel side of all volumes that are counted here; the steps follow from it.
    """

    finest: float
    counts: dict[str, QuantityCounts] = field(default_factory=dict)

    def add(self, piece: Piece, scale: Scale, borders: Sequence[tuple[int, int]]) -> None:
        """Count the errors of a block.

        Args:
            piece: the block with a halo of at least `scale.wide_halo`.
            scale: voxel sizes of its volume.
            borders: first voxel of the image and the one behind its last, per axis of (z, y, x) of the volume.
        """
        own = inside(piece.box, piece.outer)
        truth = piece.numbers[own] > 0
        counted = piece.known[own] & (truth | piece.pred[own])
        if not counted.any():
            return
        where = np.argwhere(counted)
        kinds = error_kinds(truth[counted], piece.pred[own][counted], piece.hit[own][counted])
        places = where + [part.start for part in piece.box]
        self._count(ALL, np.full(len(kinds), np.nan), kinds)
        self._count(BORDER, border_distance(places, borders, scale), kinds)
        around = _around(places, piece, scale.halo if piece.known.all() else scale.wide_halo)
        small = piece.part(around)
        voxels = places - [part.start for part in around]
        for quantity, values in _Geometry(small, voxels, scale).values():
            self._count(quantity, values, kinds)

    def _count(self, quantity: str, values: np.ndarray, kinds: np.ndarray) -> None:
        if quantity not in self.counts:
            least = 0.0 if UNITS[quantity] == LENGTH else -math.inf
            self.counts[quantity] = QuantityCounts(self._step(quantity), least)
        self.counts[quantity].add(values, kinds)

    def _step(self, quantity: str) -> float:
        """Return the width of the fine steps: a small part of what is told apart, and a power of ten."""
        unit = UNITS[quantity]
        if unit == BENDING:
            return power_of_ten(0.005 / self.finest)
        return power_of_ten(self.finest / 4) if unit == LENGTH else 0.1

    def merge(self, other: GeometryTally) -> None:
        """Add the counts of other blocks or volumes."""
        for quantity, counts in other.counts.items():
            if quantity in self.counts:
                self.counts[quantity].merge(counts)
            else:
                self.counts[quantity] = counts

    def tables(self) -> dict[str, list[Bin]]:
        """Return the tables by quantity, in their order."""
        found = {name: self.counts[name].table() for name in QUANTITIES if name in self.counts}
        # Where nothing is unknown, the labelled part has no edge.
        if EDGE in found and len(self.counts[EDGE].steps) == 1:
            del found[EDGE]
        return found


def border_distance(places: np.ndarray, borders: Sequence[tuple[int, int]], scale: Scale) -> np.ndarray:
    """Return the distance from the centres of voxels to the nearest face of the image: float64 (n,).

    Args:
        places: int64 (n, 3), voxels.
        borders: first voxel of the image and the one behind its last, per axis.
        scale: voxel sizes; the added axis of an image has no border.
    """
    nearest = np.full(len(places), np.inf)
    for axis in range(3 - len(scale.spacing), 3):
        first, end = borders[axis]
        steps = np.minimum(places[:, axis] - first, end - 1 - places[:, axis]) + 0.5
        nearest = np.minimum(nearest, steps * scale.step[axis])
    return nearest


def _around(places: np.ndarray, piece: Piece, halo: Sequence[int]) -> Region:
    """Return the region that the geometry of voxels depends on."""
    low, high = places.min(axis=0), places.max(axis=0) + 1
    return tuple(
        slice(max(part.start, int(first) - width), min(part.stop, int(last) + width))
        for part, first, last, width in zip(piece.outer, low, high, halo, strict=True)
    )


class _Geometry:
    """The quantities at voxels of a region.

    Args:
        piece: the region.
        voxels: int64 (n, 3), where, in the region.
        scale: voxel sizes.
    """

    def __init__(self, piece: Piece, voxels: np.ndarray, scale: Scale) -> None:
        self._piece, self._voxels, self._scale = piece, voxels, scale
        self._numbers = filled(_small_numbers(piece.numbers, piece.known), piece.known, scale)

    def values(self) -> list[tuple[str, np.ndarray]]:
        """Return quantities with their values, float64 (n,) each, NaN where they were not measured."""
        found = [(EDGE, self._edge_distance())]
        unmeasured = np.full(len(self._voxels), np.nan)
        names = [CURVATURE, THICKNESS, GAP] + ([CONTRAST] if self._piece.image is not None else [])
        if not (self._numbers > 0).any():
            return [*found, *((name, unmeasured) for name in names)]
        surfaces, index = self._surfaces()
        thickness = local_thickness(self._numbers, self._scale, self._near())
        found.append((CURVATURE, _taken(self._curvature(surfaces), index)))
        found.append((THICKNESS, self._thickness(thickness, surfaces, index)))
        found.append((GAP, self._gap(thickness, surfaces, index)))
        if self._piece.image is not None:
            contrast = surface_contrast(
                self._piece.image, self._numbers, self._piece.known, surfaces, self._scale
            )
            found.append((CONTRAST, _taken(contrast, index)))
        return found

    def _near(self) -> Region:
        """Return the part of the region in which the surfaces of the voxels and what lies beside them are."""
        low, high = self._voxels.min(axis=0), self._voxels.max(axis=0) + 1
        widths = [width + 1 for width in self._scale.voxels(self._scale.near)]
        return tuple(
            slice(max(int(first) - width, 0), min(int(last) + width, n))
            for first, last, width, n in zip(low, high, widths, self._numbers.shape, strict=True)
        )

    def _surfaces(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the surface voxels that some voxel is nearest to, int64 (m, 3), and which one each has, or -1."""
        surface = object_surfaces(self._numbers)
        nearest = nearest_places(self._voxels, surface, self._scale, self._scale.near)
        found = nearest[:, 0] >= 0
        shape = self._numbers.shape
        flat = np.full(len(nearest), -1, np.int64)
        flat[found] = np.ravel_multi_index(tuple(nearest[found].T), shape)
        used, index = np.unique(flat[found], return_inverse=True)
        flat[found] = index.reshape(-1)
        return np.stack(np.unravel_index(used, shape), axis=1).astype(np.int64), flat

    def _curvature(self, surfaces: np.ndarray) -> np.ndarray:
        """Return the curvature at surface voxels, NaN beside unknown voxels: what goes on there is a guess."""
        curvature = mean_curvature(self._numbers, surfaces, self._scale)
        if self._piece.known.all():
            return curvature
        length = PATCH * self._scale.finest
        away = squared_to(~self._piece.known, self._scale, length)[tuple(surfaces.T)]
        return np.where(away > np.float32(length**2), curvature, np.nan)

    def _thickness(self, thickness: np.ndarray, surfaces: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the thickness of the object that a voxel is of, else of the one beside it."""
        values = _taken(thickness[tuple(surfaces.T)].astype(np.float64), index)
        own = tuple(self._voxels.T)
        return np.where(self._numbers[own] > 0, thickness[own], values)

    def _gap(self, thickness: np.ndarray, surfaces: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the width of the gap that a voxel lies in, else of the narrowest beside its surface."""
        values = _taken(_narrowest(self._numbers, thickness, surfaces), index)
        own = tuple(self._voxels.T)
        return np.where(self._numbers[own] == 0, thickness[own], values)

    def _edge_distance(self) -> np.ndarray:
        """Return the distance to the centre of the nearest voxel without a label; the reach where none is nearer."""
        reach = EDGE_REACH * self._scale.finest
        if self._piece.known.all():
            return np.full(len(self._voxels), reach)
        squared = squared_to(~self._piece.known, self._scale, reach)[tuple(self._voxels.T)]
        return np.minimum(np.sqrt(squared.astype(np.float64)), reach)


EDGE_REACH = 24.0
"""Smallest voxel sides up to which the distance to the label's edge is measured."""


def _taken(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return values by index, NaN where the index is -1."""
    if not len(values):
        return np.full(len(index), np.nan)
    return np.where(index >= 0, values[index], np.nan)


def _small_numbers(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return objects under numbers that fit int32, 0 outside and where unknown."""
    known_only = np.where(known, numbers, np.zeros((), numbers.dtype))
    if numbers.dtype == bool or numbers.dtype.itemsize < 4:
        return np.ascontiguousarray(known_only.astype(np.int32))
    values, index = np.unique(known_only, return_inverse=True)
    renumbered = index.reshape(numbers.shape).astype(np.int32)
    return renumbered if len(values) and values[0] == 0 else renumbered + 1


def _narrowest(numbers: np.ndarray, thickness: np.ndarray, surfaces: np.ndarray) -> np.ndarray:
    """Return the smallest thickness of the background beside surface voxels, 0 where another object touches."""
    least = np.full(len(surfaces), np.inf)
    own = numbers[tuple(surfaces.T)]
    for axis in range(3):
        for side in (-1, 1):
            beside = surfaces.copy()
            beside[:, axis] += side
            within = (beside[:, axis] >= 0) & (beside[:, axis] < numbers.shape[axis])
            place = tuple(beside[within].T)
            theirs = numbers[place]
            width = np.where(theirs == 0, thickness[place], np.where(theirs == own[within], np.inf, 0.0))
            least[within] = np.minimum(least[within], width)
    return np.where(np.isfinite(least), least, np.nan)
