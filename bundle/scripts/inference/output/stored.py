"""Defines how a head's result is stored: type, range of values, labels, and computation of coarser levels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from volumen.inference.windows.heads import Head

if TYPE_CHECKING:
    from volumen.inference.rules import InstanceRules

DTYPES = ("uint8", "float16", "float32", "labels")


@dataclass(frozen=True)
class OutputSpec:
    """How a head's result is stored.

    Probabilities become uint8 (255 is 1), float16, float32, or labels: the class of highest probability after a
    softmax, 0 or 1 by the threshold after a sigmoid, of regions the value of the last one above it. Other results have
    signs and units; they are float32 if float32 is requested, else float16.

    Args:
        head: the network's output.
        kind: uint8, float16, float32 or labels.
        threshold: smallest probability at which a sigmoid's label is 1.
    """

    head: Head
    kind: str = "uint8"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.kind!r}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")

    @property
    def is_labels(self) -> bool:
        return self.kind == "labels" and self.head.is_probability

    @property
    def dtype(self) -> np.dtype:
        if self.head.is_probability:
            return np.dtype("uint8" if self.kind == "labels" else self.kind)
        return np.dtype("float32" if self.kind == "float32" else "float16")

    @property
    def channels(self) -> int:
        """Stored channels: classes of a softmax, and regions, become one label map."""
        return 1 if self.is_labels and self.head.has_classes else self.head.channels

    @property
    def empty(self) -> float:
        """The value of voxels for which nothing is predicted."""
        return 0

    def of_blend(self, blended: Tensor) -> np.ndarray:
        """Turn blended values (head.blended_channels, *block) into what is stored (channels, *block)."""
        decoded = self.head.decode(blended)
        if self.is_labels or self.dtype != np.uint8:
            return self.convert(decoded.cpu().numpy())
        # Converted where it lies, so that a quarter of the bytes leave a GPU.
        return (decoded * 255).round_().to(torch.uint8).cpu().numpy()

    def convert(self, result: np.ndarray) -> np.ndarray:
        """Convert a decoded result (head.channels, *block) to stored values (channels, *block)."""
        if self.is_labels:
            if self.head.activation == "softmax":
                return result.argmax(axis=0)[None].astype(np.uint8)
            if self.head.values:
                return self._regions(result)
            return (result >= self.threshold).astype(np.uint8)
        if self.dtype == np.uint8:
            return np.rint(result * 255).astype(np.uint8)
        if self.dtype == np.float16:
            limit = np.finfo(np.float16).max
            return np.clip(result, -limit, limit).astype(np.float16)
        return result.astype(np.float32, copy=False)

    def _regions(self, result: np.ndarray) -> np.ndarray:
        """Return the label map of overlapping regions: later ones lie over earlier ones."""
        labels = np.zeros((1, *result.shape[1:]), np.uint8)
        for channel, value in zip(result, self.head.values, strict=True):
            labels[0][channel >= self.threshold] = value
        return labels

    def coarser(self, values: np.ndarray, factors: tuple[int, ...]) -> np.ndarray:
        """Return a coarser version of stored values for the next level of a pyramid.

        A coarse label is the most frequent value of its cell (if several are, the first of them in the cell). Other
        values are the cell's mean; mean vectors are normalised to length 1.

        Args:
            values: stored values, shape (channels, *space); sides need not be divisible.
            factors: 1 or 2 per spatial axis.
        """
        if self.is_labels:
            return most_frequent(values, factors)
        mean = values
        for axis, factor in enumerate(factors, start=1):
            if factor == 2:
                mean = _halve(mean, axis)
        mean = mean.astype(np.float32, copy=False)
        if self.head.kind in ("vector", "axis"):
            mean = mean / np.maximum(np.sqrt((mean**2).sum(axis=0, keepdims=True)), 1e-12)
        return np.rint(mean).astype(np.uint8) if self.dtype == np.uint8 else mean.astype(self.dtype)


@dataclass(frozen=True)
class StoredBlend(OutputSpec):
    """Blended values before the activation, float32, NaN for nothing predicted: they can be interpolated."""

    kind: str = "float32"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("float32")

    @property
    def channels(self) -> int:
        return self.head.blended_channels

    @property
    def empty(self) -> float:
        return np.nan

    def of_blend(self, blended: Tensor) -> np.ndarray:
        return blended.cpu().numpy()


@dataclass(frozen=True)
class InstanceSpec(OutputSpec):
    """How instance numbers are stored: uint32, 0 for none; a coarse voxel has the most frequent number of its cell."""

    @property
    def is_labels(self) -> bool:
        return True

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("uint32")


def instance_specs(rules: InstanceRules | None) -> tuple[OutputSpec, ...]:
    """Return how instances are stored; empty if none are requested."""
    if rules is None:
        return ()
    return (InstanceSpec(Head(rules.name, 1, "none", "instances")),)


def most_frequent(values: np.ndarray, factors: tuple[int, ...]) -> np.ndarray:
    """Return the most frequent value of every cell; if several are, the first of them in the cell.

    Args:
        values: integers, shape (channels, *space); an incomplete last cell counts only its voxels.
        factors: 1 or 2 per spatial axis.
    """
    padding = [(0, 0), *((0, -size % f) for size, f in zip(values.shape[1:], factors, strict=True))]
    if any(after for _, after in padding):
        # Repeats every voxel of a cut cell once, which does not change the shares.
        values = np.pad(values, padding, mode="edge")
    parts = [
        values[(slice(None), *(slice(start, None, f) for start, f in zip(corner, factors, strict=True)))]
        for corner in itertools.product(*(range(f) for f in factors))
    ]
    votes = np.ones((len(parts), *parts[0].shape), np.uint8)
    for first, second in itertools.combinations(range(len(parts)), 2):
        same = parts[first] == parts[second]
        votes[first] += same
        votes[second] += same
    result, most = parts[0].copy(), votes[0]
    for part, count in zip(parts[1:], votes[1:], strict=True):
        better = count > most
        result[better] = part[better]
        most = np.maximum(most, count)
    return result


def _halve(values: np.ndarray, axis: int) -> np.ndarray:
    size = values.shape[axis]
    if size % 2:
        last = np.take(values, [size - 1], axis=axis)
        values = np.concatenate([values, last], axis=axis)
    even = values[(slice(None),) * axis + (slice(0, None, 2),)]
    odd = values[(slice(None),) * axis + (slice(1, None, 2),)]
    # The addition converts to float32 itself, which avoids a float32 copy of the finer level.
    mean = np.add(even, odd, dtype=np.float32)
    mean *= 0.5
    return mean
