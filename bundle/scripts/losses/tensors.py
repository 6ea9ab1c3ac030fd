"""Losses of symmetric tensor fields, computed from their eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from volumen.losses.base import LABEL_KINDS, Loss, probabilities
from volumen.losses.distance import interior
from volumen.losses.masking import as_real, full_mask, full_precision, guard, masked_mean
from volumen.losses.vectors import foreground, gaussian_sum


def tensor_size(dims: int) -> int:
    """Return the channels of a symmetric tensor: 3 in 2D (yy, yx, xx), 6 in 3D (zz, zy, zx, yy, yx, xx)."""
    return dims * (dims + 1) // 2


def to_matrix(x: Tensor, dims: int) -> Tensor:
    """Return symmetric matrices (..., d, d) of upper triangles (..., d (d + 1) / 2), row by row."""
    rows, columns = torch.triu_indices(dims, dims, device=x.device)
    index = torch.empty(dims, dims, dtype=torch.long, device=x.device)
    index[rows, columns] = index[columns, rows] = torch.arange(len(rows), device=x.device)
    return x[..., index]


def eigenvalues(x: Tensor, dims: int) -> Tensor:
    """Return the eigenvalues (..., d), ascending, of upper triangles (..., d (d + 1) / 2).

    The gradient of an eigenvalue is the outer product of its eigenvector, which stays bounded where
    eigenvalues coincide; only gradients of eigenvectors become infinite there.
    """
    return torch.linalg.eigvalsh(to_matrix(x, dims))


def _groups(x: Tensor, dims: int) -> Tensor:
    """Return (B, C, *spatial) as (B, *spatial, C / k, k): one tensor of k channels per group."""
    size = tensor_size(dims)
    if x.shape[1] % size:
        raise ValueError(
            f"a symmetric tensor in {dims}D needs a multiple of {size} channels, got {x.shape[1]}"
        )
    return x.unflatten(1, (-1, size)).movedim((1, 2), (-2, -1))


class EigenvalueLoss(Loss):
    """Mean over valid voxels of sum_i w_i |l_i(pred) - l_i(target)|^power / sum_i w_i, l the eigenvalues.

    It compares the anisotropy and strength of the tensors and not their directions, so it does not change
    directions: use it together with an element-wise loss, which is not sensitive to small eigenvalues. Defined by
    this project.

    Args:
        power: 1 or 2.
        weights: one per eigenvalue, smallest first; None: all 1.
        kind: "tensor".
    """

    kinds = frozenset({"tensor"})
    default_kind = "tensor"

    def __init__(
        self, power: int = 2, weights: Sequence[float] | None = None, *, kind: str | None = None
    ) -> None:
        super().__init__(kind=kind)
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        self.power = power
        self.eigen_weights = None if weights is None else tuple(float(w) for w in weights)

    def forward(
        self, pred: Tensor, target: Tensor, mask: Tensor | None = None, confidence: Tensor | None = None
    ) -> Tensor:
        with full_precision(pred):
            pred, target, mask = self.prepare(pred, target, mask)
            dims = pred.dim() - 2
            weights = pred.new_tensor(self.eigen_weights or (1.0,) * dims)
            if len(weights) != dims:
                raise ValueError(f"{dims}D tensors have {dims} eigenvalues, got weights {self.eigen_weights}")
            gap = eigenvalues(_groups(pred, dims), dims) - eigenvalues(_groups(target, dims), dims)
            cost = (gap.abs() if self.power == 1 else gap**2) @ (weights / weights.sum())
            return masked_mean(cost.movedim(-1, 1), mask, confidence)


class PlanarityLoss(Loss):
    """Penalise structures that are not sheets: weighted mean of 1 - (l1 - l2) / l1 of the two largest eigenvalues.

    For kind "tensor" these are eigenvalues of the predicted tensors, weighted by the source target's predicted
    foreground probability (without gradient). For label kinds they belong to the structure tensor of the predicted
    foreground probability (outer products of its central differences under a Gaussian), weighted by the tensor's trace
    (without gradient), since a surface that could be flat exists only where the probability changes. In 2D the
    sheet is a line. The planarity of Westin et al. 2002, there c_p for diffusion tensors with the order of
    eigenvalues reversed; negative ones count as 0. It uses no target.

    Args:
        sigma: Gaussian of the structure tensor, in voxels; for label kinds.
        eps: added to l1.
        kind: "tensor", "binary", "multilabel" or "multiclass".
        source_kind: kind of the source target.
    """

    kinds = LABEL_KINDS | {"tensor"}
    default_kind = "tensor"

    def __init__(
        self, sigma: float = 2.0, eps: float = 1e-3, *, kind: str | None = None, source_kind: str = "binary"
    ) -> None:
        super().__init__(kind=kind)
        if sigma <= 0 or eps <= 0:
            raise ValueError(f"sigma and eps must be positive, got {sigma} and {eps}")
        self.sigma, self.eps, self.source_kind = sigma, eps, source_kind

    def forward(
        self,
        pred: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        source_pred: Tensor | None = None,
        scale: Sequence[float] | None = None,
        confidence: Tensor | None = None,
    ) -> Tensor:
        with full_precision(pred):
            mask = full_mask(mask, pred)
            pred = guard(as_real(pred), mask)
            dims = pred.dim() - 2
            if self.kind == "tensor":
                tensor = pred
                gate = mask.to(pred.dtype) if confidence is None else guard(confidence.to(pred.dtype), mask)
                if source_pred is not None:
                    gate = gate * guard(foreground(as_real(source_pred.detach()), self.source_kind), mask)
            else:
                sigma = [self.sigma / f for f in scale or (1.0,) * dims]
                tensor, mask = self._structure_tensor(pred, mask, sigma)
                gate = self.strength(tensor, dims)
            values = eigenvalues(_groups(tensor, dims), dims)
            # Predicted tensors may have negative eigenvalues, for which the loss would have no lower bound.
            largest, second = values[..., -1].clamp_min(0), values[..., -2].clamp_min(0)
            flatness = (largest - second) / (largest + self.eps)
            return masked_mean((1 - flatness).movedim(-1, 1), mask, gate)

    def _structure_tensor(self, pred: Tensor, mask: Tensor, sigma: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return tensors (B, C k, *spatial) of the class probabilities, and where they are valid."""
        dims = pred.dim() - 2
        prob = probabilities(pred, self.kind)
        if self.kind == "multiclass":
            prob = prob[:, 1:]
        valid = interior(mask)
        slopes = [guard(self._slope(prob, axis), valid) for axis in range(2, pred.dim())]
        rows, columns = torch.triu_indices(dims, dims)
        products = torch.stack([slopes[r] * slopes[c] for r, c in zip(rows, columns, strict=True)], dim=2)
        smooth = gaussian_sum(torch.cat([products.flatten(1, 2), valid.to(prob.dtype)], dim=1), sigma)
        return smooth[:, :-1] / smooth[:, -1:].clamp_min(1e-6), valid

    @staticmethod
    def _slope(x: Tensor, axis: int) -> Tensor:
        return (torch.roll(x, -1, axis) - torch.roll(x, 1, axis)) / 2

    @staticmethod
    def strength(tensor: Tensor, dims: int) -> Tensor:
        """Return the trace (B, C, *spatial) of each tensor, without gradient."""
        rows, columns = torch.triu_indices(dims, dims)
        return tensor.unflatten(1, (-1, tensor_size(dims)))[:, :, rows == columns].sum(dim=2).detach()
