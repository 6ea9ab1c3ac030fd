"""Losses of derived targets of which only a part is known: bounds, a confidence, or all but one direction.

A loss that depends on the target of a voxel through this voxel alone needs no code for bounds: of all values that agree
with what is known, it gets the one nearest the prediction. It is zero, with zero gradient, while the prediction agrees,
and else counts from the nearest end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from volumen.losses.base import DIRECTION_KINDS
from volumen.losses.deep_supervision import block_size, mean_axis, pick_middle, pool_all, pool_mean
from volumen.losses.masking import guard


@dataclass(frozen=True)
class Knowledge:
    """What is known of a derived target, see `volumen.derived.informed.Informed`.

    Attributes:
        target: (B, C, *spatial), the lower bound if there is an upper one.
        confidence: (B, 1, *spatial) in [0, 1], the weight of a voxel.
        upper: (B, C, *spatial) or None.
        free: (B, D, *spatial) or None.
    """

    target: Tensor
    confidence: Tensor
    upper: Tensor | None = None
    free: Tensor | None = None

    def nearest(self, pred: Tensor, kind: str) -> Tensor:
        """Return the value nearest the prediction among those that agree with what is known, without gradient."""
        target = self.target
        if self.upper is not None:
            return torch.minimum(torch.maximum(pred.detach(), target), self.upper)
        if self.free is None:
            return target
        known = (self.free != 0).any(dim=1, keepdim=True)
        agree = across if kind == "vector" else in_plane
        return torch.where(known, agree(pred.detach(), target, self.free), target)

    def at(self, size: tuple[int, ...], kind: str, interpolation: str) -> Knowledge:
        """Return this at the size of a coarser output.

        The mean of a distance over a block lies between the means of its bounds; the block counts if all of its
        voxels do. Other targets are averaged with their confidence as weights.
        """
        full = tuple(self.target.shape[2:])
        if full == tuple(size):
            return self
        factor = block_size(full, tuple(size))
        if interpolation == "nearest":
            upper, free = (None if x is None else pick_middle(x, factor) for x in (self.upper, self.free))
            return Knowledge(
                pick_middle(self.target, factor), pick_middle(self.confidence, factor), upper, free
            )
        if self.upper is not None:
            counts = pool_all(self.confidence > 0, factor)
            lower, upper = (guard(pool_mean(x, factor), counts) for x in (self.target, self.upper))
            return Knowledge(lower, counts.to(lower.dtype), upper)
        return self._weighted_mean(factor, kind)

    def _weighted_mean(self, factor: tuple[int, ...], kind: str) -> Knowledge:
        confidence = pool_mean(self.confidence, factor)
        some = confidence > 0
        share = torch.where(some, confidence, 1.0)
        if kind in DIRECTION_KINDS:
            if kind == "axis":
                mean = mean_axis(self.target, factor, self.confidence)
            else:
                mean = pool_mean(self.target * self.confidence, factor)
            length = (mean * mean).sum(dim=1, keepdim=True).sqrt()
            value = mean / length.clamp_min(1e-6)
            # Directions that cancel within a block say nothing.
            confidence = (
                torch.minimum(length, confidence) if kind == "vector" else confidence * (length > 1e-2)
            )
        else:
            value = pool_mean(self.target * self.confidence, factor) / share
        free = None
        if self.free is not None:
            free = pool_mean(self.free * self.confidence, factor) / share
            length = (free * free).sum(dim=1, keepdim=True).sqrt()
            free = guard(free / length.clamp_min(1e-6), length > 0.5)
        return Knowledge(guard(value, some), confidence, None, free)


def across(pred: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """Return the unit vector nearest the prediction among those whose part across `free` points along `target`.

    Args:
        pred: (B, D, *spatial), order (x, y[, z]).
        target: unit vectors perpendicular to `free`.
        free: unit vectors.
    """
    along = (pred * target).sum(dim=1, keepdim=True).clamp_min(0)
    rest = (pred * free).sum(dim=1, keepdim=True)
    # A prediction that points the opposite way is nearest the free direction itself; both are a wrong answer.
    along = torch.where(along > 0, along, torch.ones_like(along))
    rest = torch.where((pred * target).sum(dim=1, keepdim=True) > 0, rest, torch.zeros_like(rest))
    nearest = along * target + rest * free
    return nearest / (nearest * nearest).sum(dim=1, keepdim=True).clamp_min(1e-12).sqrt()


def in_plane(pred: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """Return the symmetric tensor nearest the prediction whose part across `free` is a share of `target`.

    A surface that is seen in a plane alone has in it a gradient of 1; in space the plane holds only a part of it. So
    the part within the plane is a x target with 0 <= a <= 1, and all else is as predicted.

    Args:
        pred, target: (B, 3 or 6, *spatial), order (yy, yx, xx) or (zz, zy, zx, yy, yx, xx).
        free: unit vectors (B, D, *spatial), order (x, y[, z]).
    """
    dims = free.shape[1]
    rows, columns = torch.triu_indices(dims, dims, device=pred.device)
    direction = free.flip(1)
    twice = torch.where(rows == columns, 1.0, 2.0).to(pred.dtype).view(1, -1, *[1] * dims)
    # P A P with P = 1 - f f^T is A - f (A f)^T - (A f) f^T + (f^T A f) f f^T.
    product = torch.zeros_like(direction)
    for entry, (i, j) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        product[:, i] += pred[:, entry] * direction[:, j]
        if i != j:
            product[:, j] += pred[:, entry] * direction[:, i]
    both = (product * direction).sum(dim=1, keepdim=True)
    outside = direction[:, rows] * product[:, columns] + product[:, rows] * direction[:, columns]
    outside = outside - both * direction[:, rows] * direction[:, columns]
    inside = pred - outside
    norm = (twice * target * target).sum(dim=1, keepdim=True)
    share = (twice * inside * target).sum(dim=1, keepdim=True) / norm.clamp_min(1e-12)
    return outside + share.clamp(0, 1) * target
