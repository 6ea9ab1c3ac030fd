"""Signed distance and its smoothed gradient: the fields from which derived targets are made.

Conventions
    Arrays have 2 or 3 spatial axes, (Y, X) or (Z, Y, X); spacing is in the same order, distances are in its
    unit. A voxel is foreground, background, unknown (inside the volume, but no label is known there) or
    outside the volume. Unknown voxels are neither class: they never make a surface, and they invalidate every
    value that they could change. Outside the volume there is nothing: it makes no surface and invalidates
    nothing. The border of the arrays is taken for the border of the volume. Filter widths ("sigma") count in
    voxels of the smallest spacing, so that 1.0 means the same at spacing (1, 1, 1) and (45, 4.6, 4.6): 4.6
    units along every axis in the latter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scripts.transforms import kernels
from scripts.transforms.task_registry import gaussian_radius, gradient_radius, resolve_reach

MIN_GRADIENT = 0.25
"""Below this norm of the smoothed gradient a normal is undefined: two surfaces that face each other
cancel."""


def signed_distance(
    foreground: np.ndarray,
    *,
    spacing: Sequence[float] | None = None,
    reach: float | None = None,
    known: np.ndarray | None = None,
    in_volume: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Signed Euclidean distance to the boundary between foreground and background.

    Let every voxel be the rounded box that touches the faces of its cell: the Minkowski sum of a box with
    half widths (s_i - s_min) / 2 and a ball of radius s_min / 2. The distance is the one from a voxel's
    centre to the nearest such body of the opposite class. With equal spacings that is "centre to centre minus
    half a voxel"; with unequal ones neighbours across a face are half *their* spacing from it (-s_i / 2, +s_i
    / 2), so that the gradient has norm 1 there along every axis.

    Computed exactly up to `reach` by minima of parabolas along one axis after the other (Felzenszwalb and
    Huttenlocher, "Distance Transforms of Sampled Functions", 2012), each over the steps that `reach` allows.

    Args:
        foreground: bool, 2 or 3 axes.
        spacing: voxel size per axis; default 1.
        reach: distances are cut there, in the unit of the spacing; default 16 times the smallest spacing.
        known: bool, False where no label is known; default everywhere.
        in_volume: bool, False outside the volume; default everywhere inside.

    Returns:
        distance float32, negative in the foreground, positive in the background, +-reach where nothing is
        nearer, 0 where invalid; valid bool: the class of the voxel is known, and no unknown voxel is nearer
        than the distance.

    Raises:
        ValueError: shapes or spacing do not fit.
    """
    foreground = np.asarray(foreground, dtype=bool)
    steps = _check_spacing(foreground.ndim, spacing)
    cut = np.float32(resolve_reach(reach, steps))
    inside, background, unknown = _classes(foreground, known, in_volume)
    costs = [_step_costs(size, min(steps), float(cut)) for size in steps]
    half = np.float32(min(steps) / 2)

    def distance_to(feature: np.ndarray) -> np.ndarray:
        distance = np.sqrt(_nearest_squared(feature, costs))
        distance -= half
        return np.minimum(distance, cut, out=distance)

    signed = np.where(foreground, -distance_to(background), distance_to(inside))
    valid = inside | background
    if unknown is not None:
        valid &= np.abs(signed) <= distance_to(unknown)
    signed[~valid] = 0
    return signed, valid


def smooth(
    field: np.ndarray, sigma: float, spacing: Sequence[float], in_volume: np.ndarray | None = None
) -> np.ndarray:
    """Gaussian filter, normalised over the voxels inside the volume.

    G(p) = sum_q w(q - p) f(q) / sum_q w(q - p), q inside the volume and within 4 sigma (normalised
    convolution, Knutsson and Westin 1993). Far from the border this is `scipy.ndimage.gaussian_filter`; at
    the border it does not depend on where an array was cropped, nor on any value outside the volume.

    Args:
        field: float32, 2 or 3 axes.
        sigma: in voxels of the smallest spacing.
        spacing: voxel size per axis.
        in_volume: bool; default everywhere inside.

    Returns:
        float32, shape of `field`; 0 outside the volume.
    """
    finest = min(spacing)
    radii = gaussian_radius(sigma, spacing)
    kernel_per_axis = [
        _gaussian(sigma * finest / size, radius) if radius else np.ones(1)
        for size, radius in zip(spacing, radii)
    ]
    if in_volume is None:
        return _filter_axes(field, kernel_per_axis, normalise=True)
    inside = in_volume.astype(np.float32)
    weight = _filter_axes(inside, kernel_per_axis, normalise=False)
    total = _filter_axes(field * inside, kernel_per_axis, normalise=False)
    return np.divide(total, weight, out=np.zeros_like(total), where=in_volume)


def gradient(field: np.ndarray, spacing: Sequence[float], in_volume: np.ndarray | None = None) -> np.ndarray:
    """Central differences; one-sided at the border of the volume; 0 along an axis of one voxel.

    Args:
        field: float32, 2 or 3 axes.
        spacing: voxel size per axis.
        in_volume: bool; default everywhere inside.

    Returns:
        float32 (ndim, *spatial), in the order of the spatial axes.
    """
    out = np.zeros((field.ndim, *field.shape), np.float32)
    for axis, size in enumerate(spacing):
        lines = np.moveaxis(field, axis, 0)
        slope = np.moveaxis(out[axis], axis, 0)
        if in_volume is None:
            if len(lines) > 1:
                slope[1:-1] = (lines[2:] - lines[:-2]) * np.float32(0.5 / size)
                slope[0] = (lines[1] - lines[0]) * np.float32(1 / size)
                slope[-1] = (lines[-1] - lines[-2]) * np.float32(1 / size)
            continue
        inside = np.moveaxis(in_volume, axis, 0)
        rise = (lines[1:] - lines[:-1]) * (inside[1:] & inside[:-1])
        sides = np.zeros(lines.shape, np.float32)
        slope[1:] += rise
        slope[:-1] += rise
        sides[1:] += inside[1:] & inside[:-1]
        sides[:-1] += inside[1:] & inside[:-1]
        slope /= np.maximum(sides, 1) * np.float32(size)
    return out


def erode(valid: np.ndarray, radii: Sequence[int], in_volume: np.ndarray | None = None) -> np.ndarray:
    """True where every voxel of the volume within `radii` (a box) is True: the support of a filter is
    valid."""
    from scipy.ndimage import minimum_filter1d

    out = (valid if in_volume is None else valid | ~in_volume).astype(np.uint8)
    for axis, radius in enumerate(radii):
        out = minimum_filter1d(out, 2 * radius + 1, axis=axis, mode="constant", cval=1)
    eroded = out.astype(bool)
    return eroded if in_volume is None else eroded & in_volume


class SourceFields:
    """The labels of one source target in one patch, with the fields that several tasks share.

    Each field is computed at most once: one signed distance (at the largest reach asked for first), one
    smoothed gradient, one tensor.

    Args:
        labels: integer (C, *spatial). One channel: class numbers. Several: one binary channel per class.
        known: bool (1, *spatial) or None.
        in_volume: bool (1, *spatial) or None.
        spacing: voxel size per spatial axis.
        reach: largest reach that any task will ask for, so that one distance serves all.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        known: np.ndarray | None = None,
        in_volume: np.ndarray | None = None,
        spacing: Sequence[float] | None = None,
        reach: float | None = None,
    ) -> None:
        if labels.ndim not in (3, 4):
            raise ValueError(f"labels need shape (C, Y, X) or (C, Z, Y, X), got {labels.shape}")
        self.labels = labels
        self.ndim = labels.ndim - 1
        self.shape = labels.shape[1:]
        self.spacing = _check_spacing(self.ndim, spacing)
        self.known = None if known is None or known.all() else np.asarray(known[0], dtype=bool)
        self.in_volume = (
            None if in_volume is None or in_volume.all() else np.asarray(in_volume[0], dtype=bool)
        )
        self._reach = resolve_reach(reach, self.spacing)
        self._shared: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def resolve_reach(self, reach: float | None) -> float:
        """Return the reach in the unit of the spacing."""
        return resolve_reach(reach, self.spacing)

    def foreground(self, classes: Sequence[int] | None = None) -> np.ndarray:
        """Bool (*spatial): label above 0, or one of `classes` (channel numbers where labels have
        channels)."""
        if len(self.labels) > 1:
            chosen = self.labels if classes is None else self.labels[list(classes)]
            return np.asarray((chosen > 0).any(axis=0))
        if classes is None:
            return self.labels[0] > 0
        return np.isin(self.labels[0], list(classes))

    def all_valid(self) -> bool:
        """Return whether every voxel inside the volume is known."""
        if self.known is None:
            return True
        return self.in_volume is not None and bool((self.known | ~self.in_volume).all())

    def signed_distance(
        self, reach: float | None = None, classes: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `signed_distance` cut at `reach`; do not write into the arrays."""
        cut = self.resolve_reach(reach)
        full = max(cut, self._reach)
        distance, valid = self._once(("distance", full, _key(classes)), lambda: self._distance(full, classes))
        if cut == full:
            return distance, valid
        return self._once(("distance", cut, _key(classes)), lambda: self._distance_cut(cut, full, classes))

    def gradient(
        self, compute_from: str, sigma: float, reach: float | None, classes: Sequence[int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradient (ndim, *spatial) of the smoothed signed distance or mask, and its validity.

        The gradient of the mask ("binary") is taken per smallest spacing, so that both are without unit.
        """
        key = ("gradient", compute_from, float(sigma), self.resolve_reach(reach), _key(classes))
        return self._once(key, lambda: self._gradient(compute_from, sigma, reach, classes))

    def erode(self, valid: np.ndarray, radii: Sequence[int]) -> np.ndarray:
        """`erode` within the volume; the voxels themselves where nothing is unknown."""
        if self.all_valid():
            return valid
        return erode(valid, radii, self.in_volume)

    def share(self, key: tuple, compute) -> tuple[np.ndarray, np.ndarray]:
        """Return what `compute()` gave when `key` was first asked for."""
        return self._once(key, compute)

    def _once(self, key: tuple, compute) -> tuple[np.ndarray, np.ndarray]:
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def _distance(self, reach: float, classes: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
        return signed_distance(
            self.foreground(classes),
            spacing=self.spacing,
            reach=reach,
            known=self.known,
            in_volume=self.in_volume,
        )

    def _distance_cut(
        self, cut: float, full: float, classes: Sequence[int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self.all_valid():
            # A value beyond the cut may be valid although its exact distance is not: an unknown voxel
            # between.
            return self._distance(cut, classes)
        distance, valid = self._shared[("distance", full, _key(classes))]
        return distance.clip(np.float32(-cut), np.float32(cut)), valid

    def _gradient(
        self, compute_from: str, sigma: float, reach: float | None, classes: Sequence[int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        spacing = self.spacing
        if compute_from == "binary":
            field = self.foreground(classes).astype(np.float32)
            valid = self._known_voxels()
            spacing = tuple(size / min(spacing) for size in spacing)
        else:
            field, valid = self.signed_distance(reach, classes)
        smoothed = smooth(field, sigma, self.spacing, self.in_volume)
        slope = gradient(smoothed, spacing, self.in_volume)
        return slope, self.erode(valid, gradient_radius(sigma, self.spacing))

    def _known_voxels(self) -> np.ndarray:
        known = np.ones(self.shape, bool) if self.known is None else self.known
        return known if self.in_volume is None else known & self.in_volume


def distance_transform(signed: np.ndarray, distance_type: str = "signed") -> np.ndarray:
    """Return the signed distance, or the unsigned half of it that is asked for.

    Args:
        signed: float32, as of `signed_distance`.
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
    raise ValueError(f"distance_type must be 'signed', 'inside' or 'outside', got {distance_type!r}")


def surface_normals(
    slope: np.ndarray, signed: np.ndarray, valid: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Unit gradient of the signed distance, pointing out of the foreground.

    n = g / |g| with g the gradient of the Gaussian-smoothed signed distance. Undefined, hence invalid and 0,
    where the distance is cut at `reach`, and where |g| < 0.25: between surfaces that face each other (the
    medial axis) gradients cancel, |g| being the cosine of half the angle between them.

    Args:
        slope: float32 (ndim, *spatial), gradient in the order of the spatial axes.
        signed: float32 (*spatial), cut at `reach`.
        valid: bool (*spatial), where `slope` is valid.
        reach: see above.

    Returns:
        normals float32 (ndim, *spatial), channel order (x, y[, z]); valid bool (*spatial).
    """
    norm = np.sqrt(np.einsum("c...,c...->...", slope, slope))
    good = valid & (norm >= MIN_GRADIENT) & (np.abs(signed) < np.float32(reach))
    normals = np.zeros_like(slope)
    np.divide(slope[::-1], norm, out=normals, where=good)
    return normals, good


def _key(classes: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if classes is None else tuple(sorted(classes))


def _check_spacing(ndim: int, spacing: Sequence[float] | None) -> tuple[float, ...]:
    if ndim not in (2, 3):
        raise ValueError(f"arrays need 2 or 3 spatial axes, got {ndim}")
    if spacing is None:
        return (1.0,) * ndim
    steps = tuple(float(size) for size in spacing)
    if len(steps) != ndim or not all(np.isfinite(size) and size > 0 for size in steps):
        raise ValueError(f"spacing needs {ndim} positive numbers, got {spacing!r}")
    return steps


def _classes(
    foreground: np.ndarray, known: np.ndarray | None, in_volume: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Split voxels into foreground, background and unknown (None where there is no unknown voxel)."""
    for name, mask in (("known", known), ("in_volume", in_volume)):
        if mask is not None and mask.shape != foreground.shape:
            raise ValueError(f"{name} has shape {mask.shape}, foreground {foreground.shape}")
    if known is None and in_volume is None:
        return foreground, ~foreground, None
    inside = np.ones(foreground.shape, bool) if in_volume is None else in_volume
    usable = inside if known is None else known & inside
    unknown = inside & ~usable
    return foreground & usable, ~foreground & usable, unknown if unknown.any() else None


def _step_costs(size: float, finest: float, reach: float) -> np.ndarray:
    """Squared distance of 0, 1, 2, ... steps along an axis to the inner box of a voxel, as far as `reach`
    asks."""
    last = int(np.ceil(reach / size + 0.5))
    steps = np.arange(last + 1)
    return (np.maximum(steps * size - (size - finest) / 2, 0) ** 2).astype(np.float32)


def _nearest_squared(feature: np.ndarray, costs: Sequence[np.ndarray]) -> np.ndarray:
    shape = feature.shape
    volume = np.ascontiguousarray(feature).reshape(-1, *shape[-2:]) if len(shape) == 2 else feature
    squared = kernels.nearest_along_x(np.ascontiguousarray(volume), costs[-1])
    squared = kernels.nearest_along_middle(squared, costs[-2])
    if len(shape) == 3:
        flat = squared.reshape(1, shape[0], shape[1] * shape[2])
        squared = kernels.nearest_along_middle(flat, costs[0])
    return squared.reshape(shape)


def _gaussian(sigma: float, radius: int) -> np.ndarray:
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _filter_axes(field: np.ndarray, kernel_per_axis: Sequence[np.ndarray], normalise: bool) -> np.ndarray:
    out = np.ascontiguousarray(field, dtype=np.float32)
    shape = out.shape
    for axis, kernel in enumerate(kernel_per_axis):
        if kernel.size == 1:
            continue
        weights = _border_weights(kernel, shape[axis], normalise)
        if axis == len(shape) - 1:
            out = kernels.filter_last(out.reshape(-1, shape[axis]), weights)
        else:
            before = int(np.prod(shape[:axis], dtype=int))
            out = kernels.filter_middle(out.reshape(before, shape[axis], -1), weights)
    return out.reshape(shape)


def _border_weights(kernel: np.ndarray, length: int, normalise: bool) -> np.ndarray:
    """One row of weights per position: the part of the kernel within the line, scaled to sum 1 if asked."""
    radius = len(kernel) // 2
    positions = np.arange(length)[:, None] + np.arange(-radius, radius + 1)[None]
    weights = np.where((positions >= 0) & (positions < length), kernel[None], 0.0)
    if normalise:
        weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
