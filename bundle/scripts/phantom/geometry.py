"""The exact shape of a rolled sheet: an involute spiral with a moving axis and varying spacing.

In a plane across the roll the sheet follows the involute of a circle of radius b: its turns are 2 pi b apart.
The function

    u(x, y) = sqrt(r^2 - b^2) - b * arccos(b / r) - b * theta

has a gradient of norm 1, and all turns together are the points where u is a multiple of 2 pi b. Adding smooth
functions of space displaces and squeezes the turns, which remain one sheet: its middle surface is where

    F(x, y, z) = u(x - cx(z), y - cy(z)) + squeeze(r, theta, z)

is a multiple of the pitch. The distance to it is computed to 1e-2 voxels or better by closest-point iterations.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from volumen.utils.jit import compiled

ITERATIONS = 60
TOLERANCE = 1e-3
SLAB = 16


@dataclass(frozen=True)
class Roll:
    """A rolled sheet. Lengths are in voxels, (x, y, z) relative to the volume's first voxel.

    Args:
        centre: x and y of the roll's axis, without its wobble.
        pitch: mean distance between turns.
        thickness: of the sheet.
        first_turn: index of the innermost turn.
        last_turn: index of the outermost turn.
        wobble: amplitude of the axis's displacement.
        wobble_length: period of this displacement along z.
        squeeze: amplitude of the turns' displacement; with its wavelength it makes their spacing vary.
        squeeze_length: period of the displacement along the radius.
        phases: three random angles, of wobble and squeeze.
    """

    centre: tuple[float, float]
    pitch: float
    thickness: float
    first_turn: int
    last_turn: int
    wobble: float
    wobble_length: float
    squeeze: float
    squeeze_length: float
    phases: tuple[float, float, float]

    @classmethod
    def draw(cls, shape: tuple[int, int, int], seed: int) -> Roll:
        """Return a roll that fills a volume (Z, Y, X), different for every seed."""
        generator = np.random.default_rng(seed)
        across = min(shape[1:])
        pitch, thickness = generator.uniform(11, 13), generator.uniform(2.6, 3.4)
        return cls(
            centre=(
                shape[2] / 2 + generator.uniform(-0.05, 0.05) * across,
                shape[1] / 2 + generator.uniform(-0.05, 0.05) * across,
            ),
            pitch=pitch,
            thickness=thickness,
            first_turn=1,
            last_turn=max(2, round(0.45 * across / pitch)),
            wobble=3.0,
            wobble_length=generator.uniform(90, 130),
            squeeze=6.0,
            squeeze_length=generator.uniform(44, 56),
            phases=tuple(generator.uniform(0, 2 * math.pi, size=3)),
        )

    def parameters(self) -> np.ndarray:
        """Return the parameters of the compiled functions."""
        return np.array(
            [
                *self.centre,
                self.pitch,
                self.wobble,
                self.wobble_length,
                self.squeeze,
                self.squeeze_length,
                *self.phases,
                self.first_turn,
                self.last_turn,
            ]
        )


@dataclass(frozen=True)
class Geometry:
    """The exact geometry at every voxel; spatial axes (Z, Y, X), lengths in voxels.

    Args:
        distance: float32, signed distance to the sheet's boundary, negative inside, cut at the reach.
        normals: float32 (3, Z, Y, X), unit vectors (x, y, z) away from the sheet's middle; 0 beyond reach.
        valid: bool, False near the roll's axis and near the two ends of the sheet, where the distance to the
            middle surface differs from the distance to the sheet, and beyond the reach.
        along: float32, length along the sheet from its start, for textures.
    """

    distance: np.ndarray
    normals: np.ndarray
    valid: np.ndarray
    along: np.ndarray


def sheet_geometry(roll: Roll, shape: tuple[int, int, int], reach: float = 12.0) -> Geometry:
    """Return the exact distances and normals of a roll in a volume.

    Args:
        roll: the sheet.
        shape: voxels (Z, Y, X).
        reach: maximum distance from the sheet's boundary, in voxels.
    """
    distance = np.empty(shape, np.float32)
    normals = np.empty((3, *shape), np.float32)
    valid = np.empty(shape, np.bool_)
    along = np.empty(shape, np.float32)
    numbers = roll.parameters()

    def measure(z: int) -> None:
        part = slice(z, z + SLAB)
        parts = distance[part], normals[:, part], valid[part], along[part]
        _measure(numbers, roll.thickness, reach, z, *parts)

    with ThreadPoolExecutor() as pool:
        list(pool.map(measure, range(0, shape[0], SLAB)))
    return Geometry(distance, normals, valid, along)


@compiled
def _field(p, x, y, z, side, out):
    """Write F, its gradient (x, y, z), r and theta of a point into `out`; theta is the one nearest to `side`."""
    b = p[2] / (2 * math.pi)
    angle = 2 * math.pi * z / p[4] + p[7]
    dx = x - p[0] - p[3] * math.sin(angle)
    dy = y - p[1] - p[3] * math.cos(angle)
    rate = 2 * math.pi / p[4]
    vx, vy = p[3] * math.cos(angle) * rate, -p[3] * math.sin(angle) * rate
    r = max(math.sqrt(dx * dx + dy * dy), 1.01 * b)
    theta = math.atan2(dy, dx)
    theta += 2 * math.pi * math.floor((side - theta) / (2 * math.pi) + 0.5)
    root = math.sqrt(r * r - b * b)
    u_r, u_t = root / r, -b / r
    wave = 2 * math.pi / p[6]
    phase = wave * r + 2 * theta + p[8] + math.sin(2 * math.pi * z / 150 + p[9])
    # The displacement decreases towards the axis, where its angular part would fold the sheet.
    fade = 1 - math.exp(-((r / 30) ** 2))
    fade_r = 2 * r / 900 * math.exp(-((r / 30) ** 2))
    # The second harmonic makes the squeezed parts short and strong, so that turns nearly touch there.
    h = p[5] * (math.sin(phase) + 0.35 * math.sin(2 * phase))
    h_phase = p[5] * (math.cos(phase) + 0.70 * math.cos(2 * phase))
    f_r = u_r + fade_r * h + fade * h_phase * wave
    f_t = u_t + fade * h_phase * 2 / r
    c, s = dx / r, dy / r
    out[0] = root - b * math.acos(b / r) - b * theta + fade * h
    out[1] = f_r * c - f_t * s
    out[2] = f_r * s + f_t * c
    turn = math.cos(2 * math.pi * z / 150 + p[9]) * 2 * math.pi / 150
    out[3] = -out[1] * vx - out[2] * vy + fade * h_phase * turn
    out[4], out[5] = r, theta


@compiled
def _closest(p, x, y, z, side, level, out):
    """Return the signed distance to F = level; F's values at the foot point remain in `out`."""
    fx, fy, fz = x, y, z
    distance = 0.0
    for _ in range(ITERATIONS):
        _field(p, fx, fy, fz, side, out)
        norm2 = out[1] ** 2 + out[2] ** 2 + out[3] ** 2
        norm = math.sqrt(norm2)
        step = (out[0] - level) / norm2
        # The voxel's offset from the tangent plane, along the normal at the foot point.
        nx, ny, nz = out[1] / norm, out[2] / norm, out[3] / norm
        gap = (x - fx) * nx + (y - fy) * ny + (z - fz) * nz + step * norm
        moved = abs(gap - distance) + abs(step) * norm
        distance = gap
        fx, fy, fz = x - gap * nx, y - gap * ny, z - gap * nz
        if moved < TOLERANCE:
            break
    return distance


@compiled
def _measure(p, thickness, reach, first_z, distance, normals, valid, along):
    out = np.empty(6)
    pitch, first, last = p[2], p[10], p[11]
    b = pitch / (2 * math.pi)
    for row in range(distance.shape[0]):
        z = first_z + row
        for y in range(distance.shape[1]):
            for x in range(distance.shape[2]):
                _field(p, x, y, z, 0.0, out)
                value, r, theta = out[0], out[4], out[5]
                slope = math.sqrt(out[1] ** 2 + out[2] ** 2 + out[3] ** 2)
                turn = min(max(math.floor(value / pitch + 0.5), first), last)
                best = reach + thickness
                nx = ny = nz = 0.0
                # The nearest value of F comes first; where the roll is squeezed, a neighbouring turn may be nearer.
                for offset in (0, 1, -1):
                    near = turn + offset
                    guess = abs(value - near * pitch) / slope
                    if near < first or near > last or guess > 2 * abs(best):
                        continue
                    gap = _closest(p, x, y, z, theta, near * pitch, out)
                    if abs(gap) < abs(best):
                        norm = math.sqrt(out[1] ** 2 + out[2] ** 2 + out[3] ** 2)
                        best = gap
                        nx, ny, nz = out[1] / norm, out[2] / norm, out[3] / norm
                sign = 1.0 if best >= 0 else -1.0
                outside = abs(best) - thickness / 2
                known = outside < reach
                distance[row, y, x] = min(outside, reach)
                normals[0, row, y, x] = sign * nx if known else 0.0
                normals[1, row, y, x] = sign * ny if known else 0.0
                normals[2, row, y, x] = sign * nz if known else 0.0
                along[row, y, x] = b / 2 * (theta + 2 * math.pi * turn) ** 2
                # The sheet begins and ends on the half-plane theta = pi, where the index of the turns changes.
                across = r * abs(math.pi - abs(theta))
                outermost = value < (first + 1) * pitch or value > (last - 1) * pitch
                at_an_end = outermost and across < reach + thickness
                valid[row, y, x] = known and not at_an_end and r > 1.5 * pitch
