"""Weights of classes from their share of the voxels, and the losses that take them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from volumen.losses.registry import loss_class

OFFSET = 1.02
"""Bounds the weight of a class that nearly no voxel has by 1 / ln(1.02) = 50.5."""


def automatic_weights(shares: Sequence[float], *, exclusive: bool) -> list[float]:
    """Return a weight for each class: w(p) = 1 / ln(1.02 + p) of its share p of the voxels.

    The formula is that of ENet (Paszke et al. 2016, https://arxiv.org/abs/1606.02147); unlike the inverse share it is
    bounded, so that a class of 0.007 % counts 35 times as much as one of all voxels, not 14,000 times.

    Args:
        shares: p of each class, 0 to 1.
        exclusive: whether each voxel has one class; else the weights are those of the foreground against the
            background of each channel, w(p) / w(1 - p).

    Returns:
        The weights. Exclusive classes: so that the mean over the classes is 1; a class without voxels has weight 0.

    Example:
        >>> automatic_weights([0.5], exclusive=False)
        [1.0]
    """
    p = np.asarray(shares, dtype=float)
    weights = 1 / np.log(OFFSET + p)
    if not exclusive:
        return [round(float(value), 4) for value in np.where(p > 0, weights * np.log(OFFSET + 1 - p), 1.0)]
    weights = np.where(p > 0, weights, 0.0)
    return (
        [round(float(value), 4) for value in weights / weights[p > 0].mean()]
        if (p > 0).any()
        else [1.0] * len(p)
    )


def weighed_losses(
    losses: Sequence[Mapping[str, Any]], weights: Sequence[float], *, exclusive: bool
) -> list[dict[str, Any]]:
    """Return the entries of a target's losses with the weights of its classes in those that take them.

    `weight` of a loss of exclusive classes, else `pos_weight`; a value that an entry has already stays.

    Args:
        losses: entries with "name" and "kwargs".
        weights: one per channel.
        exclusive: whether each voxel has one class.
    """
    key = "weight" if exclusive else "pos_weight"
    return [
        {**entry, "kwargs": {key: list(weights), **entry["kwargs"]}}
        if _takes(str(entry["name"]), key)
        else dict(entry)
        for entry in losses
    ]


def _takes(name: str, key: str) -> bool:
    return key in inspect.signature(loss_class(name)).parameters
