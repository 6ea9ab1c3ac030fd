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
DISTANCE_SHARE = 0.2
"""Weight of the distance in the height; the wall has the remaining weight."""
DEPTH_SIGMA = 1.0
"""The same for a predicted distance, which is smooth already."""
SHEET_SIGMA = 0.5
"""The same for the predicted distance of sheets, which are a few voxels thick."""
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
        free: bool (*space), voxels inside that are no wall.
        depth: float32 (*space), the smoothed distance to the walls or borders; its peaks are the seeds.
        height: uint16 (*space), which is flooded from the seeds.
        links: uint16 (axes, *space), the wall between a voxel and the previous one on each axis; None: the height says
            it.
    """

    wall: np.ndarray
    inside: np.ndarray
    free: np.ndarray
    depth: np.ndarray
    height: np.ndarray
    links: np.ndarray | None = None

    def cropped(self, region: tuple[slice, ...]) -> Landscape:
        """Return a part of the landscape."""
        return Landscape(
            self.wall[region],
            self.inside[region],
            self.free[region],
            self.depth[region],
            self.height[region],
            None if self.links is None else self.links[(slice(None), *region)],
        )


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
    """Return the landscape of regions that walls enclose, as Beier et al. 2017 flood it.

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
    depth = smooth(distance, SEED_SIGMA, steps)
    share = np.float32(DISTANCE_SHARE)
    height = (1 - share) * (wall / np.float32(CERTAIN)) + share / (1 + np.maximum(depth, 0))
    return Landscape(wall, inside, free, depth, levels(height))


def depth_landscape(
    signed: np.ndarray,
    wall: np.ndarray,
    inside: np.ndarray | None,
    steps: Sequence[float],
    threshold: int,
    sigma: float,
) -> Landscape:
    """Return the landscape of a predicted distance, which is flooded from its deepest voxels; walls are high.

    Args:
        signed: (*space), distance to the border of the voxel's instance, negative inside.
        wall: uint16 (*space).
        inside: bool (*space), or None for where the distance is negative.
        steps: voxel size per axis in units of the smallest.
        threshold: the lowest wall that separates.
        sigma: of the Gaussian that smooths the depth, in smallest voxel sides.
    """
    depth = np.clip(-signed.astype(np.float32), 0, np.float32(DEEPEST))
    inside = depth > 0 if inside is None else inside
    free = inside & (wall < threshold)
    depth = smooth(depth, sigma, steps)
    height = np.uint16(CERTAIN) - levels(depth / np.float32(DEEPEST))
    return Landscape(wall, inside, free, depth, np.maximum(height, wall))


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
