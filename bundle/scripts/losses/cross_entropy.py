"""Cross-entropy losses with sigmoid and softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import LABEL_KINDS, VoxelLoss


def channel_vector(values: Sequence[float] | float | None) -> Tensor | None:
    """Return a float32 vector with one entry per channel (or a single one for all), or None."""
    return None if values is None else torch.as_tensor(values, dtype=torch.float32).reshape(-1)


def over_channels(vector: Tensor, like: Tensor) -> Tensor:
    """Return a vector (C,) shaped to multiply (B, C, *spatial)."""
    return vector.to(like).view(1, -1, *[1] * (like.dim() - 2))


class BCEWithLogitsLoss(VoxelLoss):
    """Binary cross-entropy of logits, mean over valid voxels and channels; class indices are converted to one-hot.

    l = -(pos_weight t log sigmoid(x) + (1 - t) log(1 - sigmoid(x))), like torch.nn.BCEWithLogitsLoss.

    Args:
        pos_weight: weight of the positive class, one number or one per channel.
        label_smoothing: a value e changes targets from {0, 1} to {e / 2, 1 - e / 2}.
        kind: "binary", "multilabel" or "multiclass".
    """

    kinds = LABEL_KINDS
    default_kind = "multilabel"

    def __init__(
        self,
        pos_weight: Sequence[float] | float | None = None,
        label_smoothing: float = 0.0,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(kind=kind)
        self.pos_weight: Tensor | None
        self.register_buffer("pos_weight", channel_vector(pos_weight), persistent=False)
        self.label_smoothing = label_smoothing

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.label_smoothing:
            target = target * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        weight = None if self.pos_weight is None else over_channels(self.pos_weight, pred)
        return F.binary_cross_entropy_with_logits(pred, target, pos_weight=weight, reduction="none")


class CrossEntropyLoss(VoxelLoss):
    """Softmax cross-entropy of K logits against class indices, mean over valid voxels.

    l = -w_c log softmax(x)_c; with class weights the mean is divided by their sum, like
    torch.nn.CrossEntropyLoss.

    Args:
        weight: one weight per class, optional.
        label_smoothing: a value e puts e / K on every class and a further 1 - e on the true one.
        kind: "multiclass".
    """

    kinds = frozenset({"multiclass"})
    default_kind = "multiclass"

    def __init__(
        self,
        weight: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(kind=kind)
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", channel_vector(weight), persistent=False)
        # A class of weight 0 does not count, but with smoothing the code divides by its weight.
        self.least_weight = 1e-6 * max(weight) if weight and label_smoothing else 0.0
        self.label_smoothing = label_smoothing

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        log_prob = pred.log_softmax(dim=1)
        hard = -(target * log_prob).sum(dim=1, keepdim=True)
        if not self.label_smoothing:
            return hard
        if self.class_weight is None:
            smooth = -log_prob.mean(dim=1, keepdim=True)
        else:
            # The mean multiplies by the weight of the true class, which does not belong in this part.
            smooth = -(log_prob * over_channels(self.class_weight, pred)).mean(dim=1, keepdim=True)
            smooth = smooth / self._true_weight(target)
        return (1 - self.label_smoothing) * hard + self.label_smoothing * smooth

    def weights(self, target: Tensor) -> Tensor | None:
        return None if self.class_weight is None else self._true_weight(target)

    def _true_weight(self, target: Tensor) -> Tensor:
        """Return the weight of the true class; nearly 0 instead of 0 where the code divides by it."""
        assert self.class_weight is not None
        weight = (target * over_channels(self.class_weight, target)).sum(dim=1, keepdim=True)
        return weight.clamp_min(self.least_weight) if self.least_weight else weight


class FocalLoss(VoxelLoss):
    """Cross-entropy with less weight on correct predictions: -a (1 - p)^gamma log(p), p of the true class.

    Sigmoid per channel for "binary" and "multilabel" (mean over valid voxels and channels), softmax for
    "multiclass" (mean over valid voxels). Lin et al. 2017.

    Args:
        gamma: strength of the reduction; 0 is cross-entropy.
        alpha: weight of the positives, 1 - alpha that of the negatives (for "multiclass" of the foreground
            classes and the background); None: no weights.
        kind: "binary", "multilabel" or "multiclass".
    """

    kinds = LABEL_KINDS
    default_kind = "multilabel"

    def __init__(self, gamma: float = 2.0, alpha: float | None = None, *, kind: str | None = None) -> None:
        super().__init__(kind=kind)
        if gamma < 0 or not 0 <= (alpha if alpha is not None else 0.5) <= 1:
            raise ValueError(f"gamma >= 0 and 0 <= alpha <= 1 wanted, got {gamma} and {alpha}")
        self.gamma = gamma
        self.alpha = alpha

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.kind == "multiclass":
            log_prob = (pred.log_softmax(dim=1) * target).sum(dim=1, keepdim=True)
            positive = 1 - target[:, :1]
        else:
            log_prob = F.logsigmoid(pred) * target + F.logsigmoid(-pred) * (1 - target)
            positive = target
        # 1 - p is computed from log p, which is accurate for p near 1; a power below 1 has no slope at 0.
        miss = (-torch.expm1(log_prob)).clamp_min(torch.finfo(pred.dtype).tiny)
        cost = -(miss**self.gamma) * log_prob
        return cost if self.alpha is None else cost * torch.lerp(1 - positive, positive, self.alpha)
