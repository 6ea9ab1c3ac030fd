"""The geometry of a voxel grid in space: voxel size, unit, origin and direction of its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from volumen.data.space.units import common_unit, factor

GRID = "grid"
"""Frame of OME-Zarr and of viewers: the axes of the space are those of the arrays."""
PATIENT = "patient"
"""Frame of NIfTI: the axes of the space are (inferior to superior, posterior to anterior, left to right)."""

_LETTERS = ("IS", "PA", "LR")
_SAME_SPACING = 1e-2
_SAME_DEGREES = 0.5
_SQUARE = 1e-3
"""Largest cosine between two axes that count as being at right angles."""
_SAME_VOXELS = 0.5 + 1e-3
"""Half a voxel: levels of two pyramids differ by less if one averages voxels and the other takes the first one."""


@dataclass(frozen=True)
class AxisTurn:
    """A permutation of array axes followed by reversals: axis `a` of the result is axis `order[a]` of the input.

    Args:
        order: a permutation of the spatial axes.
        flips: whether axis `a` of the result is reversed.
    """

    order: tuple[int, ...]
    flips: tuple[bool, ...]

    @property
    def is_identity(self) -> bool:
        return self.order == tuple(range(len(self.order))) and not any(self.flips)

    def of_axes(self, values: Sequence) -> tuple:
        """Return values per axis of the input as values per axis of the result."""
        return tuple(values[axis] for axis in self.order)

    def undo_axes(self, values: Sequence) -> tuple:
        """Return values per axis of the result as values per axis of the input."""
        return tuple(values[self.order.index(axis)] for axis in range(len(self.order)))

    def source(self, region: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the region of the input that becomes `region` of the result; `shape` is that of the input."""
        sizes = self.of_axes(shape)
        there = [
            slice(size - part.stop, size - part.start) if flip else part
            for part, size, flip in zip(region, sizes, self.flips, strict=True)
        ]
        return self.undo_axes(there)

    def apply(self, block: np.ndarray) -> np.ndarray:
        """Return a view of a block (C, *space) with its axes permuted and reversed."""
        turned = block.transpose(0, *(axis + 1 for axis in self.order))
        return turned[(slice(None), *(slice(None, None, -1 if flip else None) for flip in self.flips))]


@dataclass(frozen=True)
class Geometry:
    """The voxel size of a grid and its place in space; axes are (Z, Y, X) or (Y, X) as in the array.

    Args:
        spacing: size of a voxel per array axis, above 0, in `unit`; None where it is not known.
        unit: name of the unit of length, one for all axes; None where it is not known.
        origin: centre of the first voxel, per axis of the space, in `unit`; None where it is not known.
        directions: (D, D), `directions[w][a]` is the component along axis w of the space of a unit step along
            array axis a; None where it is not known.
        frame: meaning of the axes of the space, `GRID` or `PATIENT`. Places in different frames cannot be compared.
        problem: the fault of the size that the file states, such as "a voxel size of 0 x 1 x 1", or None.
    """

    spacing: tuple[float, ...] | None = None
    unit: str | None = None
    origin: tuple[float, ...] | None = None
    directions: tuple[tuple[float, ...], ...] | None = None
    frame: str = GRID
    problem: str | None = None

    @property
    def is_placed(self) -> bool:
        """Whether place and direction are known."""
        return self.spacing is not None and self.origin is not None and self.directions is not None

    @property
    def orientation(self) -> str | None:
        """Direction of each array axis, such as "SAR" (superior, anterior, right); None outside patient space."""
        if self.directions is None or self.frame != PATIENT:
            return None
        ndim = len(self.directions)
        turn, _ = nearest_turn(_unturned(ndim), self)
        letters = _LETTERS[-ndim:]
        ends = {
            axis: letters[w][0 if flip else 1] for w, (axis, flip) in enumerate(zip(turn.order, turn.flips))
        }
        return "".join(ends[axis] for axis in range(ndim))

    def matrix(self) -> np.ndarray:
        """Return the (D + 1, D + 1) matrix from voxel indices to places; the grid must be placed (`is_placed`)."""
        ndim = len(self.spacing or ())
        result = np.eye(ndim + 1)
        result[:ndim, :ndim] = np.array(self.directions) * np.array(self.spacing)
        result[:ndim, ndim] = self.origin
        return result

    def moved(self, start: Sequence[int]) -> Geometry:
        """Return the geometry of a region whose first voxel is `start`, per array axis (may be negative)."""
        if not self.is_placed:
            return self
        there = self.matrix() @ np.array([*start, 1.0])
        return replace(self, origin=tuple(float(value) for value in there[:-1]))

    def turned(self, turn: AxisTurn, shape: Sequence[int]) -> Geometry:
        """Return the geometry of the array after `turn`; `shape` is its shape before."""
        if self.spacing is None:
            return self
        spacing = turn.of_axes(self.spacing)
        if self.directions is None or self.origin is None:
            return replace(self, spacing=spacing)
        flipped = turn.undo_axes(turn.flips)
        first = [size - 1 if flip else 0 for size, flip in zip(shape, flipped, strict=True)]
        columns = np.array(self.directions)[:, turn.order] * np.where(turn.flips, -1.0, 1.0)
        return replace(self.moved(first), spacing=spacing, directions=_rows(columns))

    def in_unit(self, unit: str | None) -> Geometry:
        """Return the geometry in another unit; unchanged if one of the two units is not known."""
        if unit is None or self.unit is None or unit == self.unit:
            return self
        by = factor(self.unit, unit)
        if by is None:
            return self
        return replace(
            self,
            unit=unit,
            spacing=None if self.spacing is None else tuple(size * by for size in self.spacing),
            origin=None if self.origin is None else tuple(value * by for value in self.origin),
        )

    def same_spacing(self, other: Geometry) -> bool:
        """Return whether the voxel sizes agree to 1 %, or one of them is not known."""
        mine, its = self.spacing, other.in_unit(self.unit).spacing
        return mine is None or its is None or bool(np.allclose(mine, its, rtol=_SAME_SPACING, atol=0))

    def shift(self, other: Geometry) -> tuple[float, ...]:
        """Return the distance from this grid's first voxel to that of another grid, in voxels per array axis."""
        there = np.array([*(other.in_unit(self.unit).origin or ()), 1.0])
        return tuple(float(value) for value in (np.linalg.inv(self.matrix()) @ there)[:-1])

    def covers(self, other: Geometry) -> bool:
        """Return whether two grids of equal directions agree: first voxels to half a voxel, voxel sizes to 1 %."""
        return self.same_spacing(other) and max(map(abs, self.shift(other))) <= _SAME_VOXELS

    def plain(self) -> dict[str, Any]:
        """Return the geometry as plain values, for `from_plain`."""
        return {
            "spacing": None if self.spacing is None else list(self.spacing),
            "unit": self.unit,
            "origin": None if self.origin is None else list(self.origin),
            "directions": None if self.directions is None else [list(row) for row in self.directions],
            "frame": self.frame,
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Geometry:
        """Return the geometry that `plain` described."""
        spacing, origin, directions = (values.get(key) for key in ("spacing", "origin", "directions"))
        return cls(
            None if spacing is None else _floats(spacing),
            values.get("unit"),
            None if origin is None else _floats(origin),
            None if directions is None else _rows(np.array(directions)),
            values.get("frame", GRID),
        )

    def text(self) -> str:
        """Return size and unit in words."""
        if self.spacing is None:
            return "unknown"
        sizes = " x ".join(f"{size:g}" for size in self.spacing)
        return f"{sizes} {self.unit}" if self.unit else sizes


def stated_geometry(
    sizes: Sequence[float] | None,
    units: Sequence[str | None] | str | None = None,
    *,
    origin: Sequence[float] | None = None,
    directions: np.ndarray | None = None,
    frame: str = GRID,
) -> Geometry:
    """Return the geometry that a file states, in one unit for all axes.

    A size that is 0, negative, infinite or no number counts as unknown, and so does a unit that does not convert; the
    fault is named in `Geometry.problem`.

    Args:
        sizes: size of a voxel per array axis; None where the file states none.
        units: unit per axis, as `unit_name` returns it, or one for all.
        origin: centre of the first voxel per axis of the space, in the units of the axes; None where not stated.
        directions: (D, D), one column of length 1 per array axis; None with an origin means the array's own axes.
        frame: `GRID` or `PATIENT`.
    """
    if sizes is None:
        return Geometry()
    per_axis = [units] * len(sizes) if units is None or isinstance(units, str) else list(units)
    shown = " x ".join(f"{size:g}" for size in sizes)
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return Geometry(problem=f"a voxel size of {shown}")
    common = common_unit(sizes, per_axis)
    if common is None:
        names = ", ".join(str(unit or "none") for unit in per_axis)
        return Geometry(problem=f"a voxel size of {shown} in units that do not convert ({names})")
    spacing, unit = common
    if origin is None or not all(math.isfinite(value) for value in origin):
        return Geometry(_floats(spacing), unit)
    place, _ = common_unit(origin, per_axis) or (origin, None)
    if directions is None:
        directions = np.eye(len(spacing))
    return Geometry(_floats(spacing), unit, _floats(place), _rows(directions), frame)


def directions_of(orientation: str) -> Geometry:
    """Return a geometry of unit voxels whose array axes have the directions of an orientation such as "SAR".

    Raises:
        ValueError: the letters are no orientation.
    """
    ndim = len(orientation)
    columns = np.zeros((ndim, ndim))
    for axis, letter in enumerate(orientation):
        for w, pair in enumerate(_LETTERS[-ndim:]):
            if letter in pair:
                columns[w, axis] = 1.0 if pair[1] == letter else -1.0
    if abs(abs(np.linalg.det(columns)) - 1) > 1e-6:
        raise ValueError(f"orientation must name every axis once, such as SAR, got {orientation!r}")
    return Geometry((1.0,) * ndim, None, (0.0,) * ndim, _rows(columns), PATIENT)


def nearest_turn(reference: Geometry, other: Geometry) -> tuple[AxisTurn, float]:
    """Return the turn that aligns another grid's axes best with those of a reference.

    Returns:
        The turn, and the largest remaining angle between two corresponding axes, in degrees.
    """
    cosines = np.array(reference.directions).T @ np.array(other.directions)
    ndim = len(cosines)
    order = max(permutations(range(ndim)), key=lambda o: sum(abs(cosines[i, a]) for i, a in enumerate(o)))
    chosen = [float(cosines[i, axis]) for i, axis in enumerate(order)]
    angle = max(math.degrees(math.acos(min(1.0, abs(value)))) for value in chosen)
    return AxisTurn(order, tuple(value < 0 for value in chosen)), angle


def at_right_angles(directions: np.ndarray) -> bool:
    """Return whether the columns of a matrix are at right angles to each other, up to rounding errors of files."""
    lengths = np.linalg.norm(directions, axis=0)
    cosines = (directions / lengths).T @ (directions / lengths)
    return bool(np.abs(cosines - np.eye(len(cosines))).max() <= _SQUARE)


def is_parallel(angle: float) -> bool:
    """Return whether an angle of `nearest_turn` is small enough to be a rounding error."""
    return angle <= _SAME_DEGREES


def _unturned(ndim: int) -> Geometry:
    return Geometry(directions=_rows(np.eye(ndim)))


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
