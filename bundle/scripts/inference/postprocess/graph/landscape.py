"""What a network's outputs say about instances: where walls stand, and how far from them a voxel lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from volumen.derived.arrays.fields import nearest_squared, smooth
from volumen.derived.extents import gaussian_radius

CERTAIN = 65535
"""A wall of probability 1; walls and affinities are uint16, so that sums over voxels are exact in any order."""
SEED_SIGMA = 2.0
"""Sigma of the Gaussian that smooths the distance to the walls, in smallest voxel sides: fewer peaks."""
DEPTH_SIGMA = 1.0
"""The same for a predicted distance, which is smooth already."""
DEEPEST = 16.0
"""Predicted distances count up to this, in smallest voxel sides, as they are learned up to it."""
DESCRIPTOR_JUMP = 1.0
"""By how many sigma the mean offset of the shape descriptors changes across a certain wall: between two large objects
it is 1.6, twice the mean of half a normal distribution, and less between objects that are smaller than the window."""

Heads = Mapping[str, np.ndarray]
"""Stored outputs of a region by head, (C, *space)."""


@dataclass(frozen=True)
class Landscape:
    """A region as the watershed sees it.

    Args:
        wall: uint16 (*space), `CERTAIN` for a certain wall.
        inside: bool (*space), where instances may be.
        free: bool (*space), voxels inside that are no wall: fragments begin there.
        height: float32 (*space), larger for voxels deeper inside an instance.
        basin: uint16 (*space), how shallow a voxel lies in its instance, 0 for the deepest; None: the wall.
        links: uint16 (axes, *space), the wall between a voxel and the previous one on each axis; None: the walls of the
            voxels say it.
    """

    wall: np.ndarray
    inside: np.ndarray
    free: np.ndarray
    height: np.ndarray
    basin: np.ndarray | None = None
    links: np.ndarray | None = None


def as_level(probability: float) -> int:
    """Return the smallest stored value that is at least a probability."""
    return ceil(round(probability * CERTAIN, 6))


def levels(values: np.ndarray) -> np.ndarray:
    """Return stored probabilities as uint16, `CERTAIN` for 1: uint8 (255 is 1), float16 or float32."""
    if values.dtype == np.uint8:
        return values.astype(np.uint16) * np.uint16(CERTAIN // 255)
    return np.rint(np.clip(values.astype(np.float32), 0, 1) * np.float32(CERTAIN)).astype(np.uint16)


def walls_landscape(
    wall: np.ndarray, inside: np.ndarray | None, steps: Sequence[float], threshold: int, reach: float
) -> Landscape:
    """Return the landscape of regions that walls enclose: the height is the smoothed distance to the walls.

    Args:
        wall: uint16 (*space).
        inside: bool (*space), or None for everywhere.
        steps: voxel size per axis in units of the smallest.
        threshold: the lowest wall that separates.
        reach: larger distances count as this, in units of the smallest voxel side.
    """
    inside = np.ones(wall.shape, bool) if inside is None else inside
    free = inside & (wall < threshold)
    costs = [
        ((np.arange(radius + 1) * step) ** 2).astype(np.float32)
        for step, radius in zip(steps, radii_of(reach, steps), strict=True)
    ]
    everywhere = tuple(slice(0, n) for n in wall.shape)
    distance = nearest_squared(~free, costs, everywhere)
    np.minimum(distance, np.float32(reach**2), out=distance)
    np.sqrt(distance, out=distance)
    return Landscape(wall, inside, free, smooth(distance, SEED_SIGMA, steps))


def depth_landscape(
    signed: np.ndarray, wall: np.ndarray, inside: np.ndarray | None, steps: Sequence[float], threshold: int
) -> Landscape:
    """Return the landscape of a predicted distance, whose height is the smoothed depth.

    Args:
        signed: (*space), distance to the border of the voxel's instance, negative inside.
        wall: uint16 (*space).
        inside: bool (*space), or None for where the distance is negative.
        steps: voxel size per axis in units of the smallest.
        threshold: the lowest wall that separates.
    """
    depth = np.clip(-signed.astype(np.float32), 0, np.float32(DEEPEST))
    inside = depth > 0 if inside is None else inside
    free = inside & (wall < threshold)
    return Landscape(wall, inside, free, smooth(depth, DEPTH_SIGMA, steps), basin_of(signed))


def basin_of(signed: np.ndarray) -> np.ndarray:
    """Return how shallow voxels lie, uint16: `CERTAIN` at the border and outside, 0 from `DEEPEST` on."""
    depth = np.clip(-signed.astype(np.float32) / np.float32(DEEPEST), 0, 1)
    return np.uint16(CERTAIN) - levels(depth)


def converging_wall(field: np.ndarray, least: float) -> np.ndarray:
    """Return walls where vectors from both sides point at each other, uint16 (*space).

    Args:
        field: (axes, *space), components (x, y[, z]).
        least: difference along an axis, over two voxels, that is a certain wall.
    """
    wall = np.zeros(field.shape[1:], np.float32)
    for axis, component in enumerate(field[::-1].astype(np.float32)):
        lines, out = np.moveaxis(component, axis, 0), np.moveaxis(wall, axis, 0)
        last = len(lines) - 1
        for place in range(len(lines)):
            np.maximum(out[place], lines[max(place - 1, 0)] - lines[min(place + 1, last)], out=out[place])
    return levels(wall / np.float32(least))


def walls_reach(reach: float, steps: Sequence[float]) -> tuple[int, ...]:
    """Return the voxels per axis at which a wall may influence the height."""
    smoothing = gaussian_radius(SEED_SIGMA, steps)
    return tuple(a + b for a, b in zip(radii_of(reach, steps), smoothing, strict=True))


def radii_of(reach: float, steps: Sequence[float]) -> tuple[int, ...]:
    """Return a length in voxels per axis, rounded up."""
    return tuple(ceil(reach / step) for step in steps)
