"""Losses that reward unbroken thin structures: clDice and skeleton recall."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import ClassLoss
from volumen.losses.masking import full_precision, guard, sample_mean, spatial_dims


def _highest_of_three(x: Tensor, axis: int) -> Tensor:
    """Return the maximum of a voxel and its two neighbours along an axis; the border has one neighbour less.

    Without a gradient it uses two passes over shifted views, which on a CPU are four times faster than pooling;
    with a gradient it uses pooling, whose backward pass is faster.
    """
    size = x.shape[axis]
    if x.requires_grad or size < 2:
        dims = x.dim() - 2
        width = [3 if i == axis else 1 for i in spatial_dims(x)]
        pool = F.max_pool2d if dims == 2 else F.max_pool3d
        return pool(x, width, stride=1, padding=[w // 2 for w in width])
    pairs = torch.maximum(x.narrow(axis, 0, size - 1), x.narrow(axis, 1, size - 1))
    inner = torch.maximum(pairs.narrow(axis, 0, size - 2), pairs.narrow(axis, 1, size - 2))
    return torch.cat([pairs.narrow(axis, 0, 1), inner, pairs.narrow(axis, size - 2, 1)], dim=axis)


def soft_erode(x: Tensor, mask: Tensor) -> Tensor:
    """Return the minimum over a voxel and its face neighbours; ignored voxels and the border do not count."""
    flipped = guard(-x, mask, -torch.inf)
    highest = [_highest_of_three(flipped, axis) for axis in spatial_dims(x)]
    return guard(-reduce(torch.maximum, highest), mask)


def soft_dilate(x: Tensor, mask: Tensor) -> Tensor:
    """Return the maximum over the 3-wide cube around a voxel; ignored voxels and the border do not count."""
    x = guard(x, mask)
    for axis in spatial_dims(x):
        x = _highest_of_three(x, axis)
    return guard(x, mask)


def soft_skeleton(x: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Return the soft skeleton: what opening removes, at each of `iterations` erosions. Shit et al. 2021.

    Args:
        x: (B, C, *spatial) in 0..1.
        mask: (B, 1, *spatial) bool, valid voxels.
        iterations: erosions; at least the largest radius of the structures in voxels.

    Returns:
        (B, C, *spatial), 0 in ignored voxels. For a binary image it is the morphological skeleton: the medial
        surface of a sheet, the centreline of a tube.
    """
    x = guard(x, mask)
    skeleton = F.relu(x - soft_dilate(soft_erode(x, mask), mask))
    for _ in range(iterations):
        x = soft_erode(x, mask)
        # On a GPU this check would wait for the device.
        if x.device.type == "cpu" and not x.requires_grad and not x.any():
            break
        delta = F.relu(x - soft_dilate(soft_erode(x, mask), mask))
        skeleton = skeleton + F.relu(delta - skeleton * delta)
    return skeleton


class _SkeletonLoss(ClassLoss):
    def __init__(
        self,
        iterations: int = 3,
        smooth: float = 1.0,
        include_background: bool = False,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(include_background or None, kind=kind)
        if iterations < 0:
            raise ValueError(f"iterations must not be negative, got {iterations}")
        self.iterations = iterations
        self.smooth = smooth

    def cost(self, prob: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the loss per sample and class (B, C); both arguments are 0 in ignored voxels."""
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        with full_precision(pred):
            prob, target, mask = self.prepare(pred, target, mask)
            return sample_mean(self.cost(prob, target, mask).mean(dim=1), mask)


class SoftClDiceLoss(_SkeletonLoss):
    """Centreline Dice: 1 - 2 P S / (P + S) of topology precision P and sensitivity S.

    P = (sum(S(p) t) + s) / (sum(S(p)) + s), S = (sum(S(t) p) + s) / (sum(S(t)) + s), S(.) the soft skeleton.
    Mean over classes, then over samples with a valid voxel. Ignored voxels neither end nor break a skeleton.
    Use it together with an overlap loss. Shit et al. 2021.

    Args:
        iterations: erosions of the soft skeleton; at least the radius of the structures in voxels.
        smooth: s above.
        include_background: count class 0 of a "multiclass" target too.
        kind: "binary", "multilabel" or "multiclass".
    """

    def cost(self, prob: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        dims = spatial_dims(prob)
        of_pred = soft_skeleton(prob, mask, self.iterations)
        of_truth = soft_skeleton(target, mask, self.iterations)
        precision = ((of_pred * target).sum(dims) + self.smooth) / (of_pred.sum(dims) + self.smooth)
        recall = ((of_truth * prob).sum(dims) + self.smooth) / (of_truth.sum(dims) + self.smooth)
        return 1 - 2 * precision * recall / (precision + recall)


class SkeletonRecallLoss(_SkeletonLoss):
    """1 - (sum(p K) + s) / (sum(K) + s), K the truth's skeleton, dilated by `radius` within the truth.

    Without a field, K is the soft skeleton of the truth, computed here. With the derived target `skeleton` as `field`
    of the entry it is that one: the exact medial surface or centreline, from the distance transform that other targets
    use too.

    Mean over classes, then over samples with a valid voxel. It computes no soft skeleton of the prediction, so it
    costs a fraction of clDice. It only rewards recall: use it together with an overlap loss. Kirchhoff et al. 2024.

    Args:
        iterations: erosions for computing the skeleton; at least the radius of the structures in voxels.
        radius: dilations of the skeleton.
        precomputed: the target is a skeleton already (the derived target `skeleton`) and is used unchanged.
        smooth, include_background, kind: see `SoftClDiceLoss`.
    """

    def __init__(
        self,
        iterations: int = 10,
        radius: int = 1,
        precomputed: bool = False,
        smooth: float = 1.0,
        include_background: bool = False,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(iterations, smooth, include_background, kind=kind)
        self.radius = radius
        self.precomputed = precomputed

    def forward(
        self, pred: Tensor, target: Tensor, mask: Tensor | None = None, field: Tensor | None = None
    ) -> Tensor:
        if field is None:
            return super().forward(pred, target, mask)
        with full_precision(pred):
            prob, target, mask = self.prepare(pred, target, mask)
            with torch.no_grad():
                tube = self._dilated(guard(field, mask).to(prob.dtype), mask) * target
            return sample_mean(self._recall(prob, tube).mean(dim=1), mask)

    def cost(self, prob: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            tube = target if self.precomputed else self._tube(target, mask)
        return self._recall(prob, tube)

    def _recall(self, prob: Tensor, tube: Tensor) -> Tensor:
        dims = spatial_dims(prob)
        return 1 - ((prob * tube).sum(dims) + self.smooth) / (tube.sum(dims) + self.smooth)

    def _tube(self, target: Tensor, mask: Tensor) -> Tensor:
        return self._dilated(soft_skeleton(target, mask, self.iterations), mask) * target

    def _dilated(self, tube: Tensor, mask: Tensor) -> Tensor:
        for _ in range(self.radius):
            tube = soft_dilate(tube, mask)
        return tube
