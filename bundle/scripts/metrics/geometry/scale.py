"""How far the geometry of a label is looked at, and how many voxels around a block that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.derived.extents import TRUNCATE, add_radii, distance_halo, gaussian_radius

RADIUS = 12.0
"""Smallest voxel sides of the largest ball that is looked for: thickness and gaps are measured up to twice that."""
NEAR = 8.0
"""Smallest voxel sides within which a voxel belongs to a surface."""
SIGMA = 2.5
"""Smallest voxel sides of the Gaussian that smooths the distance before its curvature is taken."""
PATCH = 5.0
"""Smallest voxel sides around a surface voxel over which its curvature is averaged."""
SHELL = 2.5
"""Smallest voxel sides of the ball in which the image's contrast at a surface is measured."""


@dataclass(frozen=True)
class Scale:
    """Voxel sizes with the reach of everything that looks around a voxel.

    Args:
        spacing: voxel size per axis, two or three axes.
    """

    spacing: tuple[float, ...]

    @property
    def finest(self) -> float:
        """The smallest voxel side."""
        return min(self.spacing)

    @property
    def step(self) -> tuple[float, float, float]:
        """Voxel size along (z, y, x); the added axis of an image has one slice, and its size does not count."""
        return (self.finest,) * (3 - len(self.spacing)) + self.spacing  # type: ignore[return-value]

    @property
    def radius(self) -> float:
        """Radius of the largest ball, in the spacing's unit."""
        return RADIUS * self.finest

    @property
    def near(self) -> float:
        """Distance up to which a voxel belongs to a surface, in the spacing's unit."""
        return NEAR * self.finest

    def voxels(self, length: float) -> tuple[int, int, int]:
        """Return how many voxels of (z, y, x) a length reaches; 0 along the added axis of an image."""
        flat = 3 - len(self.spacing)
        return tuple(  # type: ignore[return-value]
            0 if axis < flat else math.floor(length / size * (1 + 1e-6))
            for axis, size in enumerate(self.step)
        )

    @property
    def halo(self) -> tuple[int, int, int]:
        """Voxels of (z, y, x) around a block by which its geometry is that of the whole volume, where all is known.

        From a voxel to its surface, from there to the centre of a ball and from there to the ball's end; or from the
        surface to all that the curvature there follows from.
        """
        balls = [2 * width + 3 for width in self.voxels(self.radius)]
        reach = TRUNCATE * SIGMA * self.finest
        bent = add_radii(
            self.voxels(PATCH * self.finest),
            gaussian_radius(SIGMA, self.step),
            distance_halo(reach, self.step),
            (2, 2, 2),
        )
        flat = 3 - len(self.spacing)
        return tuple(  # type: ignore[return-value]
            0 if axis < flat else near + max(balls[axis], bent[axis])
            for axis, near in enumerate(self.voxels(self.near))
        )

    @property
    def wide_halo(self) -> tuple[int, int, int]:
        """The same where voxels are unknown, which take what the nearest known one has, see `filled`."""
        parts = zip(self.halo, self.voxels(self.radius), strict=True)
        return tuple(near + ball for near, ball in parts)  # type: ignore[return-value]

    def costs(self, length: float) -> list[np.ndarray]:
        """Return squared lengths of 0, 1, ... voxel steps along (z, y, x), up to a length: float32 each."""
        return [
            (np.arange(count + 1) * size).astype(np.float32) ** 2
            for count, size in zip(self.voxels(length), self.step, strict=True)
        ]


def squared_norms(costs: Sequence[np.ndarray], offsets: np.ndarray) -> np.ndarray:
    """Return the squared lengths of offsets, added up as the distance kernels do: float32 (n,).

    Args:
        costs: squared length of steps along (z, y, x).
        offsets: int64 (n, 3).
    """
    z, y, x = (costs[axis][np.abs(offsets[:, axis])] for axis in range(3))
    return np.asarray((x + y) + z)


def ball(costs: Sequence[np.ndarray], length: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets within a length, nearest first, of equally near ones the smallest z, y, x first.

    Args:
        costs: squared length of steps along (z, y, x), at least up to the length.
        length: in the unit of the costs.

    Returns:
        int64 (n, 3), and their squared lengths, float32 (n,).
    """
    ranges = [np.arange(-(len(cost) - 1), len(cost)) for cost in costs]
    offsets = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int64)
    norms = squared_norms(costs, offsets)
    within = norms <= np.float32(length**2 * (1 + 1e-6))
    offsets, norms = offsets[within], norms[within]
    order = np.argsort(norms, kind="stable")
    return offsets[order], norms[order]
