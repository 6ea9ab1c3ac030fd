"""Compiled loops that continue partly known labels into unknown voxels.

Arrays are (Z, Y, X). Steps lead from a voxel to the nearest known one, by the distance between centres; of equally near
voxels, the one with the smallest z, then y, then x counts.
"""

from __future__ import annotations

import numpy as np

from volumen.utils.jit import compiled

NOWHERE = np.float32(1e30)
"""Squared distance where no known voxel lies within reach."""


@compiled
def known_in_row(known, cost):
    """Return the squared distance (float32) and the steps (int16) to the nearest True voxel of the same row.

    Args:
        known: bool (Z, Y, X).
        cost: float32 (K + 1,), squared distance of a step of 0..K voxels, ascending; farther voxels are ignored.
    """
    nz, ny, nx = known.shape
    last = cost.size - 1
    squared = np.empty((nz, ny, nx), np.float32)
    steps = np.empty((nz, ny, nx), np.int16)
    for z in range(nz):
        for y in range(ny):
            count = 0
            for x in range(nx):
                count += known[z, y, x]
            if count == 0 or count == nx:
                squared[z, y, :] = np.float32(0) if count else np.float32(1e30)
                steps[z, y, :] = 0
                continue
            away = last + 1
            for x in range(nx):
                away = 0 if known[z, y, x] else away + 1
                squared[z, y, x] = cost[away] if away <= last else np.float32(1e30)
                steps[z, y, x] = -away if away <= last else 0
            away = last + 1
            for x in range(nx - 1, -1, -1):
                away = 0 if known[z, y, x] else away + 1
                if away <= last and cost[away] < squared[z, y, x]:
                    squared[z, y, x] = cost[away]
                    steps[z, y, x] = away
    return squared, steps


@compiled
def known_across(squared, cost, axis):
    """Continue `known_in_row` along axis 0 or 1.

    Rows are searched outwards, and no farther than a step that is longer than the largest distance found so far.

    Args:
        squared: float32 (Z, Y, X), the distances along the axes that are done already.
        cost: float32 (K + 1,), as above, for this axis.
        axis: 0 or 1.

    Returns:
        squared float32 and steps along this axis int16, both (Z, Y, X).
    """
    nz, ny, nx = squared.shape
    length = nz if axis == 0 else ny
    others = ny if axis == 0 else nz
    out = squared.copy()
    steps = np.zeros((nz, ny, nx), np.int16)
    empty = np.empty(length, np.bool_)
    for a in range(others):
        for n in range(length):
            row = squared[n, a] if axis == 0 else squared[a, n]
            lowest = row[0]
            for x in range(nx):
                lowest = min(lowest, row[x])
            empty[n] = lowest >= np.float32(1e30)
        if empty.all():
            continue
        for n in range(length):
            best = out[n, a] if axis == 0 else out[a, n]
            chosen = steps[n, a] if axis == 0 else steps[a, n]
            for k in range(1, cost.size):
                step = cost[k]
                if k % 3 == 1:
                    largest = np.float32(0)
                    for x in range(nx):
                        largest = best[x] if best[x] > largest else largest
                    if step > largest:
                        break
                m = n - k
                if m >= 0 and not empty[m]:
                    other = squared[m, a] if axis == 0 else squared[a, m]
                    for x in range(nx):
                        value = other[x] + step
                        nearer = value <= best[x] and value < np.float32(1e30)
                        best[x] = value if nearer else best[x]
                        chosen[x] = np.int16(-k) if nearer else chosen[x]
                m = n + k
                if m < length and not empty[m]:
                    other = squared[m, a] if axis == 0 else squared[a, m]
                    for x in range(nx):
                        value = other[x] + step
                        nearer = value < best[x]
                        best[x] = value if nearer else best[x]
                        chosen[x] = np.int16(k) if nearer else chosen[x]
    return out, steps


@compiled
def continue_numbers(numbers, squared, steps_z, steps_y, steps_x):
    """Return int32 numbers (Z, Y, X) with those of the nearest known voxel where `squared` is above 0; 0 far away."""
    nz, ny, nx = numbers.shape
    out = numbers.copy()
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if squared[z, y, x] <= np.float32(0):
                    continue
                if squared[z, y, x] >= np.float32(1e30):
                    out[z, y, x] = 0
                    continue
                fz = z + steps_z[z, y, x]
                fy = y + steps_y[fz, y, x]
                fx = x + steps_x[fz, fy, x]
                out[z, y, x] = numbers[fz, fy, fx]
    return out


@compiled
def continue_surfaces(foreground, known, distance, starts, squared, steps_z, steps_y, steps_x):
    """Return bool (Z, Y, X): the foreground, with surfaces continued straight on from the nearest known voxel.

    At an unknown voxel the sign of d(f) + sum_i s_i(f) (p - f)_i decides, f the nearest known voxel, d the signed
    distance to known voxels of the other class, and s_i the mean of its differences to the one or two neighbours along
    the axis that are known. Outside the part in which d is given, the class of f counts; far away is background.

    Args:
        foreground, known: bool (Z, Y, X).
        distance: float32 (z, y, x), d in a part of the array.
        starts: int64 (3,), first voxel of this part.
        squared, steps_z, steps_y, steps_x: the results of `known_in_row` and `known_across`.
    """
    nz, ny, nx = foreground.shape
    dz, dy, dx = distance.shape
    z0, y0, x0 = starts[0], starts[1], starts[2]
    out = foreground.copy()
    zero = np.float32(0)
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if squared[z, y, x] <= zero:
                    continue
                if squared[z, y, x] >= np.float32(1e30):
                    out[z, y, x] = False
                    continue
                fz = z + steps_z[z, y, x]
                fy = y + steps_y[fz, y, x]
                fx = x + steps_x[fz, fy, x]
                a, b, c = fz - z0, fy - y0, fx - x0
                if a < 0 or a >= dz or b < 0 or b >= dy or c < 0 or c >= dx:
                    out[z, y, x] = foreground[fz, fy, fx]
                    continue
                here = distance[a, b, c]
                value = here
                if z != fz:
                    rise, sides = zero, zero
                    if a > 0 and known[fz - 1, fy, fx]:
                        rise += here - distance[a - 1, b, c]
                        sides += np.float32(1)
                    if a + 1 < dz and known[fz + 1, fy, fx]:
                        rise += distance[a + 1, b, c] - here
                        sides += np.float32(1)
                    if sides > zero:
                        value += rise / sides * np.float32(z - fz)
                if y != fy:
                    rise, sides = zero, zero
                    if b > 0 and known[fz, fy - 1, fx]:
                        rise += here - distance[a, b - 1, c]
                        sides += np.float32(1)
                    if b + 1 < dy and known[fz, fy + 1, fx]:
                        rise += distance[a, b + 1, c] - here
                        sides += np.float32(1)
                    if sides > zero:
                        value += rise / sides * np.float32(y - fy)
                if x != fx:
                    rise, sides = zero, zero
                    if c > 0 and known[fz, fy, fx - 1]:
                        rise += here - distance[a, b, c - 1]
                        sides += np.float32(1)
                    if c + 1 < dx and known[fz, fy, fx + 1]:
                        rise += distance[a, b, c + 1] - here
                        sides += np.float32(1)
                    if sides > zero:
                        value += rise / sides * np.float32(x - fx)
                out[z, y, x] = value < zero
    return out


@compiled
def scatter_of_known(known, places_z, places_y, places_x, out):
    """Compute the scatter of the known voxels within a box of 3 voxels to every side of places on a lattice.

    Args:
        known: bool (Z, Y, X).
        places_z, places_y, places_x: int64 (K,), (J,), (I,), positions along each axis.
        out: float32 (6, K, J, I), overwritten: the covariance of their positions in voxels, order (zz, zy, zx, yy,
            yx, xx).
    """
    for k in range(places_z.size):
        for j in range(places_y.size):
            for i in range(places_x.size):
                z, y, x = places_z[k], places_y[j], places_x[i]
                n, sz, sy, sx = 0, 0, 0, 0
                szz, szy, szx, syy, syx, sxx = 0, 0, 0, 0, 0, 0
                for c in range(max(0, z - 3), min(known.shape[0], z + 4)):
                    for b in range(max(0, y - 3), min(known.shape[1], y + 4)):
                        for a in range(max(0, x - 3), min(known.shape[2], x + 4)):
                            if known[c, b, a]:
                                dz, dy, dx = c - z, b - y, a - x
                                n += 1
                                sz += dz
                                sy += dy
                                sx += dx
                                szz += dz * dz
                                szy += dz * dy
                                szx += dz * dx
                                syy += dy * dy
                                syx += dy * dx
                                sxx += dx * dx
                n = max(n, 1)
                out[0, k, j, i] = szz / n - sz / n * (sz / n)
                out[1, k, j, i] = szy / n - sz / n * (sy / n)
                out[2, k, j, i] = szx / n - sz / n * (sx / n)
                out[3, k, j, i] = syy / n - sy / n * (sy / n)
                out[4, k, j, i] = syx / n - sy / n * (sx / n)
                out[5, k, j, i] = sxx / n - sx / n * (sx / n)


@compiled
def estimate_confidence(distance, clearance, sure, usable, worst, decay, margin, least, out):
    """Compute `Calibration.confidence`: 1 where `sure`, 0 where not `usable` or below `least`.

    Args:
        distance, clearance: float32 (N,), in the smallest voxel size.
        sure, usable: bool (N,).
        worst: largest error over its unit.
        decay, margin: see `Calibration`.
        least: see above.
        out: float32 (N,), overwritten.
    """
    square = worst * worst
    rate = np.float32(-2) * decay
    one = np.float32(1)
    for i in range(out.size):
        value = np.float32(0)
        if usable[i]:
            if sure[i]:
                value = one
            else:
                value = one / (one + square * np.exp(rate * clearance[i] / (abs(distance[i]) + margin)))
                value = value if value >= least else np.float32(0)
        out[i] = value
