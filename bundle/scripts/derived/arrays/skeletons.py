"""Computes medial surfaces and centrelines by a definition that does not depend on the borders of a patch."""

from __future__ import annotations

import math

import numpy as np


def skeleton(slope: np.ndarray, signed: np.ndarray, angle: float) -> np.ndarray:
    """Return the medial axis of the foreground, without the branches into its corners.

    S = { p : d(p) < 0 and |g(p)| <= cos(angle / 2) }, d the signed distance and g its smoothed gradient.
    Where d has one nearest surface, |g| is 1; where surfaces meet from directions that are `angle` apart, g
    is the mean of two unit vectors and |g| = cos(angle / 2). This is the medial axis simplified by its
    separation angle (Foskey, Lin and Manocha, "Efficient Computation of a Simplified Medial Axis", 2003). The
    middle of a sheet becomes a medial surface, that of a tube a centreline, 1 to 3 voxels thick. Unlike
    thinning, which works from the outside in, the definition is local.

    Args:
        slope: float32 (ndim, *spatial), g.
        signed: float32 (*spatial), d.
        angle: in degrees, between 0 (all voxels) and 180 (surfaces face each other).

    Returns:
        bool (*spatial).
    """
    return (signed < 0) & (np.einsum("c...,c...->...", slope, slope) <= np.float32(squared_limit(angle)))


def squared_limit(angle: float) -> float:
    """Return cos(angle / 2)^2 rounded to float32: |g|^2 up to which a voxel belongs to the skeleton."""
    return float(np.float32(math.cos(math.radians(angle) / 2)) ** 2)
