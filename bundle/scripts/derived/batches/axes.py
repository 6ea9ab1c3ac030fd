"""Computes eigenvectors of symmetric tensors on the training device: `eigen_kernels` in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from volumen.derived.arrays.tensors import MIN_GAP

CHUNK = 1 << 19
"""Voxels per block: about forty float64 arrays of this length exist at the same time."""


def tensor_trace(tensor: Tensor) -> Tensor:
    """Return the trace (B, *spatial) of tensors (B, 3 or 6, *spatial)."""
    if tensor.shape[1] == 3:
        return tensor[:, 0] + tensor[:, 2]
    return tensor[:, 0] + tensor[:, 3] + tensor[:, 5]


def smallest_axis(tensor: Tensor, valid: Tensor, min_gap: float = MIN_GAP) -> tuple[Tensor, Tensor]:
    """Compute `tensors.smallest_axis` for a batch.

    Args:
        tensor: float32 (B, 3 or 6, *spatial), channel order of `structure_tensor`.
        valid: bool (B, *spatial).
        min_gap: relative gap of the two smallest eigenvalues below which a voxel is invalid.

    Returns:
        axes float32 (B, D, *spatial), order (x, y[, z]), 0 where invalid; valid bool (B, *spatial).
    """
    solve = _smallest_2d if tensor.shape[1] == 3 else _smallest_3d
    flat = tensor.movedim(1, 0).reshape(tensor.shape[1], -1)
    size = 2 if tensor.shape[1] == 3 else 3
    axes = torch.empty((size, flat.shape[1]), dtype=torch.float32, device=tensor.device)
    good = valid.reshape(-1).clone()
    for begin in range(0, flat.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        vectors, sound = solve(flat[:, part].double(), min_gap)
        good[part] &= sound
        axes[:, part] = torch.where(good[part], vectors, 0.0).flip(0).float()
    shape = (size, len(tensor), *tensor.shape[2:])
    return axes.reshape(shape).movedim(0, 1).contiguous(), good.reshape(valid.shape)


def largest_axis(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit eigenvector of the largest eigenvalue of mean outer products, and its relative prominence.

    Args:
        products: float (B, 3 or 6, *spatial), order (yy, yx, xx) or (zz, zy, zx, yy, yx, xx).

    Returns:
        axes float32 (B, D, *spatial), order (x, y[, z]), of either sign, 0 where all eigenvalues are equal; and the
        difference of the two largest eigenvalues over their sum (B, *spatial), in [0, 1].
    """
    everywhere = torch.ones((len(products), *products.shape[2:]), dtype=torch.bool, device=products.device)
    # The largest eigenvalue is the smallest one of the negated tensor; it is returned whatever the gap.
    axes, _ = smallest_axis(-products, everywhere, min_gap=0.0)
    return axes, _prominence(products.double(), axes.double()).float()


def _prominence(a: Tensor, axes: Tensor) -> Tensor:
    """Return the prominence of the largest eigenvalue, from the trace, the square sum and its eigenvector."""
    letters = "yx" if a.shape[1] == 3 else "zyx"
    component = dict(zip("xyz", axes.unbind(dim=1)))
    largest, squares = torch.zeros_like(a[:, 0]), torch.zeros_like(a[:, 0])
    pairs = ((one, other) for number, one in enumerate(letters) for other in letters[number:])
    for entry, (one, other) in zip(a.unbind(dim=1), pairs, strict=True):
        twice = 1.0 if one == other else 2.0
        largest += twice * entry * component[one] * component[other]
        squares += twice * entry * entry
    trace = tensor_trace(a)
    # Of the two other eigenvalues the sum and the sum of squares are known.
    rest, rest_squares = trace - largest, squares - largest * largest
    if a.shape[1] == 3:
        next_one = rest
    else:
        next_one = 0.5 * (rest + (2 * rest_squares - rest * rest).clamp_min(0).sqrt())
    total = largest + next_one
    return ((largest - next_one) / torch.where(total > 0, total, 1.0)).clamp_min(0)


def _smallest_3d(a: Tensor, min_gap: float) -> tuple[Tensor, Tensor]:
    """Apply the method of `eigen_kernels.smallest_axis_3d`: float64 (6, N) in, (3, N) in (z, y, x) out."""
    a00, a01, a02, a11, a12, a22 = a
    mean = (a00 + a11 + a22) / 3
    b00, b11, b22 = a00 - mean, a11 - mean, a22 - mean
    off = a01 * a01 + a02 * a02 + a12 * a12
    square = (b00 * b00 + b11 * b11 + b22 * b22 + 2 * off) / 6
    good = square > 1e-14 * mean * mean + 1e-60
    p = torch.where(good, square, 1.0).sqrt()
    b00, b11, b22, b01, b02, b12 = b00 / p, b11 / p, b22 / p, a01 / p, a02 / p, a12 / p
    minor0, minor1, minor2 = b11 * b22 - b12 * b12, b01 * b22 - b12 * b02, b01 * b12 - b11 * b02
    det = b00 * minor0 - b01 * minor1 + b02 * minor2
    top = det >= 0
    half = (0.5 * det.abs()).clamp_max(1.0)
    t = 1.7320508075688772 + half * (0.3214063 - 0.0534571 * half)
    for _ in range(2):
        t = t - (t * t * t - 3 * t - 2 * half) / (3 * t * t - 3)
    root = torch.where(top, t, -t)
    v = _isolated(b00 - root, b11 - root, b22 - root, b01, b02, b12)
    u, w = _across(v)
    c = (
        b00 * u[0] + b01 * u[1] + b02 * u[2],
        b01 * u[0] + b11 * u[1] + b12 * u[2],
        b02 * u[0] + b12 * u[1] + b22 * u[2],
    )
    m00, m01 = (_dot(u, c), _dot(w, c))
    # The trace of B is 0.
    m11 = -root - m00
    delta = 0.5 * (m00 - m11)
    spread = torch.hypot(delta, m01)
    low = -0.5 * root - spread
    cosine, sine = _smaller_of_two(delta, m01, spread)
    vectors = torch.stack([torch.where(top, cosine * u[i] + sine * w[i], v[i]) for i in range(3)])
    gap = torch.where(top, 2 * spread, low - root)
    largest = torch.where(top, root, low + 2 * spread)
    good = good & (gap * p >= min_gap * (largest * p + mean))
    lead = torch.where(vectors[1].abs() > 1e-6, vectors[1], vectors[2])
    lead = torch.where(vectors[0].abs() > 1e-6, vectors[0], lead)
    return torch.where(lead < 0, -vectors, vectors), good


def _isolated(r00: Tensor, r11: Tensor, r22: Tensor, b01: Tensor, b02: Tensor, b12: Tensor) -> list[Tensor]:
    """Return the unit vector that a matrix of rank 2 maps to 0: the largest cross product of two of its rows."""
    crosses = torch.stack(
        [
            torch.stack([b01 * b12 - b02 * r11, b02 * b01 - r00 * b12, r00 * r11 - b01 * b01]),
            torch.stack([b01 * r22 - b02 * b12, b02 * b02 - r00 * r22, r00 * b12 - b01 * b02]),
            torch.stack([r11 * r22 - b12 * b12, b12 * b02 - b01 * r22, b01 * b12 - r11 * b02]),
        ]
    )
    squares = (crosses * crosses).sum(dim=1)
    norm, largest = squares.max(dim=0)
    v = crosses.gather(0, largest.expand(1, 3, -1))[0]
    return list(v / torch.where(norm > 1e-30, norm, 1.0).sqrt())


def _across(v: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return an orthonormal basis of the plane perpendicular to v."""
    swap = v[0].abs() > v[1].abs()
    planar = torch.where(swap, v[0] * v[0], v[1] * v[1]) + v[2] * v[2]
    scale = torch.where(planar > 1e-30, planar, 1.0).rsqrt()
    u = [
        torch.where(swap, -v[2] * scale, 0.0),
        torch.where(swap, 0.0, v[2] * scale),
        torch.where(swap, v[0], -v[1]) * scale,
    ]
    w = [
        v[1] * u[2] - v[2] * u[1],
        v[2] * u[0] - v[0] * u[2],
        v[0] * u[1] - v[1] * u[0],
    ]
    return u, w


def _smaller_of_two(delta: Tensor, off: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvector of the smaller eigenvalue of [[delta, off], [off, -delta]], without cancellation."""
    steep = delta > 0
    c = torch.where(steep, -off, spread - delta)
    s = torch.where(steep, delta + spread, -off)
    length = c * c + s * s
    scale = torch.where(length > 1e-40, length, 1.0).rsqrt()
    return c * scale, s * scale


def _smallest_2d(a: Tensor, min_gap: float) -> tuple[Tensor, Tensor]:
    """Apply the method of `eigen_kernels.smallest_axis_2d`: float64 (3, N) in, (2, N) in (y, x) out."""
    yy, yx, xx = a
    delta, mean = 0.5 * (yy - xx), 0.5 * (yy + xx)
    spread = (delta * delta + yx * yx).sqrt()
    good = (spread > 1e-30) & (2 * spread >= min_gap * (mean + spread))
    vectors = torch.stack(_smaller_of_two(delta, yx, spread))
    lead = torch.where(vectors[0].abs() > 1e-6, vectors[0], vectors[1])
    return torch.where(lead < 0, -vectors, vectors), good


def _dot(first: list[Tensor], second: tuple[Tensor, ...]) -> Tensor:
    return first[0] * second[0] + first[1] * second[1] + first[2] * second[2]
