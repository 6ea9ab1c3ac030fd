"""Losses of direction fields: surface normals (signed) and in-plane directions (without sign)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import DIRECTION_KINDS, Loss, VoxelLoss, direction_groups
from volumen.losses.masking import as_real, full_mask, full_precision, guard, masked_mean, ratio, zero_of


def normalised(x: Tensor, dim: int, eps: float) -> Tensor:
    """Return x / max(|x|, eps) along `dim`, with a finite gradient at 0."""
    return x / (x * x).sum(dim=dim, keepdim=True).clamp_min(eps * eps).sqrt()


class CosineSimilarityLoss(VoxelLoss):
    """1 - cos(pred, target), mean over valid voxels; for kind "axis" 1 - |cos|. It normalises both arguments.

    cos(a, b) = a . b / (|a| |b|), like torch.nn.CosineSimilarity. With more than one vector per voxel (channels
    a multiple of the dimension) each vector counts separately.

    Args:
        dim: channel axis; only 1 is meaningful for (B, C, *spatial).
        eps: lower bound of the length in the division; it bounds the gradient of shorter predictions.
        kind: "vector", "axis", or "field" (then all channels form one vector).
    """

    kinds = DIRECTION_KINDS | {"field"}
    default_kind = "vector"

    def __init__(self, dim: int = 1, eps: float = 1e-6, *, kind: str | None = None) -> None:
        super().__init__(kind=kind)
        if dim != 1:
            raise ValueError(f"dim must be 1, the channel axis, got {dim}")
        self.eps = eps

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.kind == "field":
            pred, target = pred.unsqueeze(1), target.unsqueeze(1)
        else:
            pred, target = direction_groups(pred), direction_groups(target)
        cosine = (normalised(pred, 2, self.eps) * normalised(target, 2, self.eps)).sum(dim=2)
        return 1 - (cosine.abs() if self.kind == "axis" else cosine)


class SignInvariantCosineLoss(CosineSimilarityLoss):
    """1 - |cos(pred, target)|, mean over valid voxels, for every kind: a direction without sign.

    Like `CosineSimilarityLoss` of kind "axis".
    """

    def voxelwise(self, pred: Tensor, target: Tensor) -> Tensor:
        cost = super().voxelwise(pred, target)
        return 1 - (1 - cost).abs()


def gaussian_matrix(size: int, sigma: float, like: Tensor) -> Tensor:
    """Return the (size, size) matrix that filters an axis by a Gaussian cut at 3 sigma and at the border."""
    position = torch.arange(size, device=like.device, dtype=like.dtype)
    offset = position[:, None] - position[None, :]
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    return kernel * (offset.abs() <= max(1.0, round(3 * sigma)))


def gaussian_sum(x: Tensor, sigma: Sequence[float]) -> Tensor:
    """Return the Gaussian-weighted sum of neighbours, per channel; sigma in voxels, one per spatial axis.

    It uses products with banded matrices: depth-wise 3D convolutions are several times slower on a CPU.
    """
    for axis, width in enumerate(sigma, start=2):
        shape, size = x.shape, x.shape[axis]
        matrix = gaussian_matrix(size, width, x)
        after = math.prod(shape[axis + 1 :])
        # Products on views of the contiguous array; moving the axis to the front would copy the array twice.
        rows = x.reshape(-1, size) @ matrix if after == 1 else matrix @ x.reshape(-1, size, after)
        x = rows.reshape(shape)
    return x


class NormalSmoothnessLoss(Loss):
    """Penalise predicted directions that differ from their neighbours: sum(g (1 - n . m)^q) / sum(g).

    n is the prediction normalised to unit length, m = G(g n) / G(g) the mean direction around it under a
    Gaussian G of width sigma, and g the mask times the source target's predicted foreground probability, so
    that only directions on the structure count and the two faces of a gap do not mix. Since n has unit length,
    1 - n . m is half the mean squared difference to the neighbours; m is not normalised, so that the gradient
    stays finite where neighbours cancel. For kind "axis", n . m becomes n' T n with T the mean of the outer products
    n n', which has no sign.

    It uses no target. The gate g carries no gradient; otherwise the source would learn to vanish where normals are
    rough. Defined by this project.

    Args:
        sigma: width of the neighbourhood, in voxels of the full resolution.
        q: exponent, at least 1; 2 penalises sharp changes more than slight curvature.
        eps: lower bound of the length in the division.
        kind: "vector" or "axis".
        source_kind: kind of the source target: softmax foreground for "multiclass", else the largest sigmoid.
    """

    kinds = DIRECTION_KINDS
    default_kind = "vector"

    def __init__(
        self,
        sigma: float = 2.0,
        q: float = 2.0,
        eps: float = 1e-6,
        *,
        kind: str | None = None,
        source_kind: str = "binary",
    ) -> None:
        super().__init__(kind=kind)
        if sigma <= 0 or q < 1:
            raise ValueError(f"sigma must be positive and q at least 1, got {sigma} and {q}")
        self.sigma, self.q, self.eps = sigma, q, eps
        self.source_kind = source_kind

    def forward(
        self,
        pred: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        source_pred: Tensor | None = None,
        source_mask: Tensor | None = None,
        scale: Sequence[float] | None = None,
        confidence: Tensor | None = None,
    ) -> Tensor:
        with full_precision(pred):
            mask = full_mask(mask, pred)
            if source_mask is not None:
                mask = mask & full_mask(source_mask, pred)
            unit = normalised(direction_groups(guard(as_real(pred), mask)), 2, self.eps)
            gate = mask.to(unit.dtype) if confidence is None else guard(confidence.to(unit.dtype), mask)
            if source_pred is not None:
                gate = gate * guard(foreground(as_real(source_pred.detach()), self.source_kind), mask)
            sigma = [self.sigma / f for f in scale or (1.0,) * (pred.dim() - 2)]
            agreement = torch.cat([self._agreement(u, gate, sigma) for u in unit.unbind(1)], dim=1)
            # Rounding can make the agreement exceed 1 by 1e-7, which a fractional power turns into NaN.
            return masked_mean((1 - agreement).clamp_min(0) ** self.q, mask, gate)

    def _agreement(self, unit: Tensor, gate: Tensor, sigma: Sequence[float]) -> Tensor:
        """Return n . m (or n' T n) per voxel, (B, 1, *spatial), for one direction field (B, d, *spatial)."""
        if self.kind == "axis":
            rows, columns = torch.triu_indices(unit.shape[1], unit.shape[1], device=unit.device)
            field = unit[:, rows] * unit[:, columns]
            twice = torch.where(rows == columns, 1.0, 2.0).to(unit.dtype).view(1, -1, *[1] * (unit.dim() - 2))
            weights = twice * field
        else:
            field = weights = unit
        around = gaussian_sum(torch.cat([gate * field, gate], dim=1), sigma)
        mean = around[:, :-1] / around[:, -1:].clamp_min(self.eps)
        return (mean * weights).sum(dim=1, keepdim=True)


def foreground(logits: Tensor, kind: str) -> Tensor:
    """Return the probability (B, 1, *spatial) that a voxel belongs to any class except the background."""
    if kind == "multiclass":
        return 1 - logits.softmax(dim=1)[:, :1]
    return logits.sigmoid().amax(dim=1, keepdim=True)


class NormalGatedRepulsionLoss(Loss):
    """Penalise two surfaces that face each other across a gap and both extend into it.

    For steps s = min_distance..max_distance along each voxel's outward normal n: L = sum_s sum_x g p(x) p(x +
    s n) / sum_s sum_x g, p the source target's predicted foreground probability and g = max(0, -n(x) . n(x +
    s n)) the gate: a path outward from a sheet meets opposite normals on the next sheet, and never on the same
    sheet. So merged sheets are separated and the thickness of a single sheet does not change. For kind "axis"
    "outward" is not defined: both directions are used and g = (n . n')^2. Defined by this project.

    The normals are those of the target (they are exact, and turning normals cannot lower the loss); p = sigmoid or
    softmax foreground of `source_pred`, which alone gets a gradient. Values between voxels are interpolated linearly;
    x + s n must be inside the patch and surrounded by valid voxels.

    Args:
        min_distance: first step, in voxels.
        max_distance: last step, in voxels.
        kind: "vector" or "axis".
        source_kind: kind of the source target.
    """

    kinds = DIRECTION_KINDS
    default_kind = "vector"

    def __init__(
        self,
        min_distance: int = 1,
        max_distance: int = 3,
        *,
        kind: str | None = None,
        source_kind: str = "binary",
    ) -> None:
        super().__init__(kind=kind)
        if not 0 < min_distance <= max_distance:
            raise ValueError(
                f"0 < min_distance <= max_distance wanted, got {min_distance} and {max_distance}"
            )
        self.steps = [float(s) for s in range(min_distance, max_distance + 1)]
        self.source_kind = source_kind

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        source_pred: Tensor | None = None,
        source_mask: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> Tensor:
        if source_pred is None:
            raise ValueError("NormalGatedRepulsionLoss needs source_pred: give its target a source_target")
        with full_precision(pred):
            pred, target, mask = self.prepare(pred, target, mask)
            if source_mask is not None:
                mask = mask & full_mask(source_mask, pred)
            source = guard(as_real(source_pred), mask)
            prob = guard(foreground(source, self.source_kind), mask)
            signs = (1.0, -1.0) if self.kind == "axis" else (1.0,)
            total, weight = zero_of(pred), pred.new_zeros(())
            for unit in normalised(direction_groups(guard(target, mask)), 2, 1e-6).unbind(1):
                for step in [sign * s for sign in signs for s in self.steps]:
                    cost, gate = self._pairs(prob, unit, mask, step, confidence)
                    total, weight = total + cost, weight + gate
            return ratio(total, weight)

    def _pairs(
        self, prob: Tensor, unit: Tensor, mask: Tensor, step: float, confidence: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of gate * p * p' and of the gate over all pairs one step apart."""
        fields = torch.cat([prob, mask.to(prob.dtype), unit], dim=1)
        there = sample_at(fields, unit * step)
        prob_there, known_there, unit_there = there[:, :1], there[:, 1:2], there[:, 2:]
        agreement = (unit * unit_there).sum(dim=1, keepdim=True)
        gate = agreement**2 if self.kind == "axis" else (-agreement).clamp_min(0)
        gate = guard(gate if confidence is None else gate * confidence, mask & (known_there > 0.999))
        return (gate * prob * prob_there).sum(), gate.sum()


def sample_at(fields: Tensor, offset: Tensor) -> Tensor:
    """Return `fields` (B, C, *spatial) at each voxel plus `offset` (B, d, *spatial), linear, 0 outside.

    The offset is in voxels and in vector order (x, y[, z]), as grid_sample requires.
    """
    size = fields.shape[2:]
    axes = [torch.arange(n, device=fields.device, dtype=fields.dtype) for n in size]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1]) + offset
    extent = fields.new_tensor(size[::-1]).view(1, -1, *[1] * len(size))
    grid = (2 * position + 1) / extent - 1
    return F.grid_sample(
        fields, grid.movedim(1, -1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
