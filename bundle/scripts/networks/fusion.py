"""Reads the label of a target from several heads: a weighted sum of their outputs in place of its logit.

The sum is linear in the outputs of the heads. So it may be taken in every window: blending and averaging over
augmentations commute with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FusionRules = dict[str, dict[str, Any]]
"""Target to {"bias": float, "weights": {head: [a float per channel]}}, plain values that a checkpoint holds."""


def fused_logits(
    outputs: dict[str, Tensor], own: Tensor, bias: float, weights: dict[str, list[float]]
) -> Tensor:
    """Return bias + sum of weight * output over all channels of the named heads, (B, 1, *spatial) float32.

    Args:
        outputs: logits or values (B, C, *spatial) by head.
        own: the target's own logit, for shape and device.
        bias: the constant.
        weights: a weight per channel by head.
    """
    total = torch.full_like(own, bias, dtype=torch.float32)
    for head, values in weights.items():
        for channel, weight in enumerate(values):
            total = total + weight * outputs[head][:, channel : channel + 1].float()
    return total


def checked_rules(rules: Mapping[str, Any] | None, heads: Mapping[str, Mapping[str, Any]]) -> FusionRules:
    """Return rules as plain values, after checking that a network with these heads can follow them.

    Args:
        rules: target to bias and weights; None for no rule.
        heads: head to {"out_channels": int}.

    Raises:
        ValueError: an unknown head, a target of several channels, or weights that do not match the channels.
    """
    checked: FusionRules = {}
    for target, rule in (rules or {}).items():
        if heads.get(target, {}).get("out_channels") != 1:
            raise ValueError(f"fusion: {target!r} must be a head of one channel")
        weights = {head: [float(value) for value in values] for head, values in rule["weights"].items()}
        for head, values in weights.items():
            channels = heads.get(head, {}).get("out_channels")
            if channels != len(values):
                raise ValueError(
                    f"fusion of {target!r}: {head!r} needs {channels} weights, got {len(values)}"
                    if channels
                    else f"fusion of {target!r}: there is no head {head!r}"
                )
        bias = float(rule["bias"])
        if not all(map(math.isfinite, [bias, *(value for values in weights.values() for value in values)])):
            raise ValueError(f"fusion of {target!r}: bias and weights must be finite")
        checked[target] = {"bias": bias, "weights": weights}
    return checked
