"""Computes targets for outputs at less than full resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.derived.batches.axes import largest_axis
from volumen.losses.base import DIRECTION_KINDS, LABEL_KINDS, direction_groups
from volumen.losses.masking import as_real, full_mask, guard

# A block whose mean direction is shorter than this has no valid direction, because its directions cancel.
SHORTEST_MEAN_DIRECTION = 0.1
# If the relative gap of the two largest eigenvalues is below this, rounding errors would decide the axis.
LEAST_PROMINENCE = 0.01
INTERPOLATIONS = ("nearest", "linear")


def level_weights(levels: int) -> list[float]:
    """Return one weight per level; each is half of the one before, and their sum is 1."""
    raw = [0.5**level for level in range(levels)]
    return [weight / sum(raw) for weight in raw]


def default_interpolation(kind: str) -> str:
    """Return "nearest" for labels and "linear" for everything else."""
    return "nearest" if kind in LABEL_KINDS else "linear"


def block_size(full: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the fine voxels per coarse voxel and axis: the smallest f with ceil(full / f) == size.

    Raises:
        ValueError: no integer f fulfils this.
    """
    factors = []
    for fine, coarse in zip(full, size, strict=True):
        factor = next((f for f in range(1, fine + 1) if -(-fine // f) == coarse), None)
        if factor is None:
            raise ValueError(f"an output of size {size} is no downsampling of {full}")
        factors.append(factor)
    return tuple(factors)


def downsample(
    target: Tensor, mask: Tensor | None, size: tuple[int, ...], *, kind: str, interpolation: str
) -> tuple[Tensor, Tensor]:
    """Return a target and its mask at the size of a coarser output.

    Args:
        target: (B, C, *spatial).
        mask: (B, 1, *spatial) bool or None.
        size: spatial size of the output.
        kind: kind of the target; directions are normalised to unit length, those without sign are averaged
            as outer products.
        interpolation: "nearest" takes the voxel nearest the middle of each block (the lower of two),
            "linear" the mean over the block.

    Returns:
        target and bool mask at `size`. A coarse voxel is valid if every fine voxel of its block is, so no
        ignored value enters an average; invalid ones are 0. A block whose directions cancel is invalid too.
    """
    mask = full_mask(mask, target)
    if tuple(target.shape[2:]) == tuple(size):
        return target, mask
    factor = block_size(tuple(target.shape[2:]), tuple(size))
    coarse_mask = pool_all(mask, factor)
    if interpolation == "nearest":
        return guard(pick_middle(target, factor), coarse_mask), coarse_mask
    fine = guard(as_real(target), mask)
    if kind not in DIRECTION_KINDS:
        return guard(pool_mean(fine, factor), coarse_mask), coarse_mask
    mean = mean_axis(fine, factor) if kind == "axis" else pool_mean(fine, factor)
    shortest = LEAST_PROMINENCE if kind == "axis" else SHORTEST_MEAN_DIRECTION
    groups = direction_groups(mean)
    length = _length(groups)
    sound = (length > shortest).all(dim=1) & coarse_mask
    unit = (groups / length.clamp_min(shortest)).flatten(1, 2)
    return guard(unit, sound), sound


def pool_mean(x: Tensor, factor: tuple[int, ...]) -> Tensor:
    """Return the mean of each block (B, C, *spatial), over its voxels that exist at the end of the array."""
    pool = F.avg_pool2d if len(factor) == 2 else F.avg_pool3d
    return pool(x, factor, stride=factor, ceil_mode=True, count_include_pad=False)


def pool_all(mask: Tensor, factor: tuple[int, ...]) -> Tensor:
    """Return whether all voxels of each block are True: bool (B, C, *spatial)."""
    pool = F.max_pool2d if len(factor) == 2 else F.max_pool3d
    return pool((~mask).float(), factor, stride=factor, ceil_mode=True) == 0


def pick_middle(x: Tensor, factor: tuple[int, ...]) -> Tensor:
    """Return the voxel nearest the middle of each block, or its last one if the volume's end cuts the block."""
    for axis, f in enumerate(factor, start=2):
        index = torch.arange(0, x.shape[axis], f, device=x.device) + (f - 1) // 2
        x = x.index_select(axis, index.clamp_max(x.shape[axis] - 1))
    return x


def mean_axis(x: Tensor, factor: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
    """Return each block's mean axis: the leading eigenvector of its mean outer product, with weights if given.

    Its length is the gap between the two largest eigenvalues, which in 2D is the length of the mean of the directions
    with their angles doubled: 1 if all agree, 0 if the two largest are equal and the axis is undefined.
    """
    groups = direction_groups(x if weights is None else x * weights.sqrt())
    size = groups.shape[2]
    # Components are (x, y[, z]), tensors begin with the last of them.
    pairs = [(i, j) for i in reversed(range(size)) for j in reversed(range(i + 1))]
    outer = torch.stack([pool_mean(groups[:, :, i] * groups[:, :, j], factor) for i, j in pairs], dim=2)
    axes, prominence = largest_axis(outer.flatten(0, 1))
    return (axes * prominence[:, None]).reshape(*outer.shape[:2], size, *outer.shape[3:]).flatten(1, 2)


def _length(groups: Tensor) -> Tensor:
    # torch's own norm is ten times slower along an inner axis.
    return (groups * groups).sum(dim=2, keepdim=True).sqrt()
