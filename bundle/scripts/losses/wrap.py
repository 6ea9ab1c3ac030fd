"""Adds masks to losses without mask support: any of torch.nn and monai.losses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from volumen.losses.base import LABEL_KINDS, Loss, encode_target, smaller_sign
from volumen.losses.masking import (
    as_real,
    full_mask,
    full_precision,
    guard,
    masked_mean,
    present_samples,
    ratio,
    sample_mean,
    zero_of,
)
from volumen.utils.errors import VolumenError

# These take class indices (B, *spatial); all others take a target of the prediction's shape.
INDEX_LOSSES = frozenset({"CrossEntropyLoss", "MultiMarginLoss"})
# These take logarithms of probabilities; for logits they have no lower bound, and the training would diverge.
LOG_LOSSES = frozenset({"NLLLoss", "NLLLoss2d", "KLDivLoss", "PoissonNLLLoss"})
# These have a value per voxel that depends on the target of this voxel alone.
VOXEL_LOSSES = frozenset({"MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCEWithLogitsLoss"})
# Arguments that identify a loss of labels.
LABEL_ARGUMENTS = frozenset({"sigmoid", "softmax", "use_softmax", "to_onehot_y", "pos_weight"})
# exp(-60) is below the rounding of any sum, and far from overflow in float32.
CERTAIN = 60.0


class WrappedLoss(Loss):
    """Make a loss of another library ignore voxels outside the mask.

    Ignored voxels are replaced before the loss is computed (label targets: logits of -60 against 0, the
    background class against itself when softmax is applied; regression: 0 against 0), so their gradient is
    exactly zero. The average depends on what the loss returns with reduction="none":

    - a value per voxel: mean over valid voxels, so a replaced voxel does not count at all, and neither
      does one with the loss's `ignore_index`; class weights do not enter the divisor;
    - a value per sample, or a loss without reduction="none": mean over the samples with a valid voxel. Sums
      inside the loss, as in Dice, then include replaced voxels as certain background, which adds nothing to a
      foreground class.

    MONAI losses with `sigmoid`, `softmax` or `use_softmax` get the value that suits the target's kind,
    unless the user set it, since networks here return logits; classes are passed as one-hot unless the user sets
    `to_onehot_y`. For kind "axis" the better sign is taken per voxel, or per sample.

    Args:
        cls: the other library's class.
        kwargs: its constructor arguments; lists become tensors for `weight` and `pos_weight`.
        kind: kind of the target.
        where: configuration key to name in errors.
    """

    def __init__(
        self, cls: type[nn.Module], kwargs: Mapping[str, Any], *, kind: str, where: str = "losses"
    ) -> None:
        super().__init__(kind=kind)
        self.name = cls.__name__
        _check_forward(cls, where)
        parameters = inspect.signature(cls).parameters
        _check_kind(self.name, kind, frozenset(parameters), where)
        built = dict(kwargs)
        for key in ("weight", "pos_weight"):
            if isinstance(built.get(key), list | tuple):
                built[key] = torch.tensor(built[key], dtype=torch.float32)
        for key, value in self._activation().items():
            if key in parameters:
                built.setdefault(key, value)
        if "reduction" in parameters:
            built["reduction"] = "none"
        self.loss = self._construct(cls, built)
        if self.name in INDEX_LOSSES and kind != "multiclass":
            raise VolumenError(self.name, expected="a target of kind multiclass", found=f"kind {kind}")

    def _construct(self, cls: type[nn.Module], built: dict[str, Any]) -> nn.Module:
        try:
            return cls(**built)
        except ValueError:
            # A few losses support only "mean" and "sum".
            if built.pop("reduction", None) is None:
                raise
            return cls(**built)

    def _activation(self) -> dict[str, bool]:
        if self.kind not in LABEL_KINDS:
            return {}
        multiclass = self.kind == "multiclass"
        return {"sigmoid": not multiclass, "softmax": multiclass, "use_softmax": multiclass}

    @property
    def takes_confidence(self) -> bool:
        """Whether the loss has one value per voxel, which depends on the target of this voxel alone."""
        return self.name in VOXEL_LOSSES

    def forward(
        self, pred: Tensor, target: Tensor, mask: Tensor | None = None, confidence: Tensor | None = None
    ) -> Tensor:
        with full_precision(pred):
            mask = self._without_ignored(target, full_mask(mask, pred))
            blank_pred, blank_target = self._blank(pred, target, mask)
            present = present_samples(mask)
            # The loss may sum over the batch, so samples without a valid voxel are removed.
            keep = present.nonzero().flatten()
            if len(keep) == 0:
                return ratio(zero_of(pred), present.sum())
            values = self._values(blank_pred[keep], blank_target[keep])
            if values.dim() == 0:
                return ratio(values * len(keep), present.sum())
            return self._reduce(values, mask[keep], None if confidence is None else confidence[keep])

    def _values(self, pred: Tensor, target: Tensor) -> Tensor:
        values = self.loss(pred, target)
        if self.kind != "axis":
            return values
        opposite = self.loss(pred, -target)
        if values.shape == pred.shape:
            return smaller_sign(values, opposite, pred.shape[1])
        return torch.minimum(values, opposite)

    def _without_ignored(self, target: Tensor, mask: Tensor) -> Tensor:
        """Remove voxels with the loss's own `ignore_index` from the mask, as they would count in the mean."""
        index = getattr(self.loss, "ignore_index", None)
        return mask if index is None else mask & (target != index).all(dim=1, keepdim=True)

    def _blank(self, pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pred, target = as_real(pred), guard(target, mask)
        if self.kind not in LABEL_KINDS:
            return guard(pred, mask), target.to(pred.dtype)
        blank = torch.full(
            (1, pred.shape[1], *[1] * (pred.dim() - 2)), -CERTAIN, dtype=pred.dtype, device=pred.device
        )
        if self.kind == "multiclass":
            blank[:, 0] = CERTAIN
        pred = torch.where(mask, pred, blank)
        if self.name in INDEX_LOSSES:
            return pred, target[:, 0].long()
        if getattr(self.loss, "to_onehot_y", False):
            return pred, target
        return pred, encode_target(target, self.kind, pred.shape[1], pred.dtype)

    def _reduce(self, values: Tensor, mask: Tensor, confidence: Tensor | None) -> Tensor:
        spatial = mask.shape[2:]
        if values.shape[1:] == spatial:
            values = values.unsqueeze(1)
        if values.dim() == mask.dim() and values.shape[2:] == spatial:
            return masked_mean(values, mask, confidence)
        if values.shape[0] != mask.shape[0]:
            raise ValueError(
                f"{self.name} returned values of shape {tuple(values.shape)}, neither per voxel nor sample"
            )
        return sample_mean(values.reshape(len(values), -1).mean(dim=1), mask)


def _check_kind(name: str, kind: str, arguments: frozenset[str], where: str) -> None:
    """Raise for a loss of labels on a regression target, and for one of log-probabilities on logits of labels."""
    if kind not in LABEL_KINDS and (name in INDEX_LOSSES or arguments & LABEL_ARGUMENTS):
        raise VolumenError(
            where,
            expected=f"a loss for a target of kind {kind}",
            found=f"{name}, a loss of labels",
            remedy="choose one such as SmoothL1Loss",
        )
    if kind in LABEL_KINDS and name in LOG_LOSSES:
        raise VolumenError(
            where,
            expected="a loss of logits",
            found=f"{name}, a loss of log-probabilities",
            remedy="choose CrossEntropyLoss or BCEWithLogitsLoss",
        )


def _check_forward(cls: type[nn.Module], where: str) -> None:
    """Raise if a loss's forward takes more, or fewer, arguments than a prediction and a target."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) != 2:
        raise VolumenError(
            where,
            f"{cls.__name__} cannot be used here",
            expected="a loss that takes a prediction and a target",
            found=f"forward({', '.join(needed)})",
        )
