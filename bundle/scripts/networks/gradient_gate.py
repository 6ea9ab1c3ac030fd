"""Combines the gradients of several branches where they meet, so that auxiliary ones do not oppose the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from volumen.utils import distributed

METHODS = ("projection", "cosine")


class GradientGate:
    """Limits the gradients that auxiliary branches send into shared features.

    One backward pass delivers the gradient of every branch with respect to the features that the branches share. Let p
    be the sum of the gradients of the branches that contain a labelled target, and a that of an auxiliary branch. The
    shared features receive p and, for each auxiliary branch,

    - "projection": a' = a where <a, p> >= 0, else a - <a, p> / |p|^2 p (Yu et al. 2020, arXiv:2001.06782, applied to
      auxiliary targets alone), shortened to the length of p where it is longer. The limit on the length is an addition:
      without it a target of large values overwhelms p by what is orthogonal to it;
    - "cosine": max(0, cos(a, p)) a (Du et al. 2018, arXiv:1812.02224, weighted version).

    Inner products are sums over the batch, the channels and the voxels of one level of the features, and over the
    processes of a distributed training, in float32. The resulting factors apply to all levels. The branches themselves
    (decoders and heads) receive their whole gradient. A common factor of all gradients, such as that of a gradient
    scaler, changes nothing. Where p is zero, a is left out; gradients that are not finite pass unchanged, so that a
    gradient scaler notices them.

    Args:
        auxiliary: names of the targets whose gradients are limited.
        method: "projection" or "cosine".

    Attributes:
        cosines: cos(a, p) of the last backward pass for each auxiliary target, as scalars without graph; the targets
            of one branch have the same value. 0 where it is undefined.

    Raises:
        ValueError: the method is unknown.
    """

    def __init__(self, auxiliary: Collection[str], method: str = "projection") -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.auxiliary = frozenset(auxiliary)
        self.method = method
        self.cosines: dict[str, Tensor] = {}

    @torch.compiler.disable
    def fork(
        self, features: Sequence[Tensor], branches: Sequence[Collection[str]], deciding: int
    ) -> list[list[Tensor]]:
        """Return the same features for each branch; their gradients meet here.

        Args:
            features: maps (B, C, *spatial), one per level.
            branches: the targets of each branch.
            deciding: the level whose gradients are compared, an index of `features`.
        """
        helping = [self.auxiliary.issuperset(targets) for targets in branches]
        if not torch.is_grad_enabled() or all(helping) or not any(helping):
            return [list(features) for _ in branches]
        plan = _Plan(self, tuple(tuple(targets) for targets in branches), helping, deciding % len(features))
        copies = _Meet.apply(plan, *features)
        levels = len(features)
        return [list(copies[start : start + levels]) for start in range(0, len(copies), levels)]

    def factors(self, helping: Sequence[bool], gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the factor of each branch's gradient, and its cosine with p: (2, branches) float32.

        Args:
            helping: whether each branch is auxiliary.
            gradients: the gradient of each branch at the deciding level; None means zero.
        """
        known = next(gradient for gradient in gradients if gradient is not None)
        flat = [_flat(known.new_zeros(()).expand_as(known) if g is None else g) for g in gradients]
        main = sum((g for g, helps in zip(flat, helping) if not helps), start=torch.zeros_like(flat[0]))
        inner = torch.stack([main @ main, *(main @ g for g in flat), *(g @ g for g in flat)])
        if distributed.is_distributed():
            torch.distributed.all_reduce(inner)
        size, dots, squares = inner[0], inner[1 : len(flat) + 1], inner[len(flat) + 1 :]
        aux = torch.tensor(list(helping), device=inner.device)
        finite = torch.isfinite(inner).all()
        cosines = torch.nan_to_num(dots / (size * squares).sqrt(), 0.0, 0.0, 0.0)
        if self.method == "cosine":
            used, removed = cosines.clamp(0, 1), torch.zeros_like(dots)
        else:
            # The part of a along p, in units of p, and the length of the rest, |a'|^2 = |a|^2 - <a, p>^2 / |p|^2.
            along = torch.nan_to_num((-dots / size).clamp_min(0), 0.0, 0.0, 0.0)
            left = (squares - along.square() * size).clamp_min(0)
            used = torch.nan_to_num((size / left).sqrt(), 0.0, 1.0).clamp_max(1)
            removed = used * along
        own = 1 + (removed * aux).sum()
        factors = torch.where(aux, used, own)
        return torch.stack([torch.where(finite, factors, 1.0), torch.where(finite, cosines, 0.0)])


def _flat(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(-1)


class _Plan:
    """What the backward pass of `_Meet` needs."""

    def __init__(
        self, gate: GradientGate, branches: tuple[tuple[str, ...], ...], helping: list[bool], deciding: int
    ) -> None:
        self.gate, self.branches, self.helping, self.deciding = gate, branches, helping, deciding


class _Meet(torch.autograd.Function):
    """The identity, once per branch; the backward pass combines the gradients of the branches."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.levels = plan, len(features)
        ctx.set_materialize_grads(False)
        return tuple(level.view_as(level) for _ in plan.branches for level in features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        compared = gradients[plan.deciding :: ctx.levels]
        if all(gradient is None for gradient in compared):
            factors = [1.0] * len(plan.branches)
        else:
            found, cosines = plan.gate.factors(plan.helping, compared)
            for targets, helps, cosine in zip(plan.branches, plan.helping, cosines):
                if helps:
                    plan.gate.cosines.update(dict.fromkeys(targets, cosine))
            factors = list(found)
        return None, *(_weighted(gradients[level :: ctx.levels], factors) for level in range(ctx.levels))


def _weighted(gradients: Sequence[Tensor | None], factors: Sequence[Any]) -> Tensor | None:
    total: Tensor | None = None
    for gradient, factor in zip(gradients, factors):
        if gradient is not None:
            scaled = gradient * factor
            total = scaled if total is None else total.add_(scaled)
    return total
