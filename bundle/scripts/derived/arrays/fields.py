"""Computes the signed distance and its smoothed gradient, from which derived targets are computed.

Conventions
    Arrays have 2 or 3 spatial axes, (Y, X) or (Z, Y, X); spacing is in the same order, distances are in its
    unit. A voxel is foreground, background, unknown (inside the volume, but without a known label) or
    outside the volume. Unknown voxels belong to neither class: they never form a surface, and they invalidate every
    value that they could change. The space outside the volume is empty: it forms no surface and invalidates
    nothing. The border of the arrays counts as the border of the volume. Filter widths ("sigma") are in
    voxels of the smallest spacing, so that 1.0 means the same at spacing (1, 1, 1) and (45, 4.6, 4.6): 4.6
    units along every axis in the latter. `region`, slices with start and stop, restricts the output; the
    input around it is still used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.derived.distance_window import (
    Bounds,
    Region,
    certain_voxels,
    check_masks,
    distance_window,
    signed_and_valid,
    signed_bounds,
    three_axes,
    unknown_voxels,
)
from volumen.derived.extents import gaussian_radius
from volumen.derived.kernels import distance as distance_kernels
from volumen.derived.kernels import filters as filter_kernels
from volumen.derived.kernels.filter_weights import (
    Border,
    border_weights,
    fit_line,
    gaussian,
    keep,
    scale_to_one,
)

MIN_GRADIENT = 0.1
"""Below this norm of the smoothed gradient a normal is undefined: surfaces that face each other cancel."""
DISTANCE_TYPES = ("signed", "inside", "outside")


def signed_distance(
    foreground: np.ndarray,
    *,
    spacing: Sequence[float] | None = None,
    reach: float | None = None,
    known: np.ndarray | None = None,
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the signed Euclidean distance to the boundary between foreground and background.

    Every voxel is a rounded box that touches the faces of its cell: the Minkowski sum of a box with
    half widths (s_i - s_min) / 2 and a ball of radius s_min / 2. The distance is measured from a voxel's
    centre to the nearest such body of the opposite class. With equal spacings this is "centre to centre minus
    half a voxel"; with unequal ones neighbours across a face are half *their* spacing from it (-s_i / 2, +s_i
    / 2), so that the gradient has norm 1 there along every axis.

    It is exact up to `reach`: minima of parabolas along one axis after the other (Felzenszwalb and
    Huttenlocher, "Distance Transforms of Sampled Functions", 2012), each over the steps that `reach` allows.

    Args:
        foreground: bool, 2 or 3 axes.
        spacing: voxel size per axis; default 1.
        reach: maximum distance, in the unit of the spacing; default 16 times the smallest spacing.
        known: bool, False where no label is known; default everywhere.
        in_volume: bool, False outside the volume; default everywhere inside.
        region: the part to compute; default all.

    Returns:
        distance float32, negative in the foreground, positive in the background, -reach or reach where
        the boundary is farther, 0 where invalid; valid bool: the voxel's class is known, and no unknown voxel is as
        near as the nearest voxel of the other class (or as `reach`).

    Raises:
        ValueError: shapes or spacing do not match.
    """
    foreground = np.asarray(foreground, dtype=bool)
    check_masks(foreground.shape, known=known, in_volume=in_volume)
    # Only voxels within reach of the region matter.
    window = distance_window(foreground.shape, check_spacing(foreground.ndim, spacing), reach, region)
    foreground = foreground[window.around]
    known, in_volume = (None if mask is None else mask[window.around] for mask in (known, in_volume))
    unknown = unknown_voxels(known, in_volume)

    if in_volume is None:
        kind = foreground.astype(np.uint8)
        if unknown is not None:
            kind[unknown] = 2
        squared = _opposite_squared(kind, window.costs, window.part)
    else:
        # Voxels outside the volume have no class, so a signed pass, which serves both classes, must not cross them.
        towards, away = foreground & in_volume, ~foreground & in_volume
        if unknown is not None:
            towards, away = towards | unknown, away | unknown
        to_foreground, to_background = (
            nearest_squared(side, window.costs, window.part) for side in (towards, away)
        )
        squared = np.where(foreground[window.part], -to_background, to_foreground)
    nearest_unknown = None if unknown is None else nearest_squared(unknown, window.costs, window.part)
    return signed_and_valid(squared, window, known, in_volume, nearest_unknown)


def distance_bounds(
    foreground: np.ndarray,
    *,
    spacing: Sequence[float] | None = None,
    reach: float | None = None,
    known: np.ndarray | None = None,
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
) -> Bounds:
    """Return bounds of the signed distance, whatever the unknown voxels are.

    Its magnitude is at most the distance to the nearest voxel that is known to be of the other class, and at
    least the distance to the nearest unknown voxel where that is nearer.

    Args:
        foreground, spacing, reach, known, in_volume, region: see `signed_distance`.

    Returns:
        bounds of the region: both are equal, and equal to `signed_distance`, where that is valid.

    Raises:
        ValueError: shapes or spacing do not match.
    """
    foreground = np.asarray(foreground, dtype=bool)
    check_masks(foreground.shape, known=known, in_volume=in_volume)
    window = distance_window(foreground.shape, check_spacing(foreground.ndim, spacing), reach, region)
    foreground = foreground[window.around]
    known, in_volume = (None if mask is None else mask[window.around] for mask in (known, in_volume))
    unknown = unknown_voxels(known, in_volume)
    certain = certain_voxels(foreground.shape, known, in_volume)
    here, sure = foreground[window.part], certain[window.part]
    inside = foreground & certain
    outside = certain ^ inside
    to_foreground = nearest_squared(inside, window.costs, window.part, outside[window.part])
    to_background = nearest_squared(outside, window.costs, window.part, inside[window.part])
    nearest_unknown = None if unknown is None else nearest_squared(unknown, window.costs, window.part, sure)
    np.copyto(to_foreground, to_background, where=here)
    return signed_bounds(to_foreground, here, window, sure, nearest_unknown)


def distance_transform(signed: np.ndarray, distance_type: str = "signed") -> np.ndarray:
    """Return the signed distance, or its unsigned part inside or outside.

    Args:
        signed: float32, the result of `signed_distance`.
        distance_type: "signed"; "inside": max(-d, 0), the depth within the foreground; "outside": max(d, 0).

    Raises:
        ValueError: another distance_type.
    """
    if distance_type == "signed":
        return signed
    if distance_type == "inside":
        return np.maximum(-signed, 0)
    if distance_type == "outside":
        return np.maximum(signed, 0)
    raise ValueError(f"distance_type must be one of {DISTANCE_TYPES}, got {distance_type!r}")


def smooth(
    field: np.ndarray,
    sigma: float,
    spacing: Sequence[float],
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
) -> np.ndarray:
    """Apply a Gaussian filter; near the border of the volume, a local linear regression with Gaussian weights.

    Along every axis in turn, G(p) is the value at p of the line that fits the field best with Gaussian
    weights over the voxels inside the volume within 4 sigma (Fan and Gijbels, "Local Polynomial Modelling",
    1996). Where the kernel is complete this equals `scipy.ndimage.gaussian_filter`; near the border ramps stay
    ramps, and no value from outside the volume is used, so that a crop with enough voxels around it has the
    same result.

    Args:
        field: float32, 2 or 3 axes.
        sigma: in voxels of the smallest spacing.
        spacing: voxel size per axis.
        in_volume: bool; default everywhere inside.
        region: the part to compute; default all.

    Returns:
        float32, shape of the region; 0 outside the volume.
    """
    if in_volume is None:
        return _filter(field, sigma, spacing, region, fit_line)
    out = np.ascontiguousarray(field * in_volume, dtype=np.float32)
    for axis, (step, radius) in enumerate(zip(spacing, gaussian_radius(sigma, spacing))):
        if radius:
            kernel = gaussian(sigma * min(spacing) / step, radius).astype(np.float32)
            out = _regress_axis(out, in_volume, kernel, axis)
    return out if region is None else out[region]


def _regress_axis(field: np.ndarray, inside: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    # The kernel is fast if lines lie side by side, so lines along the last axis are transposed.
    order = (field.ndim - 1, *range(field.ndim - 1)) if axis == field.ndim - 1 else tuple(range(field.ndim))
    moved, mask = field.transpose(order), np.ascontiguousarray(inside.transpose(order))
    axis = order.index(axis)
    lines = (int(np.prod(moved.shape[:axis], dtype=int)), moved.shape[axis], -1)
    out = filter_kernels.regress_lines(
        np.ascontiguousarray(moved).reshape(lines), mask.reshape(lines), kernel
    )
    return np.ascontiguousarray(out.reshape(moved.shape).transpose(np.argsort(order)))


def volume_weight(
    in_volume: np.ndarray, sigma: float, spacing: Sequence[float], region: Region | None = None
) -> np.ndarray:
    """Return 1 / sum_q w(q - p) over the q inside the volume, 0 where p is outside: float32 (*region)."""
    total = _filter(in_volume.astype(np.float32), sigma, spacing, region, keep)
    inside = in_volume if region is None else in_volume[region]
    return np.divide(np.float32(1), total, out=np.zeros_like(total), where=inside)


def smooth_products(
    slope: np.ndarray,
    sigma: float,
    spacing: Sequence[float],
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """Apply a Gaussian filter to every product slope[i] * slope[j], i <= j, normalised over the volume.

    sum_q w(q - p) f(q) / sum_q w(q - p) over the q inside the volume within 4 sigma (normalised convolution,
    Knutsson and Westin 1993): weights stay positive, so that a tensor stays positive semi-definite.

    Args:
        slope: float32 (D, *spatial), D = 2 or 3; 0 outside the volume.
        sigma, spacing, in_volume, region: see `smooth`.
        wanted: bool (*region), rows along the last axis in which no voxel is wanted are 0; default everywhere.

    Returns:
        float32 (D (D + 1) / 2, *region).
    """
    ndim = slope.ndim - 1
    border = scale_to_one if in_volume is None else keep
    filters = _axis_filters(slope.shape[1:], sigma, spacing, region, border)
    volume = np.ascontiguousarray(slope.reshape(len(slope), *three_axes(slope.shape[1:])))
    (weights_z, first_z), (weights_y, first_y), (weights_x, first_x) = filters
    size = (ndim * (ndim + 1) // 2, volume.shape[1], len(weights_y), weights_x.shape[1])
    planes = np.empty(size, np.float32)
    shape = (len(weights_z), len(weights_y))
    rows = np.ones(shape, bool) if wanted is None else np.asarray(wanted.any(axis=-1)).reshape(shape)
    inner = _rows_before(rows, weights_z, first_z, volume.shape[1])
    filter_kernels.filter_product_planes(volume, weights_y, first_y, weights_x, first_x, inner, planes)
    if ndim == 3:
        planes = _filter_depth(planes, weights_z, first_z, rows)
    tensor = planes.reshape(len(planes), *planes.shape[-ndim:])
    if in_volume is not None:
        tensor *= volume_weight(in_volume, sigma, spacing, region)
    return tensor


def gradient(
    field: np.ndarray,
    spacing: Sequence[float],
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
) -> np.ndarray:
    """Return central differences; one-sided at the border of the volume; 0 along an axis of one voxel.

    Args:
        field: float32, 2 or 3 axes.
        spacing: voxel size per axis.
        in_volume: bool; default everywhere inside.
        region: the part to compute; default all.

    Returns:
        float32 (ndim, *region), in the order of the spatial axes; 0 outside the volume.
    """
    if in_volume is not None:
        return _gradient_inside(field, spacing, in_volume)[(slice(None), *(region or ()))]
    region = region or tuple(slice(0, size) for size in field.shape)
    flat = 3 - field.ndim
    starts = np.array([0] * flat + [part.start for part in region])
    stops = np.array([1] * flat + [part.stop for part in region])
    inverse = np.array([1.0] * flat + [1 / size for size in spacing], np.float32)
    volume = np.ascontiguousarray(field, dtype=np.float32).reshape(three_axes(field.shape))
    out = np.empty((3, *(stops - starts)), np.float32)
    filter_kernels.central_differences(volume, starts, stops, inverse, out)
    return out[flat:].reshape(field.ndim, *out.shape[1 + flat :])


def surface_normals(
    slope: np.ndarray, signed: np.ndarray, valid: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the unit gradient of the signed distance, which points out of the foreground.

    n = g / |g| with g the gradient of the Gaussian-smoothed signed distance. Undefined, hence invalid and 0,
    where the distance is cut at `reach`, and where |g| < 0.1: between surfaces that face each other (the
    medial axis) gradients cancel, |g| being the cosine of half the angle between them.

    Args:
        slope: float32 (ndim, *spatial), gradient in the order of the spatial axes.
        signed: float32 (*spatial), cut at `reach`.
        valid: bool (*spatial), where `slope` is valid.
        reach: see above.

    Returns:
        normals float32 (ndim, *spatial), channel order (x, y[, z]); valid bool (*spatial).
    """
    good = valid & (np.abs(signed) < np.float32(reach))
    flat = np.ascontiguousarray(slope).reshape(len(slope), -1)
    normals = np.empty(flat.shape, np.float32)
    filter_kernels.unit_vectors(flat, good.reshape(-1), np.float32(MIN_GRADIENT), normals)
    return normals.reshape(slope.shape), good


def erode(
    valid: np.ndarray,
    radii: Sequence[int],
    in_volume: np.ndarray | None = None,
    region: Region | None = None,
) -> np.ndarray:
    """Return where every voxel of the volume within a box of `radii` is True, so that the support of a filter is
    valid.

    Args:
        valid: bool, 2 or 3 axes.
        radii: voxels per axis.
        in_volume: bool; voxels outside do not matter, and are False in the result; default everywhere inside.
        region: the part to compute; default all.

    Returns:
        bool (*region).
    """
    shape = valid.shape
    region = region or tuple(slice(0, size) for size in shape)
    flat = 3 - valid.ndim
    out = (valid if in_volume is None else valid | ~in_volume).astype(np.uint8).reshape(three_axes(shape))
    lengths = out.shape
    rows = np.ascontiguousarray(out).reshape(-1, lengths[2])
    out = filter_kernels.all_within_row(rows, radii[-1], region[-1].start, region[-1].stop)
    out = out.reshape(lengths[0], lengths[1], -1)
    out = filter_kernels.all_within(out, radii[-2], region[-2].start, region[-2].stop)
    if not flat:
        stacked = out.reshape(1, lengths[0], -1)
        out = filter_kernels.all_within(stacked, radii[0], region[0].start, region[0].stop)
    eroded = out.reshape([part.stop - part.start for part in region]).astype(bool)
    return eroded if in_volume is None else eroded & in_volume[region]


def check_spacing(ndim: int, spacing: Sequence[float] | None) -> tuple[float, ...]:
    """Return the spacing as floats, 1 along every axis by default.

    Raises:
        ValueError: the number of axes is not 2 or 3, or a spacing is not a positive number.
    """
    if ndim not in (2, 3):
        raise ValueError(f"arrays need 2 or 3 spatial axes, got {ndim}")
    if spacing is None:
        return (1.0,) * ndim
    steps = tuple(float(size) for size in spacing)
    if len(steps) != ndim or not all(np.isfinite(size) and size > 0 for size in steps):
        raise ValueError(f"spacing needs {ndim} positive numbers, got {spacing!r}")
    return steps


def nearest_squared(
    feature: np.ndarray, costs: Sequence[np.ndarray], part: Region, needed: np.ndarray | None = None
) -> np.ndarray:
    """Return the squared distance to the nearest True voxel: float32 (*part); `costs` are those of the window.

    Where `needed`, bool (*part), is False, the result may be larger.
    """
    volume = np.ascontiguousarray(feature).reshape(three_axes(feature.shape))
    if needed is not None:
        needed = np.ascontiguousarray(needed).reshape(three_axes(needed.shape))
    squared = distance_kernels.nearest_in_row(volume, costs[-1], part[-1].start, part[-1].stop)
    rows = None if needed is None else needed.any(axis=0, keepdims=True)
    squared = distance_kernels.nearest_across(squared, costs[-2], part[-2].start, part[-2].stop, 1, rows)
    if feature.ndim == 3:
        squared = distance_kernels.nearest_across(squared, costs[0], part[0].start, part[0].stop, 0, needed)
    return squared.reshape([piece.stop - piece.start for piece in part])


def _opposite_squared(kind: np.ndarray, costs: Sequence[np.ndarray], part: Region) -> np.ndarray:
    volume = np.ascontiguousarray(kind).reshape(three_axes(kind.shape))
    squared = distance_kernels.opposite_in_row(volume, costs[-1], part[-1].start, part[-1].stop)
    squared = distance_kernels.opposite_across(squared, costs[-2], part[-2].start, part[-2].stop, 1)
    if kind.ndim == 3:
        squared = distance_kernels.opposite_across(squared, costs[0], part[0].start, part[0].stop, 0)
    return squared.reshape([piece.stop - piece.start for piece in part])


def _filter(
    field: np.ndarray, sigma: float, spacing: Sequence[float], region: Region | None, border: Border
) -> np.ndarray:
    filters = _axis_filters(field.shape, sigma, spacing, region, border)
    (weights_z, first_z), (weights_y, first_y), (weights_x, first_x) = filters
    volume = np.ascontiguousarray(field, dtype=np.float32).reshape(three_axes(field.shape))
    out = np.empty((volume.shape[0], len(weights_y), weights_x.shape[1]), np.float32)
    filter_kernels.filter_planes(volume, weights_y, first_y, weights_x, first_x, out)
    if field.ndim == 3:
        rows = np.ones((len(weights_z), out.shape[1]), bool)
        out = _filter_depth(out[None], weights_z, first_z, rows)[0]
    return out.reshape(out.shape[-field.ndim :])


def _filter_depth(planes: np.ndarray, weights: np.ndarray, first: int, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(planes), len(weights), *planes.shape[2:]), np.float32)
    filter_kernels.filter_depth(planes, weights, first, rows, out)
    return out


def _rows_before(rows: np.ndarray, weights: np.ndarray, first: int, depth: int) -> np.ndarray:
    """Return which rows (depth, Y) a filter along z reads for the rows (outputs, Y)."""
    radius = weights.shape[1] // 2
    before = np.zeros((depth, rows.shape[1]), bool)
    for output, row in enumerate(rows):
        before[max(0, output + first - radius) : output + first + radius + 1] |= row
    return before


def _axis_filters(
    shape: Sequence[int],
    sigma: float,
    spacing: Sequence[float],
    region: Region | None,
    border: Border,
) -> list[tuple[np.ndarray, int]]:
    """Return weights and first position for z, y and x (transposed for x); a single 1 along z in 2D."""
    finest = min(spacing)
    radii = gaussian_radius(sigma, spacing)
    region = region or tuple(slice(0, size) for size in shape)
    filters = [
        (border_weights(gaussian(sigma * finest / step, radius), length, part, border), part.start)
        for length, step, radius, part in zip(shape, spacing, radii, region)
    ]
    last, start = filters[-1]
    filters[-1] = (np.ascontiguousarray(last.T), start)
    return [(np.ones((1, 1), np.float32), 0)] * (3 - len(filters)) + filters


def _gradient_inside(field: np.ndarray, spacing: Sequence[float], in_volume: np.ndarray) -> np.ndarray:
    """Return the mean of the differences to the one or two neighbours that are inside the volume."""
    out = np.zeros((field.ndim, *field.shape), np.float32)
    for axis, size in enumerate(spacing):
        lines, inside = np.moveaxis(field, axis, 0), np.moveaxis(in_volume, axis, 0)
        slope = np.moveaxis(out[axis], axis, 0)
        both = inside[1:] & inside[:-1]
        rise = (lines[1:] - lines[:-1]) * both
        sides = np.zeros(lines.shape, np.float32)
        slope[1:] += rise
        slope[:-1] += rise
        sides[1:] += both
        sides[:-1] += both
        slope /= np.maximum(sides, 1) * np.float32(size)
    return out
