"""Losses of distance fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import Loss, weighted
from volumen.losses.masking import full_mask, full_precision, guard, masked_mean

# The eikonal term applies where the norm of the target's own gradient differs from 1 by at most this.
EIKONAL_TOLERANCE = 0.25


def central_gradient_squared(x: Tensor, spacing: Sequence[float]) -> Tensor:
    """Return |grad x|^2 by central differences (B, C, *spatial); the slope across the border counts as 0."""
    total = torch.zeros_like(x)
    for axis, step in enumerate(spacing, start=2):
        size = x.shape[axis]
        if size < 3:
            continue
        slope = (x.narrow(axis, 2, size - 2) - x.narrow(axis, 0, size - 2)) / (2 * step)
        total = total + F.pad(slope**2, _one_at_each_end(axis, x.dim()))
    return total


def interior(mask: Tensor) -> Tensor:
    """Return the voxels of the mask (B, C, *spatial) whose neighbours along every axis are in the mask too."""
    inner = mask
    for axis in range(2, mask.dim()):
        size = mask.shape[axis]
        if size < 3:
            continue
        both = mask.narrow(axis, 2, size - 2) & mask.narrow(axis, 0, size - 2)
        inner = inner & F.pad(both, _one_at_each_end(axis, mask.dim()))
    return inner


def _one_at_each_end(axis: int, dims: int) -> list[int]:
    """Return the argument of F.pad that adds one element at each end of an axis."""
    pads = [0] * (2 * dims)
    pads[2 * (dims - 1 - axis)] = pads[2 * (dims - 1 - axis) + 1] = 1
    return pads


class SignedDistanceLoss(Loss):
    """Huber loss of a signed distance with more weight near the surface, and optionally the eikonal equation.

    L = sum(w h) / sum(w) + eikonal_weight * mean((|grad pred| - 1)^2), where h is the Huber (smooth L1) loss
    of pred - target with threshold beta, and w = far_weight + (1 - far_weight) * max(0, 1 - |target| / rho).

    Users of a distance field read its zero level, so voxels within rho of it must not be outweighed by the
    many far ones; the weight falls linearly, so no step of w creates a false contour. Beyond rho a small weight
    remains, without which the far field is arbitrary and new zero crossings appear in it. Huber's loss (1964) is used,
    since the target is cut at its reach and wrong labels cause large outliers.

    A distance has a gradient of norm 1 (Gropp et al. 2020), except on its ridges and where it is cut at its
    reach. So the eikonal term applies where the voxel and its neighbours on every axis have an exact target whose own
    gradient has a norm within 0.25 of 1. Gradients are central differences. Between bounds (informed validity), target
    is the value between them that is nearest to pred.

    Args:
        rho: half-width of the band with more weight, in units of the target.
        beta: Huber threshold, in units of the target.
        eikonal: add the eikonal term.
        eikonal_weight: its weight.
        far_weight: weight of a voxel farther than rho; the weight on the surface is 1.
        spacing: voxel size in spatial order (Z, Y, X), in units of the target; None is 1.
        kind: "distance".
    """

    kinds = frozenset({"distance"})
    default_kind = "distance"

    def __init__(
        self,
        rho: float = 4.0,
        beta: float = 1.0,
        eikonal: bool = False,
        eikonal_weight: float = 0.01,
        far_weight: float = 0.1,
        spacing: Sequence[float] | None = None,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(kind=kind)
        if rho <= 0 or beta < 0 or not 0 <= far_weight <= 1:
            raise ValueError(
                f"rho > 0, beta >= 0 and 0 <= far_weight <= 1 wanted, got {rho}, {beta} and {far_weight}"
            )
        self.rho, self.beta, self.far_weight = rho, beta, far_weight
        self.eikonal, self.eikonal_weight = eikonal, eikonal_weight
        self.spacing = None if spacing is None else tuple(float(s) for s in spacing)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        scale: Sequence[float] | None = None,
        confidence: Tensor | None = None,
        certain: Tensor | None = None,
    ) -> Tensor:
        with full_precision(pred):
            pred, target, mask = self.prepare(pred, target, full_mask(mask, pred))
            near = (1 - target.abs() / self.rho).clamp_min(0)
            weights = self.far_weight + (1 - self.far_weight) * near
            huber = F.smooth_l1_loss(pred, target, beta=self.beta, reduction="none")
            loss = masked_mean(huber, mask, weighted(weights, confidence))
            if self.eikonal:
                # Between bounds the target follows the prediction, so its gradient is no truth.
                mask = mask if certain is None else mask & certain
                loss = loss + self.eikonal_weight * self._eikonal(pred, target, mask, scale)
            return loss

    def _eikonal(self, pred: Tensor, target: Tensor, mask: Tensor, scale: Sequence[float] | None) -> Tensor:
        dims = pred.dim() - 2
        spacing = self.spacing or (1.0,) * dims
        if len(spacing) != dims:
            raise ValueError(f"spacing must have {dims} entries, got {spacing}")
        step = [s * f for s, f in zip(spacing, scale or (1.0,) * dims, strict=True)]
        slope = central_gradient_squared(target, step).sqrt()
        sound = interior(mask.expand_as(pred)) & ((slope - 1).abs() <= EIKONAL_TOLERANCE)
        squared = guard(central_gradient_squared(pred, step), sound, 1.0)
        # The root has no slope at 0; a flat prediction must still get a finite gradient.
        return masked_mean((squared.clamp_min(1e-12).sqrt() - 1) ** 2, sound)
