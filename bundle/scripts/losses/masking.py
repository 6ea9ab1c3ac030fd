"""Masks and reductions that all losses share.

One rule: a voxel outside the mask must have no effect. Its prediction and target are replaced before any
arithmetic, since NaN times zero is NaN, and the values are replaced again before they are summed.
`torch.where` passes an exact zero back to the branch that was not taken, so the gradient there is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

_this_rank_alone = False


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Switch autocast off on the device of `x`: a sum over a million voxels needs float32 precision."""
    kind = x.device.type
    off = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with off:
        yield


def as_real(x: Tensor) -> Tensor:
    """Return `x` as float32, or unchanged when it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def full_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the mask as bool (B, 1, *spatial) on the device of `like` (B, C, *spatial); all True for None.

    Raises:
        ValueError: the mask has neither the shape (B, 1, *spatial) nor (B, *spatial).
    """
    shape = (like.shape[0], 1, *like.shape[2:])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    mask = mask.to(device=like.device, dtype=torch.bool)
    if mask.shape == (shape[0], *shape[2:]):
        mask = mask.unsqueeze(1)
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {shape}, got {tuple(mask.shape)}")
    return mask


def guard(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """Replace `x` by `value` wherever the mask is False; no gradient flows there, not even NaN."""
    return torch.where(mask, x, torch.full((), value, dtype=x.dtype, device=x.device))


def zero_of(pred: Tensor) -> Tensor:
    """Return a 0.0 on the graph of `pred` with a gradient of exactly zero, also if `pred` holds NaN."""
    return guard(as_real(pred), torch.zeros((), dtype=torch.bool, device=pred.device)).sum()


@contextmanager
def this_rank_alone() -> Iterator[None]:
    """Compute sums on this rank alone within a `with` block, so that it waits for no other rank, even a failed one."""
    global _this_rank_alone
    former, _this_rank_alone = _this_rank_alone, True
    try:
        yield
    finally:
        _this_rank_alone = former


def synchronised() -> bool:
    """Return whether sums run over all ranks: only while gradients are recorded, as rank 0 may validate alone."""
    return (
        not _this_rank_alone
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
        and torch.is_grad_enabled()
    )


def global_sum(x: Tensor) -> Tensor:
    """Return the sum of `x` over all ranks, with a gradient that is correct after DDP has averaged it.

    DDP averages the ranks' gradients, so each rank's own part is multiplied by the world size. Then
    `global_sum(a) / global_sum(b)`, or any other function of such sums, has on every rank the value of the
    batch of all ranks, and the averaged gradient equals that of a single process on this batch. Every rank
    must make the same calls in the same order; therefore no loss skips a batch without valid voxels.
    """
    if not synchronised():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach()) if x.requires_grad else total


def ratio(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count over all ranks, and 0.0 (still on the graph) if the count is 0."""
    total, count = global_sum(total), global_sum(count.to(total.dtype))
    return total / torch.where(count > 0, count, torch.ones_like(count))


def masked_mean(values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean of `values` (B, C, *spatial) over all valid voxels of the batch and their channels.

    Args:
        values: one value per voxel and channel.
        mask: (B, 1, *spatial) bool.
        weights: optional, broadcastable to `values`; the mean is then sum(w v) / sum(w).
    """
    mask = mask.expand_as(values)
    if weights is None:
        return ratio(guard(values, mask).sum(), mask.sum())
    weights = guard(weights.to(values.dtype).expand_as(values), mask)
    return ratio((weights * guard(values, mask)).sum(), weights.sum())


def spatial_dims(x: Tensor) -> tuple[int, ...]:
    """Return the spatial dimensions of (B, C, *spatial)."""
    return tuple(range(2, x.dim()))


def present_samples(mask: Tensor) -> Tensor:
    """Return (B,) bool: the samples with at least one valid voxel."""
    return mask.flatten(1).any(dim=1)


def sample_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` (B,) over the samples that have a valid voxel."""
    present = present_samples(mask)
    return ratio(guard(values, present).sum(), present.sum())
