"""Overlap losses: Dice, Tversky, and Dice with cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from volumen.losses.base import LABEL_KINDS, ClassLoss, Loss
from volumen.losses.cross_entropy import BCEWithLogitsLoss, CrossEntropyLoss
from volumen.losses.masking import (
    full_precision,
    global_sum,
    guard,
    present_samples,
    sample_mean,
    spatial_dims,
)


class OverlapLoss(ClassLoss):
    """Base class: sums over the valid voxels of each sample and class, from which overlap losses are computed.

    Args:
        smooth: added to numerator and denominator, so that an empty class predicted as empty costs nothing.
        batch: sum over the whole batch (all ranks) before the ratio, instead of a ratio per sample.
        include_background: count class 0 as well; None: no for "multiclass" (as in nnU-Net), else yes.
        kind: "binary", "multilabel" (sigmoid) or "multiclass" (softmax).
    """

    def __init__(
        self,
        smooth: float = 1e-5,
        batch: bool = False,
        include_background: bool | None = None,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(include_background, kind=kind)
        self.smooth = smooth
        self.batch = batch

    def score(self, prob: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator (B, C) of the overlap; both arguments are 0 in ignored voxels."""
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        with full_precision(pred):
            prob, target, mask = self.prepare(pred, target, mask)
            numerator, denominator = self.score(prob, target)
            if not self.batch:
                return sample_mean(self.cost(numerator, denominator).mean(dim=1), mask)
            # One ratio for the batch of all ranks; without any valid voxel the loss must be 0.
            sums = global_sum(torch.stack([numerator.sum(0), denominator.sum(0)]))
            anything = global_sum(present_samples(mask).sum().to(sums.dtype)) > 0
            return guard(self.cost(sums[0], sums[1]).mean(), anything)

    def cost(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Return 1 - (numerator + smooth) / (denominator + smooth)."""
        return 1 - (numerator + self.smooth) / (denominator + self.smooth)


class SoftDiceLoss(OverlapLoss):
    """Soft Dice: 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s), p the sigmoid or softmax of the logits.

    Mean over classes, then over the samples with a valid voxel. Milletari et al. 2016 (V-Net), in the form of
    Drozdzal et al. 2016 with plain sums; `squared` gives Milletari's squared ones.

    Args:
        smooth, batch, include_background, kind: see `OverlapLoss`.
        squared: sum(p^2) + sum(t^2) in the denominator.
    """

    def __init__(
        self,
        smooth: float = 1e-5,
        batch: bool = False,
        include_background: bool | None = None,
        squared: bool = False,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(smooth, batch, include_background, kind=kind)
        self.squared = squared

    def score(self, prob: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        dims = spatial_dims(prob)
        size = (
            (prob**2).sum(dims) + (target**2).sum(dims) if self.squared else prob.sum(dims) + target.sum(dims)
        )
        return 2 * (prob * target).sum(dims), size


class TverskyLoss(OverlapLoss):
    """Tversky: (1 - (TP + s) / (TP + alpha FP + beta FN + s))^gamma of soft counts.

    Mean over classes, then over the samples with a valid voxel. alpha = beta = 0.5 is Dice; beta > alpha
    favours recall, for thin or rare structures. Salehi et al. 2017; gamma below 1 as in the focal Tversky
    loss, Abraham and Khan 2019 (their gamma is 1 over this one).

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives.
        gamma: exponent.
        smooth, batch, include_background, kind: see `OverlapLoss`.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        smooth: float = 1e-5,
        batch: bool = False,
        include_background: bool | None = None,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(smooth, batch, include_background, kind=kind)
        if min(alpha, beta) < 0 or gamma <= 0:
            raise ValueError(f"alpha and beta >= 0 and gamma > 0 wanted, got {alpha}, {beta} and {gamma}")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def score(self, prob: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        dims = spatial_dims(prob)
        hit = (prob * target).sum(dims)
        false_positive, missed = prob.sum(dims) - hit, target.sum(dims) - hit
        return hit, hit + self.alpha * false_positive + self.beta * missed

    def cost(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        cost = super().cost(numerator, denominator)
        # A root has no slope at 0, the value of a perfect sample.
        return cost if self.gamma == 1 else cost.clamp_min(1e-7) ** self.gamma


class DiceCELoss(Loss):
    """nnU-Net's combination: weight_dice * Dice + weight_ce * cross-entropy.

    Softmax Dice without background and softmax cross-entropy for "multiclass"; sigmoid Dice and binary
    cross-entropy per channel (nnU-Net's region-based pair) for "binary" and "multilabel". nnU-Net's own value
    is smaller by weight_dice, as it subtracts the Dice instead of adding 1 - Dice. Isensee et al. 2021.

    Args:
        weight_dice: weight of the Dice term.
        weight_ce: weight of the cross-entropy term.
        smooth, batch, include_background: see `SoftDiceLoss`.
        label_smoothing: of the cross-entropy term, 0 to 1.
        kind: "binary", "multilabel" or "multiclass".
    """

    kinds = LABEL_KINDS
    default_kind = "multilabel"

    def __init__(
        self,
        weight_dice: float = 1.0,
        weight_ce: float = 1.0,
        smooth: float = 1e-5,
        batch: bool = False,
        include_background: bool | None = None,
        label_smoothing: float = 0.0,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(kind=kind)
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.dice = SoftDiceLoss(smooth, batch, include_background, kind=self.kind)
        entropy = CrossEntropyLoss if self.kind == "multiclass" else BCEWithLogitsLoss
        self.entropy = entropy(label_smoothing=label_smoothing, kind=self.kind)

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.weight_dice * self.dice(pred, target, mask) + self.weight_ce * self.entropy(
            pred, target, mask
        )
