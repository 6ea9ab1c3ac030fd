"""Draws the spatial augmentation of a sample; `ReadPatchd` applies it while reading."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from monai.transforms import RandomizableTransform

from volumen.utils.errors import VolumenError

ANISOTROPY_LIMIT = (
    3.0  # as in nnU-Net: above it a rotation out of the plane would mix axes of unequal resolution
)
_AXIS_NAMES = "zyx"


@dataclass(frozen=True, eq=False)
class SpatialTransform:
    """A mapping from each voxel of a patch to its position in the volume.

    The patch is first sampled on a grid rotated and scaled about its centre, then its axes are permuted and
    flipped: `patch = flip(transpose(sampled, permutation), axes with flips)`.

    Args:
        permutation: axis of the sampled grid that becomes each axis of the patch.
        flips: for each axis of the patch, whether it is mirrored.
        matrix: (n, n) physical matrix in spatial order from offsets in the patch to offsets in the volume,
            both from the patch's centre; None is the identity, with which the patch is an exact crop.
    """

    permutation: tuple[int, ...]
    flips: tuple[bool, ...]
    matrix: np.ndarray | None = None

    @classmethod
    def identity(cls, ndim: int) -> SpatialTransform:
        """Return the transform that changes nothing in `ndim` dimensions."""
        return cls(tuple(range(ndim)), (False,) * ndim)

    @property
    def ndim(self) -> int:
        return len(self.permutation)

    def permute(self, array: np.ndarray) -> np.ndarray:
        """Return a view of an array (C, *sampled) with its axes in the patch's order."""
        return array.transpose(0, *(axis + 1 for axis in self.permutation))

    def orient(self, array: np.ndarray) -> np.ndarray:
        """Return a view of an array (C, *sampled) with axes permuted and flipped: (C, *patch)."""
        mirror = (slice(None, None, -1 if flip else None) for flip in self.flips)
        return self.permute(array)[(slice(None), *mirror)]

    def before_permutation(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Reorder values per axis of the patch to the order of the sampled grid's axes."""
        inner: list[Any] = [None] * self.ndim
        for value, axis in zip(values, self.permutation):
            inner[axis] = value
        return tuple(inner)

    def mirrored_matrix(self, spacing: Sequence[float]) -> np.ndarray:
        """Return the (n, n) matrix from voxel offsets in the sampled grid, flips included, to those in the volume."""
        assert self.matrix is not None, "a plain crop is mirrored as a view"
        signs = np.where(self.before_permutation(self.flips), -1.0, 1.0)
        scale = np.asarray(spacing, dtype=float)
        return self.matrix * (scale * signs)[None, :] / scale[:, None]


class RandSpatialTransformd(RandomizableTransform):
    """Draw rotation, scaling, flips and axis swaps into `sample["spatial"]`, without changing any voxel.

    Probabilities and ranges default to nnU-Net's (`nnUNetTrainer.get_training_transforms`). Rotation is
    defined in physical space. When the spacing or the patch is anisotropic by more than 3, rotation and scaling
    are restricted to the plane perpendicular to the thin axis, as in nnU-Net.

    Args:
        prob_rotation: probability of a rotation about every allowed axis.
        rotation_degrees: largest angle, degrees; None: 30 about three axes, 180 in a plane.
        prob_scale: probability of an isotropic scaling.
        scale_range: factors of the sampled extent: above 1 the patch shows more of the volume, smaller.
        prob_flip: probability of mirroring, for each axis independently.
        rotate90: randomly permute axes with equal patch size and spacing.
        rotation_axes: axes to rotate about, 'z', 'y', 'x' or indices in spatial order (in 2D only 'z'); None:
            all, or the thin one; an empty list: no rotation.
        no_spatial: draw the identity.

    Raises:
        VolumenError: a probability, range or axis is not valid.
    """

    def __init__(
        self,
        prob_rotation: float = 0.2,
        rotation_degrees: float | None = None,
        prob_scale: float = 0.2,
        scale_range: Sequence[float] = (0.7, 1.4),
        prob_flip: float = 0.5,
        rotate90: bool = True,
        rotation_axes: Sequence[str | int] | None = None,
        no_spatial: bool = False,
    ) -> None:
        super().__init__(prob=1.0)
        for name, value in (
            ("prob_rotation", prob_rotation),
            ("prob_scale", prob_scale),
            ("prob_flip", prob_flip),
        ):
            if not 0.0 <= value <= 1.0:
                raise VolumenError(name, expected="a probability in [0, 1]", found=value)
        low, high = (float(value) for value in scale_range)
        if not 0.0 < low <= high:
            raise VolumenError("scale_range", expected="0 < low <= high", found=list(scale_range))
        self.prob_rotation, self.prob_scale, self.prob_flip = prob_rotation, prob_scale, prob_flip
        self.rotation_degrees = rotation_degrees
        self.scale_range = (low, high)
        self.rotate90 = rotate90
        self.rotation_axes = None if rotation_axes is None else [str(axis) for axis in rotation_axes]
        self.no_spatial = no_spatial

    def draw(self, size: Sequence[int], spacing: Sequence[float]) -> SpatialTransform:
        """Draw one random transform for a patch of `size` voxels with `spacing` (both in spatial order)."""
        ndim = len(size)
        if self.no_spatial:
            return SpatialTransform.identity(ndim)
        thin = thin_axis(size, spacing)
        axes = self._axes(ndim, thin)
        matrix = np.eye(ndim)
        if self.R.uniform() < self.prob_rotation and axes:
            for axis in axes:
                matrix = matrix @ _rotation(ndim, axis, self._angle(planar=len(axes) == 1))
        if self.R.uniform() < self.prob_scale:
            scale = np.full(ndim, about_one(self.R, self.scale_range))
            if thin is not None:
                scale[thin] = 1.0
            matrix = matrix * scale[None, :]
        flips = tuple(bool(value < self.prob_flip) for value in self.R.uniform(size=ndim))
        permutation = self._permutation(size, spacing, axes)
        return SpatialTransform(permutation, flips, None if np.array_equal(matrix, np.eye(ndim)) else matrix)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add "spatial" to a sample with "case" and "location"."""
        sample = dict(data)
        sample["spatial"] = self.draw(sample["location"].size, sample["case"].spacing)
        return sample

    def _angle(self, planar: bool) -> float:
        limit = self.rotation_degrees
        if limit is None:
            limit = 180.0 if planar else 30.0
        return float(np.deg2rad(self.R.uniform(-limit, limit)))

    def _axes(self, ndim: int, thin: int | None) -> list[int]:
        if self.rotation_axes is None:
            if ndim == 2:
                return [0]
            return [0, 1, 2] if thin is None else [thin]
        return sorted({_axis_index(name, ndim) for name in self.rotation_axes})

    def _permutation(
        self, size: Sequence[int], spacing: Sequence[float], axes: Sequence[int]
    ) -> tuple[int, ...]:
        choices = _interchangeable(tuple(size), tuple(spacing), tuple(axes)) if self.rotate90 else []
        if len(choices) < 2:
            return tuple(range(len(size)))
        return choices[self.R.randint(len(choices))]


def thin_axis(size: Sequence[int], spacing: Sequence[float]) -> int | None:
    """Return the axis along which a 3D patch is too coarse for rotations out of the plane, or None.

    Args:
        size: patch size, voxels.
        spacing: voxel size per axis.

    Returns:
        The axis of largest spacing if spacings differ by more than 3 times, else the shortest axis of a
        patch whose sizes differ by more than 3 times.
    """
    if len(size) < 3:
        return None
    if max(spacing) > ANISOTROPY_LIMIT * min(spacing):
        return int(np.argmax(spacing))
    if max(size) > ANISOTROPY_LIMIT * min(size):
        return int(np.argmin(size))
    return None


def _axis_index(name: str, ndim: int) -> int:
    if ndim == 2:
        if name in ("z", "0"):
            return 0
        raise VolumenError(
            "rotation_axes",
            expected="'z' (a 2D image turns about it alone)",
            found=repr(name),
            remedy="use [z]",
        )
    if name in _AXIS_NAMES:
        return _AXIS_NAMES.index(name)
    if name in ("0", "1", "2"):
        return int(name)
    raise VolumenError(
        "rotation_axes", expected="names of 'z', 'y', 'x' or indices 0, 1, 2", found=repr(name)
    )


def _plane(ndim: int, axis: int) -> tuple[int, int]:
    if ndim == 2:
        return 0, 1
    first, second = (other for other in range(3) if other != axis)
    return first, second


def _rotation(ndim: int, axis: int, angle: float) -> np.ndarray:
    first, second = _plane(ndim, axis)
    matrix = np.eye(ndim)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def _interchangeable(
    size: tuple[int, ...], spacing: tuple[float, ...], axes: tuple[int, ...]
) -> list[tuple[int, ...]]:
    ndim = len(size)
    group = list(range(ndim))
    for axis in axes:
        first, second = _plane(ndim, axis)
        if size[first] == size[second] and np.isclose(spacing[first], spacing[second], rtol=1e-3):
            merged = group[second]
            group = [group[first] if member == merged else member for member in group]
    return [
        order
        for order in permutations(range(ndim))
        if all(group[axis] == group[source] for axis, source in enumerate(order))
    ]


def about_one(random: np.random.RandomState, span: Sequence[float]) -> float:
    """Draw a factor in `span` that is below 1 as often as above, for any span around 1, as in batchgenerators."""
    low, high = span
    if low < 1.0 < high:
        low, high = (low, 1.0) if random.uniform() < 0.5 else (1.0, high)
    return float(random.uniform(low, high))
