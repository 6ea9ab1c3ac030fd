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
def known_in_row(known, cost, squared, steps):
    """Compute the squared distance and the steps to the nearest True voxel of the same row.

    Args:
        known: bool (Z, Y, X).
        cost: float32 (K + 1,), squared distance of a step of 0..K voxels, ascending; farther voxels are ignored.
        squared: float32 (Z, Y, X), overwritten. The caller allocates it, since NumPy requests huge pages.
        steps: int16 (Z, Y, X), overwritten.
    """
    nz, ny, nx = known.shape
    last = cost.size - 1
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


@compiled
def known_across(squared, cost, axis, out, steps):
    """Continue `known_in_row` along axis 0 or 1.

    Rows are searched outwards, and no farther than a step that is longer than the largest distance found so far. A
    row is skipped if the next one towards the voxel is nowhere farther from a known voxel.

    Args:
        squared: float32 (Z, Y, X), the distances along the axes that are done already.
        cost: float32 (K + 1,), as above, for this axis.
        axis: 0 or 1.
        out: float32 (Z, Y, X), overwritten with the squared distance.
        steps: int16 (Z, Y, X), overwritten with the steps along this axis.
    """
    nz, ny, nx = squared.shape
    length = nz if axis == 0 else ny
    others = ny if axis == 0 else nz
    far = np.float32(1e30)
    # Whether a row can be the nearest one for rows before it, and for rows after it.
    before = np.empty((length, others), np.bool_)
    after = np.empty((length, others), np.bool_)
    for i in range(nz):
        for j in range(ny):
            n, a = (i, j) if axis == 0 else (j, i)
            row = squared[i, j]
            last = squared[max(i - 1, 0), j] if axis == 0 else squared[i, max(j - 1, 0)]
            finite, lower, higher = False, False, False
            for x in range(nx):
                finite |= row[x] < far
                lower |= row[x] < last[x]
                higher |= last[x] < row[x]
            before[n, a] = finite and (n == 0 or lower)
            after[n, a] = finite
            if n > 0:
                after[n - 1, a] &= higher
    for i in range(nz):
        for j in range(ny):
            n, a = (i, j) if axis == 0 else (j, i)
            best = out[i, j]
            best[:] = squared[i, j]
            chosen = steps[i, j]
            chosen[:] = np.int16(0)
            changed = True
            for k in range(1, cost.size):
                step = cost[k]
                if changed:
                    changed = False
                    open_ = False
                    for x in range(nx):
                        open_ |= best[x] >= step
                    if not open_:
                        break
                m = n - k
                if m >= 0 and after[m, a]:
                    changed = True
                    other = squared[m, a] if axis == 0 else squared[a, m]
                    for x in range(nx):
                        value = other[x] + step
                        nearer = value <= best[x] and value < far
                        best[x] = value if nearer else best[x]
                        chosen[x] = np.int16(-k) if nearer else chosen[x]
                m = n + k
                if m < length and before[m, a]:
                    changed = True
                    other = squared[m, a] if axis == 0 else squared[a, m]
                    for x in range(nx):
                        value = other[x] + step
                        nearer = value < best[x]
                        best[x] = value if nearer else best[x]
                        chosen[x] = np.int16(k) if nearer else chosen[x]


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
def _straight_above(away, step_z, flat_y, flat_x, z, y):
    """Return the step to the plane of nearest known voxels if these all lie straight above or below a row, else 0."""
    nx = away.size
    step = np.int64(step_z[0])
    other = False
    for x in range(nx):
        other |= (step_z[x] != step) | (away[x] >= np.float32(1e30))
    if other or step == 0:
        return np.int64(0)
    beside_y, beside_x = flat_y[z + step, y], flat_x[z + step, y]
    for x in range(nx):
        other |= (beside_y[x] != 0) | (beside_x[x] != 0)
    return np.int64(0) if other else step


@compiled
def _continue_row(classes, distance, sure, step, z, y, starts, out):
    """Compute one row of `continue_surfaces` whose nearest known voxels are those `step` planes away."""
    dz, dy, dx = distance.shape
    a, b, x0 = z + step - starts[0], y - starts[1], starts[2]
    out[:] = classes[z + step, y]
    if a < 0 or a >= dz or b < 0 or b >= dy:
        return
    zero, one = np.float32(0), np.float32(1)
    way = np.float32(-step)
    here = distance[a, b]
    last, following = distance[max(a - 1, 0), b], distance[min(a + 1, dz - 1), b]
    has_last, has_following = a > 0, a + 1 < dz
    last_known = sure[z + step - 1 if has_last else z + step, y, x0 : x0 + dx]
    following_known = sure[z + step + 1 if has_following else z + step, y, x0 : x0 + dx]
    target = out[x0 : x0 + dx]
    for c in range(dx):
        left = has_last and last_known[c]
        right = has_following and following_known[c]
        rise = (here[c] - last[c] if left else zero) + (following[c] - here[c] if right else zero)
        sides = (one if left else zero) + (one if right else zero)
        target[c] = here[c] + rise / max(sides, one) * way < zero


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
    zero, one = np.float32(0), np.float32(1)
    # Flat positions, unsigned: no index can be negative, which saves a test per access.
    sure, depths = known.reshape(-1), distance.reshape(-1)
    flat_y, flat_x, classes = steps_y.reshape(-1), steps_x.reshape(-1), foreground.reshape(-1)
    for z in range(nz):
        for y in range(ny):
            away, step_z, target = squared[z, y], steps_z[z, y], out[z, y]
            step = _straight_above(away, step_z, steps_y, steps_x, z, y)
            if step != 0:
                _continue_row(foreground, distance, known, step, z, y, starts, target)
                continue
            for x in range(nx):
                if away[x] <= zero:
                    continue
                if away[x] >= np.float32(1e30):
                    target[x] = False
                    continue
                fz = z + step_z[x]
                fy = y + flat_y[np.uintp((fz * ny + y) * nx + x)]
                row = (fz * ny + fy) * nx
                fx = x + flat_x[np.uintp(row + x)]
                a, b, c = fz - z0, fy - y0, fx - x0
                if a < 0 or a >= dz or b < 0 or b >= dy or c < 0 or c >= dx:
                    target[x] = classes[np.uintp(row + fx)]
                    continue
                at, here_at = row + fx, (a * dy + b) * dx + c
                here = depths[np.uintp(here_at)]
                value = here
                if z != fz:
                    rise, sides = zero, zero
                    if a > 0 and sure[np.uintp(at - ny * nx)]:
                        rise += here - depths[np.uintp(here_at - dy * dx)]
                        sides += one
                    if a + 1 < dz and sure[np.uintp(at + ny * nx)]:
                        rise += depths[np.uintp(here_at + dy * dx)] - here
                        sides += one
                    if sides > zero:
                        value += rise / sides * np.float32(z - fz)
                if y != fy:
                    rise, sides = zero, zero
                    if b > 0 and sure[np.uintp(at - nx)]:
                        rise += here - depths[np.uintp(here_at - dx)]
                        sides += one
                    if b + 1 < dy and sure[np.uintp(at + nx)]:
                        rise += depths[np.uintp(here_at + dx)] - here
                        sides += one
                    if sides > zero:
                        value += rise / sides * np.float32(y - fy)
                if x != fx:
                    rise, sides = zero, zero
                    if c > 0 and sure[np.uintp(at - 1)]:
                        rise += here - depths[np.uintp(here_at - 1)]
                        sides += one
                    if c + 1 < dx and sure[np.uintp(at + 1)]:
                        rise += depths[np.uintp(here_at + 1)] - here
                        sides += one
                    if sides > zero:
                        value += rise / sides * np.float32(x - fx)
                target[x] = value < zero
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
def vectors_across(values, confidence, free, places, trust, least):
    """Replace vectors by the unit vector of their part across a direction, see `planes.within_planes`, in place.

    Args:
        values: float32 (3, N), order (x, y, z), overwritten where `free` is not 0.
        confidence: float32 (N,), overwritten with `trust` times the length of the part; 0 if it was 0, if the part is
            shorter than `least`, or if `free` is 0.
        free: float32 (3, N), order (x, y, z).
        places: int64 (K,), the voxels to replace.
        trust, least: see above.
    """
    for place in places:
        at = np.uintp(place)
        fx, fy, fz = free[0, at], free[1, at], free[2, at]
        if fx == 0 and fy == 0 and fz == 0:
            confidence[at] = np.float32(0)
            continue
        along = values[0, at] * fx + values[1, at] * fy + values[2, at] * fz
        x, y, z = values[0, at] - along * fx, values[1, at] - along * fy, values[2, at] - along * fz
        length = np.sqrt(x * x + y * y + z * z)
        divisor = max(length, np.float32(1e-6))
        values[0, at], values[1, at], values[2, at] = x / divisor, y / divisor, z / divisor
        known = confidence[at] > 0 and length >= least
        confidence[at] = trust * length if known else np.float32(0)


@compiled
def tensors_across(values, confidence, free, places, trust, least):
    """Replace tensors by their part across a direction on both sides, see `planes.within_planes`, in place.

    Args:
        values: float32 (6, N), order (zz, zy, zx, yy, yx, xx), overwritten where `free` is not 0.
        confidence: float32 (N,), overwritten with `trust`; 0 if it was 0 or if `free` is 0.
        free, places, trust, least: see `vectors_across`; the last one has no meaning here.
    """
    for place in places:
        at = np.uintp(place)
        x, y, z = free[0, at], free[1, at], free[2, at]
        if x == 0 and y == 0 and z == 0:
            confidence[at] = np.float32(0)
            continue
        zz, zy, zx = values[0, at], values[1, at], values[2, at]
        yy, yx, xx = values[3, at], values[4, at], values[5, at]
        pz = zz * z + zy * y + zx * x
        py = zy * z + yy * y + yx * x
        px = zx * z + yx * y + xx * x
        both = pz * z + py * y + px * x
        values[0, at] = zz - z * pz - pz * z + both * z * z
        values[1, at] = zy - z * py - pz * y + both * z * y
        values[2, at] = zx - z * px - pz * x + both * z * x
        values[3, at] = yy - y * py - py * y + both * y * y
        values[4, at] = yx - y * px - py * x + both * y * x
        values[5, at] = xx - x * px - px * x + both * x * x
        confidence[at] = trust if confidence[at] > 0 else np.float32(0)


@compiled
def estimate_confidence(distance, clearance, sure, usable, worst, decay, margin, least, out):
    """Compute `Calibration.confidence`: 1 where `sure`, 0 where not `usable` or below `least`.

    Args:
        distance, clearance: float32 (Z, Y, X), in the smallest voxel size; parts of larger arrays need no copy.
        sure, usable: bool (Z, Y, X).
        worst: largest error over its unit.
        decay, margin: see `Calibration`.
        least: see above.
        out: float32 (Z, Y, X), overwritten.
    """
    square = worst * worst
    rate = np.float32(-2) * decay
    one = np.float32(1)
    nz, ny, nx = out.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                value = np.float32(0)
                if usable[z, y, x]:
                    if sure[z, y, x]:
                        value = one
                    else:
                        reach = abs(distance[z, y, x]) + margin
                        value = one / (one + square * np.exp(rate * clearance[z, y, x] / reach))
                        value = value if value >= least else np.float32(0)
                out[z, y, x] = value
