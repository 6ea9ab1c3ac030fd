"""Mean curvature of a label's surface.

The signed distance u to the surface is smoothed by a Gaussian; its level sets are bent as the surface is. Their mean
curvature is

    H = (|g|^2 tr(A) - g A g) / (2 |g|^3),    g the gradient and A the second derivatives of u

(Goldman, "Curvature formulas for implicit curves and surfaces", 2005), in an image without the 2: the curvature of a
curve. It is positive where the label bulges outwards: 1 / r on a ball of radius r, 1 / (2 r) on a cylinder, 0 on a
plane. It is the mean over a surface voxel and its neighbours outside, with weights |g|^2: in the middle of a thin sheet
the distances from both faces cancel, and beside it they do not. As voxels make steps, it is then averaged over the
surface voxels within `PATCH` whose normals differ by less than 60 degrees, which are those of the same face. Of a sheet
one voxel thick, whose voxels have both faces, the sign is that of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.derived.arrays.fields import signed_distance, smooth
from volumen.derived.extents import TRUNCATE
from volumen.metrics.geometry.scale import PATCH, SIGMA, Scale, ball
from volumen.utils.jit import compiled


@compiled
def _level_set(u, z, y, x, inverse, power):
    """Return the curvature of the level set of u through a voxel, and the gradient (z, y, x) of u."""
    nz, ny, nx = u.shape
    # At the volume's border, that of the next voxel inside; along an axis of fewer than 3 voxels nothing is bent.
    z, y, x = (
        min(max(z, 1), nz - 2) if nz > 2 else 0,
        min(max(y, 1), ny - 2) if ny > 2 else 0,
        min(max(x, 1), nx - 2) if nx > 2 else 0,
    )
    oz, oy, ox = int(nz > 2), int(ny > 2), int(nx > 2)
    iz, iy, ix = inverse[0], inverse[1], inverse[2]
    here = float(u[z, y, x])
    az, bz = float(u[z - oz, y, x]), float(u[z + oz, y, x])
    ay, by = float(u[z, y - oy, x]), float(u[z, y + oy, x])
    ax, bx = float(u[z, y, x - ox]), float(u[z, y, x + ox])
    gz, gy, gx = (bz - az) * iz / 2, (by - ay) * iy / 2, (bx - ax) * ix / 2
    hzz, hyy, hxx = (
        (az + bz - 2 * here) * iz * iz,
        (ay + by - 2 * here) * iy * iy,
        (ax + bx - 2 * here) * ix * ix,
    )
    hzy = (
        float(u[z + oz, y + oy, x]) - float(u[z + oz, y - oy, x])
        - float(u[z - oz, y + oy, x]) + float(u[z - oz, y - oy, x])
    ) * iz * iy / 4  # fmt: skip
    hzx = (
        float(u[z + oz, y, x + ox]) - float(u[z + oz, y, x - ox])
        - float(u[z - oz, y, x + ox]) + float(u[z - oz, y, x - ox])
    ) * iz * ix / 4  # fmt: skip
    hyx = (
        float(u[z, y + oy, x + ox]) - float(u[z, y + oy, x - ox])
        - float(u[z, y - oy, x + ox]) + float(u[z, y - oy, x - ox])
    ) * iy * ix / 4  # fmt: skip
    square = gz * gz + gy * gy + gx * gx
    if square < 1e-8:
        return 0.0, 0.0, 0.0, 0.0
    trace = hzz + hyy + hxx
    along = (
        gz * gz * hzz + gy * gy * hyy + gx * gx * hxx + 2 * (gz * gy * hzy + gz * gx * hzx + gy * gx * hyx)
    )
    return (square * trace - along) / (power * square * np.sqrt(square)), gz, gy, gx


@compiled
def _at_surface(u, mask, places, inverse, power):
    """Return curvature and unit normal of each surface voxel, float64 (n, 4); NaN where the gradients cancel.

    A voxel with faces on both sides of a sheet counts for the side with the larger gradient.
    """
    out = np.full((len(places), 4), np.nan)
    found = np.zeros((7, 4))
    for i in range(len(places)):
        best, largest = 0, 0.0
        for side in range(7):
            a = places[i, 0] + (side == 1) - (side == 2)
            b = places[i, 1] + (side == 3) - (side == 4)
            c = places[i, 2] + (side == 5) - (side == 6)
            found[side] = 0.0
            within = 0 <= a < u.shape[0] and 0 <= b < u.shape[1] and 0 <= c < u.shape[2]
            if side and (not within or mask[a, b, c]):
                continue
            value, gz, gy, gx = _level_set(u, a, b, c, inverse, power)
            found[side, 0], found[side, 1], found[side, 2], found[side, 3] = value, gz, gy, gx
            square = gz * gz + gy * gy + gx * gx
            if square > largest:
                best, largest = side, square
        if largest == 0:
            continue
        total, weight = 0.0, 0.0
        normal = np.zeros(3)
        for side in range(7):
            slope = found[side, 1:]
            if (slope * found[best, 1:]).sum() <= 0:
                continue
            square = (slope * slope).sum()
            total += square * found[side, 0]
            weight += square
            normal += slope * np.sqrt(square)
        out[i, 0] = total / weight
        out[i, 1:] = normal / np.sqrt((normal * normal).sum())
    return out


@compiled
def _averaged(values, index, places, offsets):
    """Return the mean curvature of the surface voxels around each place that face the same way.

    Args:
        values: float64 (m, 4), of `_at_surface`.
        index: int32 (Z, Y, X), row of each surface voxel, -1 elsewhere.
        places: int64 (n, 3).
        offsets: int64 (k, 3).
    """
    nz, ny, nx = index.shape
    out = np.full(len(places), np.nan)
    for i in range(len(places)):
        z, y, x = places[i, 0], places[i, 1], places[i, 2]
        own = values[index[z, y, x]]
        if np.isnan(own[0]):
            continue
        total, count = 0.0, 0
        for j in range(len(offsets)):
            a, b, c = z + offsets[j, 0], y + offsets[j, 1], x + offsets[j, 2]
            if not (0 <= a < nz and 0 <= b < ny and 0 <= c < nx) or index[a, b, c] < 0:
                continue
            other = values[index[a, b, c]]
            # NaN faces no way.
            if own[1] * other[1] + own[2] * other[2] + own[3] * other[3] > 0.5:
                total += other[0]
                count += 1
        out[i] = total / count
    return out


def mean_curvature(numbers: np.ndarray, places: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the mean curvature of the surface at surface voxels, positive where the label bulges outwards.

    Objects that touch are taken apart by leaving out their voxels at the touching faces.

    Args:
        numbers: int32 (Z, Y, X), 0 outside; the array's border is taken for that of the volume.
        places: int64 (n, 3), surface voxels.
        scale: voxel sizes.

    Returns:
        float64 (n,), in 1 / unit of the spacing; NaN where the distances of several surfaces cancel.
    """
    if not len(places):
        return np.zeros(0)
    mask = (numbers > 0) & ~_touching(numbers)
    flat = len(scale.spacing) == 2
    inner = mask[0] if flat else mask
    distance, _ = signed_distance(inner, spacing=scale.spacing, reach=TRUNCATE * SIGMA * scale.finest)
    smoothed = smooth(distance, SIGMA, scale.spacing).reshape(mask.shape)
    length = PATCH * scale.finest
    around = _surface_around(numbers, places, scale.voxels(length))
    values = _at_surface(smoothed, numbers > 0, around, 1 / np.array(scale.step), 1.0 if flat else 2.0)
    index = np.full(numbers.shape, -1, np.int32)
    index[tuple(around.T)] = np.arange(len(around))
    offsets, _ = ball(scale.costs(length), length)
    return np.asarray(_averaged(values, index, places, offsets))


def _surface_around(numbers: np.ndarray, places: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Return the surface voxels in a box around places, int64 (n, 3)."""
    low, high = places.min(axis=0) - widths, places.max(axis=0) + 1 + widths
    box = tuple(slice(max(int(a), 0), int(b)) for a, b in zip(low, high, strict=True))
    return np.argwhere(object_surfaces(numbers)[box]) + [part.start for part in box]


def object_surfaces(numbers: np.ndarray) -> np.ndarray:
    """Return the voxels of objects with a face neighbour of another number, bool (Z, Y, X).

    Args:
        numbers: integer (Z, Y, X), 0 outside any object. The array's border is no surface.
    """
    out = np.zeros(numbers.shape, bool)
    for axis in range(3):
        lines, marks = np.moveaxis(numbers, axis, 0), np.moveaxis(out, axis, 0)
        differ = lines[1:] != lines[:-1]
        marks[1:] |= differ
        marks[:-1] |= differ
    return out & (numbers > 0)


def _touching(numbers: np.ndarray) -> np.ndarray:
    """Return where a voxel of an object has a face neighbour of another object, bool (Z, Y, X)."""
    out = np.zeros(numbers.shape, bool)
    if numbers.max(initial=0) < 2:
        return out
    for axis in range(3):
        lines, marks = np.moveaxis(numbers, axis, 0), np.moveaxis(out, axis, 0)
        differ = (lines[1:] != lines[:-1]) & (lines[1:] > 0) & (lines[:-1] > 0)
        marks[1:] |= differ
        marks[:-1] |= differ
    return out
