"""Element-wise regression losses; none of them normalises the prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import VALUE_KINDS, VoxelLoss
from volumen.losses.cross_entropy import channel_vector, over_channels


class MSELoss(VoxelLoss):
    """Mean of (pred - target)^2 over valid voxels and channels; for kind "axis" with the better sign per voxel.

    Like torch.nn.MSELoss.
    """

    kinds = VALUE_KINDS

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target) ** 2


class MaskedMSELoss(MSELoss):
    """Mean of (pred - target)^2 over valid voxels and channels that no value of the target marks as ignored.

    Like torch.nn.MSELoss, with the `ignore_index` of torch.nn.CrossEntropyLoss.

    Args:
        ignore_index: a voxel is excluded if any channel of its target equals this value (or is NaN); with None
            only the mask decides.
        kind: any regression kind; for "axis" the better sign is taken per voxel.
    """

    def __init__(self, ignore_index: float | None = -100, *, kind: str | None = None) -> None:
        super().__init__(kind=kind)
        self.ignore_index = ignore_index

    def valid(self, target: Tensor, mask: Tensor) -> Tensor:
        if self.ignore_index is None:
            return mask
        marked = (target == self.ignore_index) | torch.isnan(target)
        return mask & ~marked.any(dim=1, keepdim=True)


class L1Loss(VoxelLoss):
    """Mean of |pred - target| over valid voxels and channels; for kind "axis" with the better sign per voxel.

    Like torch.nn.L1Loss.
    """

    kinds = VALUE_KINDS

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).abs()


class SmoothL1Loss(VoxelLoss):
    """Mean of d^2 / (2 beta) for |d| < beta, else |d| - beta / 2, with d = pred - target, over valid voxels.

    Girshick 2015; like torch.nn.SmoothL1Loss.

    Args:
        beta: difference at which the parabola becomes a line, in units of the target; 0 is L1.
        kind: any regression kind; for "axis" the better sign is taken per voxel.
    """

    kinds = VALUE_KINDS

    def __init__(self, beta: float = 1.0, *, kind: str | None = None) -> None:
        super().__init__(kind=kind)
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.beta = beta

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(pred, target, beta=self.beta, reduction="none")


class WeightedSmoothL1Loss(SmoothL1Loss):
    """Smooth L1 loss whose mean weights channels and voxels: sum(w l) / sum(w) over valid voxels.

    l is the value of `SmoothL1Loss`; w the weight of the channel times that of the voxel. It suits the `inside` and
    `outside` distances, which are 0 over most of a patch: voxels where the target is not 0 can have
    more weight.

    Args:
        beta: see `SmoothL1Loss`.
        nonzero_weight: weight of the voxels where the target is not 0; the weight of all others is 1.
        channel_weights: one weight per channel, optional.
        kind: any regression kind.
    """

    def __init__(
        self,
        beta: float = 1.0,
        nonzero_weight: float = 2.0,
        channel_weights: Sequence[float] | None = None,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(beta, kind=kind)
        if nonzero_weight <= 0:
            raise ValueError(f"nonzero_weight must be positive, got {nonzero_weight}")
        self.nonzero_weight = nonzero_weight
        self.channel_weights: Tensor | None
        self.register_buffer("channel_weights", channel_vector(channel_weights), persistent=False)

    def weights(self, target: Tensor) -> Tensor:
        weights = 1 + (self.nonzero_weight - 1) * (target != 0).to(target.dtype)
        return (
            weights if self.channel_weights is None else weights * over_channels(self.channel_weights, target)
        )
