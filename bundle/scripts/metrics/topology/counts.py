"""Betti numbers and the Euler characteristic of masks: components, tunnels and cavities.

A mask is read as a set of closed unit cubes (neighbourhoods "26/6": foreground voxels are connected by corners,
background voxels by faces) or as their interior ("6/26": foreground by faces, background by corners). Outside the
volume lies background, so a cavity is a component of the background that does not touch the volume's border. The
number of tunnels follows from the Euler characteristic, which is a sum over voxels: b1 = b0 + b2 - chi.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Literal

import numpy as np

from volumen.metrics.grid import three_axes
from volumen.metrics.topology.components import label_components
from volumen.utils.jit import compiled

Connectivity = Literal["26/6", "6/26"]
CONNECTIVITIES: tuple[Connectivity, ...] = ("26/6", "6/26")


def neighbours_of(connectivity: Connectivity) -> tuple[int, int]:
    """Return the neighbours of a foreground and of a background voxel, (26, 6) or (6, 26).

    Raises:
        ValueError: another text.
    """
    if connectivity not in CONNECTIVITIES:
        raise ValueError(f"connectivity must be one of {', '.join(CONNECTIVITIES)}, got {connectivity!r}")
    foreground, background = connectivity.split("/")
    return int(foreground), int(background)


@cache
def _corner_weights(connectivity: Connectivity) -> np.ndarray:
    """Return eight times what a corner of voxels adds to the Euler characteristic, by its eight voxels, int64 (256,).

    Every cube, square and edge at a corner is shared by eight, four and two corners. Bit 4 z + 2 y + x of the index is
    the voxel at (z, y, x) of the corner.
    """
    corners = list(itertools.product((0, 1), repeat=3))
    table = np.zeros(256, np.int64)
    for index in range(256):
        on = {corner: bool(index >> (4 * corner[0] + 2 * corner[1] + corner[2]) & 1) for corner in corners}
        # Sets of 1, 2, 4 and 8 voxels around the corner that differ in 0 to 3 axes.
        groups: dict[int, list[list[bool]]] = {0: [], 1: [], 2: [], 3: []}
        for free in itertools.product((False, True), repeat=3):
            fixed = [axis for axis in range(3) if not free[axis]]
            for values in itertools.product((0, 1), repeat=len(fixed)):
                member = [
                    on[corner]
                    for corner in corners
                    if all(corner[axis] == value for axis, value in zip(fixed, values, strict=True))
                ]
                groups[sum(free)].append(member)
        if connectivity == "26/6":
            # Corner, edges, squares and cubes that touch a foreground voxel.
            table[index] = (
                8 * sum(map(any, groups[3])) - 4 * sum(map(any, groups[2])) + 2 * sum(map(any, groups[1]))
                - sum(map(any, groups[0]))
            )  # fmt: skip
        else:
            # Voxels, pairs, squares and cubes of voxels that are all foreground.
            table[index] = (
                sum(map(all, groups[0])) - 2 * sum(map(all, groups[1])) + 4 * sum(map(all, groups[2]))
                - 8 * sum(map(all, groups[3]))
            )  # fmt: skip
    return table


@compiled
def _sum_corners(mask, weights):
    """Return the sum of `weights` over all corners between the voxels of a mask."""
    nz, ny, nx = mask.shape
    total = 0
    for z in range(nz - 1):
        for y in range(ny - 1):
            index = 0
            for x in range(nx):
                index = (index >> 1) & 0b01010101
                index |= mask[z, y, x] << 1 | mask[z, y + 1, x] << 3
                index |= mask[z + 1, y, x] << 5 | mask[z + 1, y + 1, x] << 7
                if x:
                    total += weights[index]
    return total


def euler_sum(mask: np.ndarray, connectivity: Connectivity = "26/6") -> int:
    """Return eight times the sum of the Euler characteristic over the corners inside an array.

    Args:
        mask: bool (Z, Y, X). Of a whole volume, with a border of background around it, it is eight times the Euler
            characteristic. The sums of parts that share one plane of voxels add up.
        connectivity: neighbourhoods of foreground and background.
    """
    return int(_sum_corners(np.ascontiguousarray(mask).view(np.uint8), _corner_weights(connectivity)))


def euler_characteristic(mask: np.ndarray, connectivity: Connectivity = "26/6") -> int:
    """Return b0 - b1 + b2 of a mask, bool (Y, X) or (Z, Y, X), from its voxels alone."""
    return euler_sum(np.pad(three_axes(mask), 1), connectivity) // 8


def betti_numbers(mask: np.ndarray, connectivity: Connectivity = "26/6") -> tuple[int, int, int]:
    """Return the numbers of components, tunnels (in 2D holes) and cavities of a mask.

    Args:
        mask: bool (Y, X) or (Z, Y, X); outside it is background.
        connectivity: neighbourhoods of foreground and background; in 2D they are 8/4 and 4/8.
    """
    if not mask.any():
        return 0, 0, 0
    foreground, background = neighbours_of(connectivity)
    _, b0 = label_components(three_axes(mask), foreground)
    if mask.ndim == 2:
        b2 = 0
    else:
        # One component of the padded background is the outside.
        b2 = label_components(np.pad(~mask, 1, constant_values=True), background)[1] - 1
    return b0, b0 + b2 - euler_characteristic(mask, connectivity), b2
