"""A loss that weights errors by their distance from the true surface."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from volumen.losses.base import ClassLoss
from volumen.losses.masking import full_precision, masked_mean


def surface_distance(
    inside: np.ndarray, valid: np.ndarray, spacing: Sequence[float], reach: float
) -> np.ndarray:
    """Return the distance of each voxel to the nearest valid voxel on the other side, cut at `reach`.

    Args:
        inside: bool, spatial.
        valid: bool; an invalid voxel is on neither side.
        spacing: voxel size in spatial order.
        reach: largest value, also used if no voxel of the other side is valid.
    """
    import edt

    distance = np.empty(inside.shape, dtype=np.float32)
    for side in (inside, ~inside):
        other = valid & ~side
        # edt measures to the nearest zero; without any zero it would measure to the border, which is no surface.
        to_other = edt.edt(~other, anisotropy=tuple(spacing)) if other.any() else np.float32(np.inf)
        distance[side] = np.broadcast_to(to_other, inside.shape)[side]
    return np.minimum(distance, reach)


class BoundaryLoss(ClassLoss):
    """Mean over valid voxels and classes of |p - t| min(d, reach) / reach, d the distance to the surface.

    Kervadec et al. 2019: sum of p * phi with phi the signed distance of the truth. Here the part of phi that
    does not depend on p is added, which does not change the gradient and makes the loss 0 at the truth; and phi
    is cut and scaled by its reach, so that a patch without the class costs its mean probability. Use it
    together with an overlap loss. Invalid voxels form no surface. The distance is computed on the CPU at each call,
    with `edt`.

    Args:
        reach: distance beyond which all errors have the same weight, in units of `spacing`.
        include_background: count class 0 of a "multiclass" target too.
        spacing: voxel size in spatial order; None is 1.
        kind: "binary", "multilabel" or "multiclass".
    """

    def __init__(
        self,
        reach: float = 10.0,
        include_background: bool = False,
        spacing: Sequence[float] | None = None,
        *,
        kind: str | None = None,
    ) -> None:
        super().__init__(include_background or None, kind=kind)
        if reach <= 0:
            raise ValueError(f"reach must be positive, got {reach}")
        self.reach = reach
        self.spacing = None if spacing is None else tuple(float(s) for s in spacing)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        scale: Sequence[float] | None = None,
    ) -> Tensor:
        with full_precision(pred):
            prob, target, mask = self.prepare(pred, target, mask)
            error = torch.where(target > 0.5, 1 - prob, prob)
            return masked_mean(error * self._weights(target, mask, scale), mask)

    def _weights(self, target: Tensor, mask: Tensor, scale: Sequence[float] | None) -> Tensor:
        ones = (1.0,) * (target.dim() - 2)
        step = [s * f for s, f in zip(self.spacing or ones, scale or ones, strict=True)]
        inside, valid = (target > 0.5).cpu().numpy(), mask[:, 0].cpu().numpy()
        maps = [
            [surface_distance(channel, valid[i], step, self.reach) for channel in sample]
            for i, sample in enumerate(inside)
        ]
        return torch.from_numpy(np.asarray(maps)).to(target) / self.reach
