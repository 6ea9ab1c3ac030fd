"""Base classes of losses: with one value per voxel or one value per sample; and the kinds of targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volumen.losses.masking import as_real, full_mask, full_precision, guard, masked_mean
from volumen.utils.errors import VolumenError

LABEL_KINDS = frozenset({"binary", "multiclass", "multilabel"})
VALUE_KINDS = frozenset({"distance", "vector", "axis", "tensor", "field"})
DIRECTION_KINDS = frozenset({"vector", "axis"})
KINDS = LABEL_KINDS | VALUE_KINDS


def encode_target(target: Tensor, kind: str, channels: int, dtype: torch.dtype) -> Tensor:
    """Return the target with the channels of the prediction.

    Args:
        target: (B, 1, *spatial) class indices for kind "multiclass", else (B, C, *spatial).
        kind: see `Loss`.
        channels: C of the prediction.
        dtype: floating type of the result.

    Returns:
        (B, C, *spatial): one-hot for "multiclass" (all zero for an index outside 0..C-1), else the target.
    """
    if kind != "multiclass":
        return target.to(dtype)
    classes = torch.arange(channels, device=target.device).view(1, -1, *[1] * (target.dim() - 2))
    return (target == classes).to(dtype)


def probabilities(logits: Tensor, kind: str) -> Tensor:
    """Return softmax over channels for kind "multiclass", else sigmoid per channel."""
    return logits.softmax(dim=1) if kind == "multiclass" else logits.sigmoid()


class Loss(nn.Module):
    """The contract of every loss in this package.

    `forward(pred, target, mask=None)` takes logits (B, C, *spatial), a target (B, Ct, *spatial) and a bool
    mask (B, 1, *spatial), and returns a scalar float32 (float64 for a float64 prediction), reduced with
    autocast off. An ignored voxel gets a gradient of exactly zero, a sample without valid voxels changes
    nothing, and a batch without any valid voxel returns 0.0.

    A forward may also declare `source_pred` (logits of the source target), `source_mask`, or `scale` (size of a
    voxel at this level of deep supervision, in voxels of the full resolution); they are passed if it declares
    them. One that declares `confidence` states that it weighs voxels by it, (B, 1, *spatial) in [0, 1], and that its
    value depends on the target of a voxel through this voxel alone: then a derived target with informed validity
    passes estimates with their confidence, and of a distance between bounds the value nearest the prediction. A
    bool `certain`, (B, 1, *spatial), states where the target is exact. Without `confidence` it gets exact values only.
    An entry of `losses` that names a `field` passes that derived target as `field` (B, 1, *spatial), 0 where it is not
    valid.

    Args:
        kind: kind of the target: "binary" (one logit, target 0/1), "multiclass" (K logits, class index),
            "multilabel" (C logits, C binary maps), "distance", "vector" (unit, signed), "axis" (unit, sign
            meaningless), "tensor" (symmetric, upper triangle), "field" (any other regression).

    Raises:
        VolumenError: this loss does not support the kind.
        VolumenError: this loss makes no sense for the kind.
    """

    kinds: frozenset[str] = KINDS
    default_kind = "field"

    def __init__(self, *, kind: str | None = None) -> None:
        super().__init__()
        self.kind = kind or self.default_kind
        if self.kind not in self.kinds:
            raise VolumenError(
                type(self).__name__,
                expected=f"a target of kind {', '.join(sorted(self.kinds))}",
                found=f"kind {self.kind}",
                remedy="choose a loss made for this target",
            )

    def prepare(self, pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return prediction and target as floating-point tensors of one shape, 0 outside the mask, and the mask."""
        mask = full_mask(mask, pred)
        pred = guard(as_real(pred), mask)
        target = encode_target(guard(target, mask), self.kind, pred.shape[1], pred.dtype)
        if target.shape != pred.shape:
            raise ValueError(
                f"{type(self).__name__}: target of shape {tuple(target.shape)} does not fit "
                f"a prediction of shape {tuple(pred.shape)}"
            )
        return pred, target, mask


class ClassLoss(Loss):
    """A loss of the probability of every class; the background can be excluded.

    Args:
        include_background: count class 0 as well; None: excluded for "multiclass", included for other kinds.
        kind: "binary", "multilabel" or "multiclass".
    """

    kinds = LABEL_KINDS
    default_kind = "multilabel"

    def __init__(self, include_background: bool | None, *, kind: str | None = None) -> None:
        super().__init__(kind=kind)
        self.include_background = (
            self.kind != "multiclass" if include_background is None else include_background
        )

    def prepare(self, pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities and target of the classes that count, 0 outside the mask, and the mask."""
        pred, target, mask = super().prepare(pred, target, mask)
        # Masked again here: an ignored voxel's sigmoid is not 0, and its class index became one-hot.
        prob, target = guard(probabilities(pred, self.kind), mask), guard(target, mask)
        if not self.include_background and prob.shape[1] > 1:
            prob, target = prob[:, 1:], target[:, 1:]
        return prob, target, mask


def direction_groups(x: Tensor) -> Tensor:
    """Return (B, C, *spatial) as (B, C / d, d, *spatial), d spatial dimensions: one vector per group.

    Raises:
        ValueError: C is not a multiple of d.
    """
    size = x.dim() - 2
    if x.shape[1] % size:
        raise ValueError(f"a direction in {size}D needs a multiple of {size} channels, got {x.shape[1]}")
    return x.unflatten(1, (-1, size))


class VoxelLoss(Loss):
    """Mean over all valid voxels of the batch of one value per voxel.

    For kind "axis" the value is the smaller of those for target and -target, per voxel and vector.
    """

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss per voxel, (B, C or 1, *spatial)."""
        raise NotImplementedError

    def valid(self, target: Tensor, mask: Tensor) -> Tensor:
        """Return the mask (B, 1, *spatial), reduced by voxels that the raw target marks as ignored."""
        return mask

    def weights(self, target: Tensor) -> Tensor | None:
        """Return weights broadcastable to the values, or None for a plain mean."""
        return None

    def forward(
        self, pred: Tensor, target: Tensor, mask: Tensor | None = None, confidence: Tensor | None = None
    ) -> Tensor:
        with full_precision(pred):
            mask = self.valid(target, full_mask(mask, pred))
            pred, target, mask = self.prepare(pred, target, mask)
            values = self.voxelwise(pred, target)
            if self.kind == "axis":
                values = smaller_sign(values, self.voxelwise(pred, -target), pred.shape[1])
            return masked_mean(values, mask, weighted(self.weights(target), confidence))


def weighted(weights: Tensor | None, confidence: Tensor | None) -> Tensor | None:
    """Return the product of a loss's own weights and the confidence; None for a plain mean."""
    if weights is None or confidence is None:
        return confidence if weights is None else weights
    return weights * confidence


def smaller_sign(plus: Tensor, minus: Tensor, channels: int) -> Tensor:
    """Return per voxel and direction the smaller of two losses, one for each sign of the target.

    Args:
        plus: loss against the target, per component or per direction.
        minus: loss against its opposite.
        channels: channels of the prediction, which distinguish components from directions.
    """
    if plus.shape[1] != channels:
        return torch.minimum(plus, minus)
    plus, minus = direction_groups(plus), direction_groups(minus)
    flip = minus.detach().sum(dim=2, keepdim=True) < plus.detach().sum(dim=2, keepdim=True)
    return torch.where(flip, minus, plus).flatten(1, 2)
