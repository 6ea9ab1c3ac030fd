"""Cross-entropy that counts some voxels more, such as those whose label decides the topology."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import LABEL_KINDS, Loss
from volumen.losses.masking import full_precision, masked_mean


class FieldWeightedLoss(Loss):
    """Weighted mean of the cross-entropy over valid voxels: sum(w l) / sum(w), w = 1 + gain * field.

    l is the binary cross-entropy per channel, or that of the softmax for exclusive classes. The field is a derived
    target of one channel that the entry of the loss names, such as `critical`; where it is not valid, and without one,
    w = 1.

    Args:
        gain: additional weight of a voxel where the field is 1.
        kind: "binary", "multilabel" or "multiclass".
    """

    kinds = LABEL_KINDS
    default_kind = "multilabel"

    def __init__(self, gain: float = 4.0, *, kind: str | None = None) -> None:
        super().__init__(kind=kind)
        if gain < 0:
            raise ValueError(f"gain must not be negative, got {gain}")
        self.gain = gain

    def forward(
        self, pred: Tensor, target: Tensor, mask: Tensor | None = None, field: Tensor | None = None
    ) -> Tensor:
        with full_precision(pred):
            pred, target, mask = self.prepare(pred, target, mask)
            if self.kind == "multiclass":
                values = -(target * pred.log_softmax(dim=1)).sum(dim=1, keepdim=True)
            else:
                values = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
            return masked_mean(values, mask, None if field is None else 1 + self.gain * field)
