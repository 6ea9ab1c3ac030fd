"""Defines the outputs of a head: how its windows are blended, and how blended values are converted to results.

Logits are blended before the activation, as in nnU-Net: the mean of logits is the logarithm of a geometric mean of
odds, in which a certain window outweighs an uncertain one.
Vectors are normalised to length 1 in every window (the network's length is arbitrary), averaged, and normalised again.
Directions without sign are averaged as outer products; the result is their principal axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from volumen.derived.batches.axes import largest_axis
from volumen.derived.channel_layout import ChannelLayout

PROBABILITIES = ("binary", "multiclass", "multilabel")
ACTIVATIONS = ("sigmoid", "softmax", "none")
KINDS = (*PROBABILITIES, "distance", "vector", "axis", "tensor", "field", "instances")


@dataclass(frozen=True)
class Head:
    """One output of the network.

    Args:
        name: the target.
        channels: channels of the network's output.
        activation: sigmoid, softmax or none.
        kind: binary, multiclass, multilabel, distance, vector, axis, tensor or field.
        layout: how the channels change when the image is turned, or None if that is unknown.
        values: label value of each channel if the channels are regions of one label map, later ones over earlier ones;
            empty if each channel is a label map.
    """

    name: str
    channels: int
    activation: str = "sigmoid"
    kind: str = "binary"
    layout: ChannelLayout | None = None
    values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")

    @property
    def is_probability(self) -> bool:
        return self.activation != "none"

    @property
    def has_classes(self) -> bool:
        """Whether its label map holds classes, which exclude each other."""
        return self.activation == "softmax" or bool(self.values)

    @property
    def blended_channels(self) -> int:
        """Channels that are accumulated: an axis is blended as its outer product."""
        if self.kind == "axis":
            return self.channels * (self.channels + 1) // 2
        return self.channels

    def encode(self, output: Tensor) -> Tensor:
        """Convert a window's output (B, channels, *patch) to the values that are averaged, float32."""
        output = output.float()
        if self.kind == "vector":
            return unit(output, dim=1)
        if self.kind == "axis":
            return outer(unit(output, dim=1))
        return output

    def decode(self, blended: Tensor) -> Tensor:
        """Convert averaged values (blended_channels, *space) to the result (channels, *space), float32."""
        if self.activation == "sigmoid":
            return torch.sigmoid(blended)
        if self.activation == "softmax":
            return torch.softmax(blended, dim=0)
        if self.kind == "vector":
            return unit(blended, dim=0)
        if self.kind == "axis":
            return principal_axis(blended, self.channels)
        return blended


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Return vectors of length 1 along a dimension; a zero vector stays zero."""
    return torch.nn.functional.normalize(vectors, dim=dim, eps=1e-12)


def outer(vectors: Tensor) -> Tensor:
    """Return the upper triangle of v v^T by rows: (B, n, *s) -> (B, n (n + 1) / 2, *s)."""
    n = vectors.shape[1]
    return torch.stack([vectors[:, i] * vectors[:, j] for i in range(n) for j in range(i, n)], dim=1)


def principal_axis(products: Tensor, n: int) -> Tensor:
    """Return the unit eigenvector of the largest eigenvalue of averaged outer products.

    The sign has no meaning; it is chosen such that the component of largest size is positive.

    Args:
        products: upper triangles by rows, components (x, y[, z]), shape (n (n + 1) / 2, *space).
        n: components of the direction, 2 or 3.

    Returns:
        Directions of shape (n, *space); zero where all products are zero or the largest eigenvalue is not unique.
    """
    # Reorders the triangle of (x, y, z) to that of (z, y, x).
    order = (2, 1, 0) if n == 2 else (5, 4, 2, 3, 1, 0)
    axis = largest_axis(products[list(order)][None])[0][0]
    largest = axis.abs().argmax(dim=0, keepdim=True)
    return axis * torch.where(torch.gather(axis, 0, largest) < 0, -1.0, 1.0)


def encode_all(heads: Sequence[Head], outputs: Mapping[str, Any]) -> Tensor:
    """Concatenate the encoded outputs of all heads on the channel axis: (B, sum of blended, *patch)."""
    encoded = [head.encode(outputs[head.name]) for head in heads]
    return encoded[0] if len(encoded) == 1 else torch.cat(encoded, dim=1)


def split_channels(heads: Sequence[Head], blended: Tensor) -> dict[str, Tensor]:
    """Split concatenated channels (sum of blended, *space) into one tensor per head, not yet decoded."""
    parts = torch.split(blended, [head.blended_channels for head in heads], dim=0)
    return {head.name: part for head, part in zip(heads, parts, strict=True)}
