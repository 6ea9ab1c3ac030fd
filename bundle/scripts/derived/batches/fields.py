"""Computes the fields of `fields` for a batch on the training device, in torch.

Conventions, arguments and results are those of `fields`, with a batch axis in front: (B, *spatial) instead of
(*spatial), (B, D, *spatial) instead of (D, *spatial). Every filter along an axis is one product with a banded
matrix that holds the weights of each output position, including borders: one kernel launch per axis, in float32 also
on a GPU. No function here copies a value from the device to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from volumen.derived.arrays.fields import MIN_GRADIENT
from volumen.derived.distance_window import Bounds, DistanceWindow, Region, distance_window
from volumen.derived.extents import gaussian_radius
from volumen.derived.kernels import filter_weights

FAR = 1e30
"""Squared distance of voxels that are not within reach; sums of it stay finite."""


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute float32 products in full precision: TensorFloat-32 has 10 bits of mantissa, autocast fewer."""
    available = torch.amp.is_autocast_available(device.type)
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False) if available else nullcontext():
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def signed_distance(
    foreground: Tensor,
    *,
    spacing: Sequence[float],
    reach: float | None = None,
    known: Tensor | None = None,
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `fields.signed_distance` of bool (B, *spatial): distance float32 and valid bool (B, *region).

    The result is equal bit by bit: it computes the same sums of the same numbers in the same order.
    """
    window = distance_window(foreground.shape[1:], spacing, reach, region)
    foreground, known, in_volume = (_crop(x, window) for x in (foreground, known, in_volume))
    towards, away = foreground, ~foreground
    if in_volume is not None:
        towards, away = towards & in_volume, away & in_volume
    sides = [towards, away]
    if known is not None:
        unknown = ~known if in_volume is None else in_volume & ~known
        sides = [towards | unknown, away | unknown, unknown]
    nearest = nearest_squared(torch.stack(sides, dim=1), window.costs, window.part)
    here = foreground[(slice(None), *window.part)]
    squared = torch.where(here, nearest[:, 1], nearest[:, 0])
    nearest_unknown = None if known is None else nearest[:, 2]
    return _signed_and_valid(squared, here, window, known, in_volume, nearest_unknown)


def instance_distance(
    numbers: Tensor,
    *,
    spacing: Sequence[float],
    reach: float | None = None,
    known: Tensor | None = None,
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `instance_distance.instance_distance` of integer (B, *spatial): distance and valid (B, *region)."""
    window = distance_window(numbers.shape[1:], spacing, reach, region)
    numbers, known, in_volume = (_crop(x, window) for x in (numbers.clamp_min(0), known, in_volume))
    here = numbers[(slice(None), *window.part)] > 0
    unknown = nearest_unknown = None
    if known is not None:
        unknown = ~known if in_volume is None else in_volume & ~known
        numbers = torch.where(unknown, -1, numbers)
        nearest_unknown = nearest_squared(unknown[:, None], window.costs, window.part)[:, 0]
    if in_volume is None:
        squared = _nearest_other(numbers, window.costs, window.part)
    else:
        squared = _nearest_other_inside(numbers, in_volume, window.costs, window.part)
    return _signed_and_valid(squared, here, window, known, in_volume, nearest_unknown)


def distance_bounds(
    foreground: Tensor,
    *,
    spacing: Sequence[float],
    reach: float | None = None,
    known: Tensor | None = None,
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> Bounds:
    """Compute `fields.distance_bounds` of bool (B, *spatial), equal bit by bit: (B, *region)."""
    window = distance_window(foreground.shape[1:], spacing, reach, region)
    foreground, known, in_volume = (_crop(x, window) for x in (foreground, known, in_volume))
    certain, unknown = _certain_and_unknown(foreground, known, in_volume)
    sides = [foreground & certain, ~foreground & certain, *([] if unknown is None else [unknown])]
    nearest = nearest_squared(torch.stack(sides, dim=1), window.costs, window.part)
    here = foreground[(slice(None), *window.part)]
    other = torch.where(here, nearest[:, 1], nearest[:, 0])
    return _signed_bounds(other, here, window, certain, None if unknown is None else nearest[:, 2])


def instance_bounds(
    numbers: Tensor,
    *,
    spacing: Sequence[float],
    reach: float | None = None,
    known: Tensor | None = None,
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> Bounds:
    """Compute `instance_distance.instance_bounds` of integer (B, *spatial): (B, *region)."""
    window = distance_window(numbers.shape[1:], spacing, reach, region)
    numbers, known, in_volume = (_crop(x, window) for x in (numbers.clamp_min(0), known, in_volume))
    certain, unknown = _certain_and_unknown(numbers, known, in_volume)
    foreground = numbers > 0
    here = foreground[(slice(None), *window.part)]
    if unknown is not None:
        numbers = torch.where(unknown, -1, numbers)
    if in_volume is None:
        near = _nearest_other(numbers, window.costs, window.part)
    else:
        near = _nearest_other_inside(numbers, in_volume, window.costs, window.part)
    if unknown is None:
        return _signed_bounds(near, here, window, certain, None)
    sides = torch.stack([foreground & certain, ~foreground & certain, unknown], dim=1)
    to_foreground, to_background, nearest_unknown = nearest_squared(sides, window.costs, window.part).unbind(
        1
    )
    known_here = (near < nearest_unknown) | (near >= float(window.limit))
    far = torch.where(known_here, near, torch.where(here, to_background, to_foreground))
    return _signed_bounds(far, here, window, certain, nearest_unknown)


def _certain_and_unknown(
    like: Tensor, known: Tensor | None, in_volume: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return where a label is known inside the volume, and where it is unknown there (None for nowhere)."""
    if known is None:
        return torch.ones_like(like, dtype=torch.bool) if in_volume is None else in_volume, None
    return (known, ~known) if in_volume is None else (known & in_volume, in_volume & ~known)


def _signed_bounds(
    other: Tensor, here: Tensor, window: DistanceWindow, certain: Tensor, nearest_unknown: Tensor | None
) -> Bounds:
    """Apply `distance_window.signed_bounds` to squared distances to the nearest other; negative where `here`."""
    certain = certain[(slice(None), *window.part)]
    half, cut = float(np.float32(window.half)), float(np.float32(window.cut))
    far = torch.clamp(_root(other) - half, max=cut)
    if nearest_unknown is None:
        near, clearance, sure = far, torch.full_like(far, cut), certain
    else:
        clearance = torch.clamp(_root(nearest_unknown) - half, max=cut)
        near = torch.minimum(far, clearance)
        beyond = torch.minimum(other, nearest_unknown) >= float(window.limit)
        sure = certain & ((other < nearest_unknown) | beyond)
    near, far = near * certain, far * certain
    return Bounds(torch.where(here, -far, near), torch.where(here, -near, far), certain, clearance, sure)


def _crop(x: Tensor | None, window: DistanceWindow) -> Any:
    return None if x is None else x[(slice(None), *window.around)]


def _signed_and_valid(
    squared: Tensor,
    here: Tensor,
    window: DistanceWindow,
    known: Tensor | None,
    in_volume: Tensor | None,
    nearest_unknown: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Apply `distance_window.signed_and_valid` to squared distances to the nearest other; negative where `here`."""
    distance = torch.clamp(_root(squared) - float(np.float32(window.half)), max=float(np.float32(window.cut)))
    distance = torch.where(here & (squared > 0), -distance, distance)
    valid = torch.ones_like(here)
    for mask in (known, in_volume):
        if mask is not None:
            valid &= mask[(slice(None), *window.part)]
    if nearest_unknown is not None:
        valid &= (squared < nearest_unknown) | (squared >= float(window.limit))
    if known is not None or in_volume is not None:
        distance = distance * valid
    return distance, valid


def _root(squared: Tensor) -> Tensor:
    """Return the correctly rounded float32 root; on a CPU, torch's own may differ in the last bit."""
    return squared.sqrt() if squared.is_cuda else squared.double().sqrt().float()


def _nearest_other(numbers: Tensor, costs: Sequence[np.ndarray], part: Region) -> Tensor:
    """Return the squared distance to the nearest voxel of another number, (B, *spatial) in, (B, *part) out.

    A voxel of another number is at distance 0, one of the same number stands for its own line, see `distance_kernels`.
    """
    squared = torch.where(numbers < 0, 0.0, FAR)
    for axis in reversed(range(len(costs))):
        best = squared.clone()
        for k, step in list(enumerate(costs[axis].tolist()))[1 : squared.shape[axis + 1]]:
            (n_low, n_high), (s_low, s_high), (b_low, b_high) = (
                _ends(x, k, axis + 1) for x in (numbers, squared, best)
            )
            differ = n_low != n_high
            torch.minimum(b_low, s_high.masked_fill(differ, 0.0).add_(step), out=b_low)
            torch.minimum(b_high, s_low.masked_fill(differ, 0.0).add_(step), out=b_high)
        size = part[axis].stop - part[axis].start
        squared = best.narrow(axis + 1, part[axis].start, size)
        numbers = numbers.narrow(axis + 1, part[axis].start, size)
    return squared


def _ends(x: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    """Return all but the last `k`, and all but the first `k`, along an axis: the pairs of voxels at distance `k`."""
    length = x.shape[axis] - k
    return x.narrow(axis, 0, length), x.narrow(axis, k, length)


def _nearest_other_inside(
    numbers: Tensor, in_volume: Tensor, costs: Sequence[np.ndarray], part: Region
) -> Tensor:
    """Compute `_nearest_other` where voxels outside the volume have no number.

    A line through such voxels cannot stand for one instance. So every voxel stores the nearest number and the
    nearest other one; this suffices for every instance.
    """
    own = numbers[(slice(None), *part)]
    far = torch.full(numbers.shape, FAR, device=numbers.device)
    first, second = (torch.where(in_volume, 0.0, FAR), numbers), (far, torch.full_like(numbers, -2))
    for axis in reversed(range(len(costs))):
        cost, size = costs[axis].tolist(), part[axis].stop - part[axis].start
        reach = len(cost) - 1
        lines = [
            (pad_axis(squared, reach, axis + 1, FAR), pad_axis(number, reach, axis + 1, -2))
            for squared, number in (first, second)
        ]
        begin = part[axis].start + reach
        first, second = (
            (squared.narrow(axis + 1, begin, size), number.narrow(axis + 1, begin, size))
            for squared, number in lines
        )
        for k in (step for step in range(-reach, reach + 1) if step):
            for squared, number in lines:
                value = squared.narrow(axis + 1, begin + k, size) + cost[abs(k)]
                first, second = _insert(first, second, value, number.narrow(axis + 1, begin + k, size))
    return torch.where(first[1] != own, first[0], second[0])


def _insert(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], value: Tensor, number: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Insert a candidate into the nearest and the nearest of another number."""
    nearer, same = value < first[0], number == first[1]
    middle = ~nearer & ~same & (value < second[0])
    pushed = nearer & ~same
    rest = (
        torch.where(pushed, first[0], torch.where(middle, value, second[0])),
        torch.where(pushed, first[1], torch.where(middle, number, second[1])),
    )
    return (torch.where(nearer, value, first[0]), torch.where(nearer, number, first[1])), rest


def nearest_squared(feature: Tensor, costs: Sequence[np.ndarray], part: Region) -> Tensor:
    """Return the squared distance to the nearest True voxel: bool (B, N, *spatial) in, float32 (B, N, *part) out.

    Args:
        feature: the voxels to which distances are measured.
        costs: per axis, the squared distance of a step of 0..K voxels; farther voxels are ignored.
        part: the region to compute.
    """
    squared = torch.where(feature, 0.0, FAR)
    for axis in reversed(range(len(costs))):
        squared = _nearest_along(squared, costs[axis].tolist(), axis + 2, part[axis])
    return squared


def _nearest_along(squared: Tensor, cost: Sequence[float], axis: int, part: slice) -> Tensor:
    """Return the minimum over steps k along an axis of `squared + cost[|k|]`, with three launches for each k."""
    reach, size = len(cost) - 1, part.stop - part.start
    padded = pad_axis(squared, reach, axis, FAR)
    best = padded.narrow(axis, part.start + reach, size).clone()
    for k in range(1, reach + 1):
        before = padded.narrow(axis, part.start + reach - k, size)
        behind = padded.narrow(axis, part.start + reach + k, size)
        torch.minimum(best, torch.minimum(before, behind).add_(cost[k]), out=best)
    return best


def nearest_vectors(foreground: Tensor, *, spacing: Sequence[float], reach: float, region: Region) -> Tensor:
    """Compute `components.nearest_component` of bool (B, *spatial): float32 (B, D, *region), order (x, y[, z])."""
    ndim = foreground.dim() - 1
    window = distance_window(foreground.shape[1:], spacing, reach, region)
    squared = torch.where(_crop(foreground, window), 0.0, FAR)
    steps = torch.zeros((ndim, *squared.shape), dtype=torch.int16, device=squared.device)
    for axis in reversed(range(ndim)):
        squared, steps = nearest_steps(squared, steps, window.costs[axis].tolist(), axis, window.part[axis])
    sizes = torch.tensor([float(np.float32(size)) for size in spacing], device=squared.device)
    vectors = (steps * sizes.view(-1, *[1] * (ndim + 1))).flip(0).movedim(0, 1)
    norm = (vectors * vectors).sum(dim=1, keepdim=True).sqrt()
    return torch.where(norm > 0, vectors / norm.clamp_min(1e-30), torch.zeros_like(vectors))


def nearest_steps(
    squared: Tensor, steps: Tensor, cost: Sequence[float], axis: int, part: slice
) -> tuple[Tensor, Tensor]:
    """Compute `_nearest_along` of (B, *spatial) and the steps (D, B, *spatial) to the nearest; the first of equals."""
    reach, size = len(cost) - 1, part.stop - part.start
    padded, led = pad_axis(squared, reach, axis + 1, FAR), pad_axis(steps, reach, axis + 2, 0)
    best = torch.full_like(padded.narrow(axis + 1, 0, size), FAR)
    chosen = torch.zeros_like(led.narrow(axis + 2, 0, size))
    for k in range(-reach, reach + 1):
        value = padded.narrow(axis + 1, part.start + reach + k, size) + cost[abs(k)]
        # Sums of far values exceed FAR by rounding at most, so a far voxel is never nearer.
        nearer = value < best
        best = torch.where(nearer, value, best)
        candidate = led.narrow(axis + 2, part.start + reach + k, size).clone()
        candidate[axis] = k
        chosen = torch.where(nearer, candidate, chosen)
    return best, chosen


def pad_axis(x: Tensor, width: int, axis: int, value: float | bool) -> Tensor:
    """Return `x` with `width` entries of `value` at both ends of an axis."""
    edge = list(x.shape)
    edge[axis] = width
    filler = x.new_full(edge, value)
    return torch.cat([filler, x, filler], dim=axis)


def smooth(
    field: Tensor,
    sigma: float,
    spacing: Sequence[float],
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> Tensor:
    """Compute `fields.smooth` of float32 (B, *spatial): float32 (B, *region)."""
    region = region or _whole(field.shape[1:])
    field = field if in_volume is None else field * in_volume
    for axis, (radius, width) in enumerate(zip(gaussian_radius(sigma, spacing), _widths(sigma, spacing))):
        part = region[axis]
        if in_volume is None:
            field = along(
                field, _matrix(field.shape[axis + 1], width, radius, part, "fit_line", field), axis + 1
            )
            continue
        inside = in_volume.narrow(axis + 1, part.start, part.stop - part.start)
        if radius:
            field = _regress(field, in_volume, width, radius, axis + 1, part) * inside
        else:
            field = field.narrow(axis + 1, part.start, part.stop - part.start)
        in_volume = inside
    return field


def _regress(field: Tensor, inside: Tensor, width: float, radius: int, axis: int, part: slice) -> Tensor:
    """Apply local linear regression along an axis, see `filter_kernels.regress_lines`."""
    length, size = field.shape[axis], part.stop - part.start
    powers = [_matrix(length, width, radius, part, "keep", field, power) for power in range(3)]
    pair = torch.stack([inside.to(field.dtype), field])
    sums = along(pair, torch.cat(powers), axis + 1).split(size, dim=axis + 1)
    (m0, s0), (m1, s1), (m2, _) = (part.unbind(0) for part in sums)
    spread = m0 * m2 - m1 * m1
    fits = spread > 1e-6
    fitted = (m2 * s0 - m1 * s1) / torch.where(fits, spread, 1.0)
    return torch.where(fits, fitted, s0 / torch.where(m0 > 0, m0, 1.0))


def smooth_products(
    slope: Tensor,
    sigma: float,
    spacing: Sequence[float],
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> Tensor:
    """Compute `fields.smooth_products` of float32 (B, D, *spatial): float32 (B, D (D + 1) / 2, *region)."""
    ndim = slope.shape[1]
    region = region or _whole(slope.shape[2:])
    rows, columns = zip(*((i, j) for i in range(ndim) for j in range(i, ndim)))
    products = slope[:, list(rows)] * slope[:, list(columns)]
    if in_volume is None:
        return _filter(products, sigma, spacing, region, "scale_to_one")
    total = _filter(in_volume[:, None].to(slope.dtype), sigma, spacing, region, "keep")
    inside = in_volume[(slice(None), *region)][:, None]
    weight = torch.where(inside, 1 / torch.where(inside, total, 1.0), 0.0)
    return _filter(products, sigma, spacing, region, "keep") * weight


def gradient(
    field: Tensor,
    spacing: Sequence[float],
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> Tensor:
    """Compute `fields.gradient` of float32 (B, *spatial): float32 (B, D, *region), in the order of the spatial axes."""
    region = region or _whole(field.shape[1:])
    slopes = []
    for axis, size in enumerate(spacing):
        others = tuple(slice(None) if other == axis else part for other, part in enumerate(region))
        lines = field[(slice(None), *others)]
        if in_volume is None:
            slope = along(
                lines, _difference_matrix(lines.shape[axis + 1], size, region[axis], lines), axis + 1
            )
        else:
            inside = in_volume[(slice(None), *others)]
            slope = _difference_inside(lines, inside, size, axis + 1)
            slope = slope.narrow(axis + 1, region[axis].start, region[axis].stop - region[axis].start)
        slopes.append(slope)
    return torch.stack(slopes, dim=1)


def _difference_inside(lines: Tensor, inside: Tensor, size: float, axis: int) -> Tensor:
    """Return the mean of the differences to the one or two neighbours that are inside the volume."""
    length = lines.shape[axis]
    both = inside.narrow(axis, 1, length - 1) & inside.narrow(axis, 0, length - 1)
    rise = pad_axis(torch.diff(lines, dim=axis) * both, 1, axis, 0.0)
    pairs = pad_axis(both.to(lines.dtype), 1, axis, 0.0)
    rises = rise.narrow(axis, 0, length) + rise.narrow(axis, 1, length)
    sides = pairs.narrow(axis, 0, length) + pairs.narrow(axis, 1, length)
    return rises / (sides.clamp_min(1) * float(np.float32(size)))


def surface_normals(slope: Tensor, signed: Tensor, valid: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Compute `fields.surface_normals` of (B, D, *spatial), (B, *spatial) and bool (B, *spatial)."""
    norm = (slope * slope).sum(dim=1).sqrt()
    good = valid & (signed.abs() < float(np.float32(reach))) & (norm >= float(np.float32(MIN_GRADIENT)))
    factor = torch.where(good, 1 / torch.where(good, norm, 1.0), 0.0)
    return slope.flip(1) * factor[:, None], good


def erode(
    valid: Tensor,
    radii: Sequence[int],
    in_volume: Tensor | None = None,
    region: Region | None = None,
) -> Tensor:
    """Compute `fields.erode` of bool (B, *spatial): bool (B, *region)."""
    region = region or _whole(valid.shape[1:])
    bad = ~valid if in_volume is None else ~valid & in_volume
    count = bad.to(torch.float32)
    for axis, (radius, part) in enumerate(zip(radii, region)):
        # The input is 0 or 1, so that sums are exact; the result is again 0 or 1 before the next axis.
        count = along(count, _box_matrix(count.shape[axis + 1], radius, part, count), axis + 1)
        count = count.clamp_max(1.0)
    good = count < 0.5
    return good if in_volume is None else good & in_volume[(slice(None), *region)]


def along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply every line of `x` along an axis by a matrix (outputs, inputs)."""
    shape, outputs = x.shape, matrix.shape[0]
    after = math.prod(shape[axis + 1 :])
    if after == 1:
        return (x.reshape(-1, shape[axis]) @ matrix.T).reshape(*shape[:axis], outputs, *shape[axis + 1 :])
    rows = matrix @ x.reshape(-1, shape[axis], after)
    return rows.reshape(*shape[:axis], outputs, *shape[axis + 1 :])


def _filter(x: Tensor, sigma: float, spacing: Sequence[float], region: Region, border: str) -> Tensor:
    """Apply a Gaussian filter to (B, C, *spatial)."""
    for axis, (radius, width) in enumerate(zip(gaussian_radius(sigma, spacing), _widths(sigma, spacing))):
        matrix = _matrix(x.shape[axis + 2], width, radius, region[axis], border, x)
        x = along(x, matrix, axis + 2)
    return x


def _widths(sigma: float, spacing: Sequence[float]) -> list[float]:
    return [sigma * min(spacing) / step for step in spacing]


def _whole(shape: Sequence[int]) -> Region:
    return tuple(slice(0, size) for size in shape)


def _matrix(
    length: int, width: float, radius: int, part: slice, border: str, like: Tensor, power: int = 0
) -> Tensor:
    """Return the weights of `filter_weights.border_weights`, times the step to `power`, as a matrix on the device."""
    return _gaussian_matrix(length, width, radius, part.start, part.stop, border, power, like.device)


@lru_cache(maxsize=256)
def _gaussian_matrix(
    length: int,
    width: float,
    radius: int,
    start: int,
    stop: int,
    border: str,
    power: int,
    device: torch.device,
) -> Tensor:
    kernel = filter_weights.gaussian(width, radius)
    rows = filter_weights.border_weights(kernel, length, slice(start, stop), getattr(filter_weights, border))
    return _banded(rows * np.arange(-radius, radius + 1) ** power, start, length, device)


def _box_matrix(length: int, radius: int, part: slice, like: Tensor) -> Tensor:
    return _box(length, radius, part.start, part.stop, like.device)


@lru_cache(maxsize=256)
def _box(length: int, radius: int, start: int, stop: int, device: torch.device) -> Tensor:
    return _banded(np.ones((stop - start, 2 * radius + 1)), start, length, device)


def _difference_matrix(length: int, size: float, part: slice, like: Tensor) -> Tensor:
    return _differences(length, size, part.start, part.stop, like.device)


@lru_cache(maxsize=256)
def _differences(length: int, size: float, start: int, stop: int, device: torch.device) -> Tensor:
    """Return central differences as a matrix; one-sided at the ends of the line; 0 for a line of one voxel."""
    matrix = np.zeros((stop - start, length), np.float32)
    for row, position in enumerate(range(start, stop)):
        before, behind = max(position - 1, 0), min(position + 1, length - 1)
        if behind > before:
            matrix[row, behind], matrix[row, before] = (
                1 / ((behind - before) * size),
                -1 / ((behind - before) * size),
            )
    return torch.from_numpy(matrix).to(device)


def _banded(rows: np.ndarray, start: int, length: int, device: torch.device) -> Tensor:
    """Arrange one row of weights per position, from `start` on, in a matrix (outputs, length)."""
    radius = rows.shape[1] // 2
    matrix = np.zeros((len(rows), length), np.float32)
    for row, weights in enumerate(rows):
        first = row + start - radius
        lower, upper = max(first, 0), min(first + rows.shape[1], length)
        matrix[row, lower:upper] = weights[lower - first : upper - first]
    return torch.from_numpy(matrix).to(device)
