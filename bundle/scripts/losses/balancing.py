"""Weights the targets against each other: fixed, by learned uncertainty, or by their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from volumen.losses.base import LABEL_KINDS
from volumen.losses.masking import global_sum, synchronised
from volumen.utils.errors import VolumenError


class FixedBalancing(nn.Module):
    """total = sum of weight * loss.

    Args:
        kinds: target -> kind.
        weights: target -> weight.
    """

    def __init__(self, kinds: Mapping[str, str], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def forward(
        self, values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and the factors for the log.

        Args:
            values: target -> scalar loss.
            present: target -> bool scalar, False where no voxel of the batch is valid; absent means True.
        """
        terms = [self.weights[name] * value for name, value in values.items()]
        return torch.stack(terms).sum(), {}


class UncertaintyBalancing(nn.Module):
    """Weights by the learned uncertainty of each target, Kendall, Gal and Cipolla 2018.

    total = sum of weight * (exp(-s) L + s / 2) for label targets and weight * (exp(-s) L / 2 + s / 2) for
    regression, s = log sigma^2 a parameter per target. Its minimum is at exp(s) = 2 L, or exp(s) = L for
    regression: there each target contributes the same exp(-s) L, whatever the scale of its loss. Pass the
    parameters of the loss to the optimizer, without weight decay. A target without a valid voxel in the batch
    does not change its s.

    Args:
        kinds: target -> kind.
        weights: target -> the user's weight.
    """

    def __init__(self, kinds: Mapping[str, str], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.halved = {name: 1.0 if kind in LABEL_KINDS else 0.5 for name, kind in kinds.items()}
        self.log_variances = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in kinds])

    def forward(
        self, values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms, factors = [], {}
        for s, (name, value) in zip(self.log_variances, values.items(), strict=True):
            factors[name] = self.weights[name] * self.halved[name] * torch.exp(-s)
            term = factors[name] * value + 0.5 * self.weights[name] * s
            seen = (
                global_sum(present[name].to(value.dtype)) > 0 if name in present else torch.ones_like(s) > 0
            )
            # All ranks have equal values and equal s, so the average of their gradients equals each of them.
            terms.append(torch.where(seen, term, value))
        return torch.stack(terms).sum(), factors


class GradNormBalancing(nn.Module):
    """Weights that give every target an equal, or rate-adjusted, gradient on shared parameters.

    GradNorm, Chen et al. 2018: with g_t = |grad of L_t on the shared parameters| and r_t the target's inverse
    training rate (L_t / L_t at the start, divided by its mean), the factors f_t should make f_t g_t
    proportional to r_t^alpha, with mean 1. Chen et al. reach this by gradient steps on f. Here the solution
    f_t ~ r_t^alpha / g_t is computed directly and averaged over steps in the log domain, with weight `momentum` on
    the past: this needs no second optimizer and no tuning. The factors are buffers, so checkpoints store them. The
    user's weights multiply them.

    `set_shared_parameters` must name parameters that every target depends on (usually the last stage of the shared
    encoder). Each update costs one partial backward pass per target.

    Args:
        kinds: target -> kind.
        weights: target -> the user's weight.
        alpha: strength with which slow targets are favoured; 0 equalises the gradients.
        momentum: weight of the past, 0 to 1.
        interval: steps between updates.
    """

    log_factors: Tensor
    initial: Tensor
    step: Tensor

    def __init__(
        self,
        kinds: Mapping[str, str],
        weights: Mapping[str, float],
        alpha: float = 0.5,
        momentum: float = 0.9,
        interval: int = 1,
    ) -> None:
        super().__init__()
        if alpha < 0 or not 0 <= momentum < 1 or interval < 1:
            raise ValueError(
                f"alpha >= 0, 0 <= momentum < 1, interval >= 1 wanted, got {alpha}, {momentum}, {interval}"
            )
        self.weights = dict(weights)
        self.alpha, self.momentum, self.interval = alpha, momentum, interval
        self._shared: list[nn.Parameter] = []
        self.register_buffer("log_factors", torch.zeros(len(kinds)))
        self.register_buffer("initial", torch.full((len(kinds),), torch.nan))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def set_shared_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Set the parameters on which the gradients are compared."""
        self._shared = [p for p in parameters if p.requires_grad]
        if not self._shared:
            raise ValueError("gradient-norm balancing needs at least one shared parameter that is trained")

    def forward(
        self, values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training and torch.is_grad_enabled():
            if int(self.step) % self.interval == 0:
                self._update(values)
            self.step += 1
        factors = self.log_factors.exp()
        terms, logged = [], {}
        for factor, (name, value) in zip(factors, values.items(), strict=True):
            logged[name] = self.weights[name] * factor
            terms.append(logged[name] * value)
        return torch.stack(terms).sum(), logged

    def _update(self, values: Mapping[str, Tensor]) -> None:
        if not self._shared:
            raise VolumenError(
                "tr_config.loss_balancing",
                "gradnorm was given no shared parameters",
                remedy="call set_shared_parameters with the last stage of the shared encoder",
            )
        loss = torch.stack([value.detach() for value in values.values()])
        norm = torch.stack([self._norm(value) for value in values.values()])
        # A target that is absent or already perfect contains no information about its factor.
        comparable = (norm > 0) & torch.isfinite(norm) & (loss > 0)
        if int(comparable.sum()) == 0:
            return
        self.initial = torch.where(torch.isnan(self.initial) & comparable, loss, self.initial)
        rate = torch.where(comparable, loss / self.initial, torch.ones_like(loss))
        rate = rate / rate[comparable].mean()
        proposed = self.alpha * rate.clamp_min(1e-6).log() - norm.clamp_min(1e-30).log()
        # This step determines only ratios between its targets, so their previous mean level is retained.
        proposed = proposed - proposed[comparable].mean() + self.log_factors[comparable].mean()
        momentum = 0.0 if int(self.step) == 0 else self.momentum
        mixed = momentum * self.log_factors + (1 - momentum) * proposed
        log_factors = torch.where(comparable, mixed, self.log_factors)
        self.log_factors = (
            log_factors - torch.logsumexp(log_factors, 0) + torch.log(norm.new_tensor(len(norm)))
        )

    def _norm(self, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value.new_zeros(())
        gradients = torch.autograd.grad(value, self._shared, retain_graph=True, allow_unused=True)
        parts = [g.detach().float().flatten() for g in gradients if g is not None]
        if not parts:
            return value.new_zeros(())
        flat = torch.cat(parts)
        if synchronised():
            # The norm of the averaged gradient is used, because the optimizer receives that gradient.
            dist.all_reduce(flat)
            flat = flat / dist.get_world_size()
        return flat.norm()


class AlignedBalancing(nn.Module):
    """Fixed weights; the gradients of derived targets reach the shared encoder only as far as they do not oppose.

    total = sum of weight * loss, as in `FixedBalancing`. What differs is the backward pass of the network, whose
    `limit_gradients` this calls; `volumen.networks.gradient_gate.GradientGate` describes what is computed. The cosine
    of each derived target's gradient with that of the labelled targets is a buffer, so checkpoints store it.

    Args:
        kinds: target -> kind.
        weights: target -> weight.
        method: "projection" or "cosine".
    """

    cosines: Tensor

    def __init__(
        self, kinds: Mapping[str, str], weights: Mapping[str, float], method: str = "projection"
    ) -> None:
        super().__init__()
        if method not in ("projection", "cosine"):
            raise ValueError(f"method must be projection or cosine, got {method!r}")
        self.weights, self.method = dict(weights), method
        self._auxiliary: list[str] = []
        self._gate: Any = None
        self.register_buffer("cosines", torch.zeros(len(kinds)))

    def set_network(self, network: nn.Module, auxiliary: Sequence[str]) -> None:
        """Limit the gradients of the auxiliary targets within a network.

        Raises:
            VolumenError: the network has no `limit_gradients`.
        """
        limit: Any = getattr(network, "limit_gradients", None)
        if limit is None:
            raise VolumenError(
                "tr_config.loss_balancing",
                expected="for aligned a network with limit_gradients, such as MultiHeadDynUNet",
                found=type(network).__name__,
                remedy="choose another balancing",
            )
        self._auxiliary = list(auxiliary)
        self._gate = limit(auxiliary, self.method)

    def forward(
        self, values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training and torch.is_grad_enabled():
            if self._gate is None:
                raise VolumenError(
                    "tr_config.loss_balancing",
                    "aligned was given no network",
                    remedy="pass network= to MultiTaskLoss",
                )
            if self._gate.cosines:
                self.cosines = torch.stack(
                    [self._gate.cosines.get(name, self.cosines[i]) for i, name in enumerate(self.weights)]
                )
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return total, {}

    def logged(self) -> dict[str, Tensor]:
        """Return the cosines of the last backward pass by auxiliary target."""
        return {name: c for name, c in zip(self.weights, self.cosines) if name in self._auxiliary}


BALANCINGS: dict[str, type[nn.Module]] = {
    "fixed": FixedBalancing,
    "aligned": AlignedBalancing,
    "uncertainty": UncertaintyBalancing,
    "gradnorm": GradNormBalancing,
}


def build_balancing(
    name: str, kinds: Mapping[str, str], weights: Mapping[str, float], kwargs: Mapping[str, Any]
) -> nn.Module:
    """Build a balancing by name.

    Args:
        name: "fixed", "aligned", "uncertainty" or "gradnorm".
        kinds: target -> kind.
        weights: target -> the user's weight, which multiplies the balancing's factor.
        kwargs: further arguments of the balancing.

    Raises:
        VolumenError: unknown name or arguments.
    """
    if name not in BALANCINGS:
        raise VolumenError("tr_config.loss_balancing", expected=f"one of {', '.join(BALANCINGS)}", found=name)
    allowed = list(inspect.signature(BALANCINGS[name]).parameters)[2:]
    unknown = [key for key in kwargs if key not in allowed]
    if unknown:
        raise VolumenError(
            "loss#balancing_kwargs",
            expected=", ".join(allowed) or f"no arguments for {name}",
            found=", ".join(unknown),
        )
    try:
        return BALANCINGS[name](kinds, weights, **kwargs)
    except (TypeError, ValueError) as error:
        raise VolumenError("loss#balancing_kwargs", str(error)) from error
