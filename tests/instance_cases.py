"""Cells with walls as known instances, and the comparison of two partitions."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree


def cells(shape, count, steps=None, seed=0):
    """Return Voronoi cells int32 from 1, of points with at least half the spacing of an even grid between them."""
    steps = steps or (1.0,) * len(shape)
    size = np.array(shape) * steps
    rng = np.random.default_rng(seed)
    least = 0.6 * (np.prod(size) / count) ** (1 / len(shape))
    points = [rng.random(len(shape)) * size]
    for _ in range(10_000):
        new = rng.random(len(shape)) * size
        if len(points) < count and min(np.linalg.norm(new - p) for p in points) > least:
            points.append(new)
    grid = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) * s for n, s in zip(shape, steps)], indexing="ij"), -1)
    return (cKDTree(points).query(grid)[1] + 1).astype(np.int32)


def nuclei(shape, count, steps=None, seed=0):
    """Return ellipsoids that touch each other, int32 from 1, each in one piece."""
    steps = np.array(steps or (1.0,) * len(shape))
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, steps)], indexing="ij"), -1)
    found, nearest = np.zeros(shape, np.int32), np.ones(shape)
    for number in range(1, count + 1):
        centre = rng.random(len(shape)) * np.array(shape) * steps
        radii = rng.uniform(6, 12) * rng.uniform(0.7, 1.3, len(shape))
        away = np.sqrt((((grid - centre) / radii) ** 2).sum(axis=-1))
        closer = away < nearest
        found[closer], nearest[closer] = number, away[closer]
    for number in range(1, count + 1):
        parts, pieces = ndimage.label(found == number)
        sizes = np.bincount(parts.ravel(), minlength=pieces + 1)[1:]
        if pieces:
            found[(parts > 0) & (parts != sizes.argmax() + 1)] = 0
        if sizes.max(initial=0) < 200:
            found[found == number] = 0
    return found


def walls(labels):
    """Return bool: the voxels with a face neighbour of another cell."""
    found = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        moved, out = np.moveaxis(labels, axis, 0), np.moveaxis(found, axis, 0)
        differ = moved[1:] != moved[:-1]
        out[1:] |= differ
        out[:-1] |= differ
    return found


def predicted(mask, noise=0.15, seed=0):
    """Return a simulated network output for a mask: a blurred probability with noise, float32."""
    rng = np.random.default_rng(seed)
    blurred = ndimage.gaussian_filter(mask.astype(np.float32), 0.7)
    rough = ndimage.gaussian_filter(rng.normal(size=mask.shape), 1.0)
    return np.clip(1.2 * blurred + noise * rough / rough.std(), 0, 1).astype(np.float32)
