"""Mean curvature of a label's surface.

The signed distance u to the surface is smoothed by a Gaussian; its level sets are bent as the surface is. Their mean
curvature is

    H = (|g|^2 tr(A) - g A g) / (2 |g|^3),    g the gradient and A the second derivatives of u

(Goldman, "Curvature formulas for implicit curves and surfaces", 2005), in an image without the 2: the curvature of a
curve. It is positive where the label bulges outwards: 1 / r on a ball of radius r, 1 / (2 r) on a cylinder, 0 on a
plane. It is the mean over a surface voxel and its neighbours outside, with weights |g|^2: in the middle of a thin sheet
the distances from both faces cancel, and beside it they do not.
"""

from __future__ import annotations

import numpy as np

from volumen.derived.arrays.fields import signed_distance, smooth
from volumen.derived.extents import TRUNCATE
from volumen.metrics.geometry.scale import SIGMA, Scale
from volumen.utils.jit import compiled


@compiled
def _level_set(u, z, y, x, inverse, power):
    """Return the curvature of the level set of u through a voxel, and the squared norm of the gradient."""
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
        return 0.0, 0.0
    trace = hzz + hyy + hxx
    along = (
        gz * gz * hzz + gy * gy * hyy + gx * gx * hxx + 2 * (gz * gy * hzy + gz * gx * hzx + gy * gx * hyx)
    )
    return (square * trace - along) / (power * square * np.sqrt(square)), square


@compiled
def _curvatures(u, mask, places, inverse, power):
    out = np.full(len(places), np.nan)
    for i in range(len(places)):
        z, y, x = places[i, 0], places[i, 1], places[i, 2]
        total, weight = 0.0, 0.0
        for side in range(7):
            a, b, c = z, y, x
            if side:
                a += (side == 1) - (side == 2)
                b += (side == 3) - (side == 4)
                c += (side == 5) - (side == 6)
                if not (0 <= a < u.shape[0] and 0 <= b < u.shape[1] and 0 <= c < u.shape[2]) or mask[a, b, c]:
                    continue
            value, share = _level_set(u, a, b, c, inverse, power)
            total += share * value
            weight += share
        if weight > 0:
            out[i] = total / weight
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
    inverse = 1 / np.array(scale.step)
    return np.asarray(_curvatures(smoothed, numbers > 0, places, inverse, 1.0 if flat else 2.0))


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
