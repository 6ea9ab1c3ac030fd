"""The difference between what a student and its teacher predict of the same voxels, for every kind of target."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import LABEL_KINDS, probabilities
from volumen.losses.masking import as_real

_SMALLEST = 1e-6


def teaching(output: Tensor, kind: str) -> Tensor:
    """Return what a student is compared with: probabilities of labels, unit vectors of directions, else the values.

    Args:
        output: (B, C, *spatial), logits or values of a head.
        kind: kind of the target, see `volumen.losses.base.Loss`.

    Returns:
        (B, C, *spatial) float32.
    """
    output = as_real(output)
    if kind in LABEL_KINDS:
        return probabilities(output, kind)
    return F.normalize(output, dim=1, eps=_SMALLEST) if kind in ("vector", "axis") else output


def entropy(taught: Tensor, kind: str) -> Tensor:
    """Return the entropy of probabilities as a share of the largest one: (B, 1, *spatial) in [0, 1].

    Independent maps ("binary", "multilabel") have the mean entropy of their channels. Values that are no probabilities
    have the entropy 0.

    Args:
        taught: the result of `teaching`.
        kind: kind of the target.
    """
    if kind not in LABEL_KINDS:
        return torch.zeros_like(taught[:, :1])
    own = torch.special.entr(taught)
    if kind == "multiclass":
        return own.sum(dim=1, keepdim=True) / math.log(max(2, taught.shape[1]))
    return ((own + torch.special.entr(1 - taught)) / math.log(2)).mean(dim=1, keepdim=True)


def consistency(student: Tensor, taught: Tensor, kind: str, weight: Tensor | None = None) -> Tensor:
    """Return the mean difference between a student's output and what its teacher says, a float32 scalar.

    - labels: squared difference of probabilities, the mean over channels (Tarvainen & Valpola 2017, arXiv:1703.01780);
    - "vector": half of 1 - cos of the angle; "axis": 1 - cos^2, which has no sign;
    - other values: squared difference divided by four times the variance of the teacher's values: their unit does not
      matter, and their variance becomes the largest one of a probability.

    Args:
        student: (B, C, *spatial), logits or values of the head; gradients flow here.
        taught: the result of `teaching` for the teacher, (B, C, *spatial).
        kind: kind of the target.
        weight: (B, 1, *spatial), at least 0; None: 1 everywhere. Without any weight the result is 0.
    """
    own, taught = teaching(student, kind), taught.detach()
    if kind == "axis":
        difference = 1 - (own * taught).sum(dim=1, keepdim=True).square()
    elif kind == "vector":
        difference = (1 - (own * taught).sum(dim=1, keepdim=True)) / 2
    else:
        difference = (own - taught).square().mean(dim=1, keepdim=True)
        if kind not in LABEL_KINDS:
            difference = difference / (4 * taught.var(unbiased=False)).clamp_min(_SMALLEST)
    if weight is None:
        return difference.mean()
    return (difference * weight).sum() / weight.sum().clamp_min(1.0)
