"""How targets are weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scripts.errors import VolumenError
from scripts.losses.base import LABEL_KINDS

BALANCINGS = ("fixed", "uncertainty", "gradnorm")


class FixedBalancing(nn.Module):
    """total = sum of weight * loss."""

    def __init__(self, kinds: Mapping[str, str], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def forward(
        self, values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total and the factors worth logging.

        Args:
            values: target -> scalar loss.
            present: target -> bool scalar, False where no voxel of the batch is valid; absent means True.
        """
        terms = [self.weights[name] * value for name, value in values.items()]
        return torch.stack(terms).sum(), {}


class UncertaintyBalancing(nn.Module):
    """Weights by the learned uncertainty of each target, Kendall, Gal and Cipolla 2018.

    total = sum of weight * (exp(-s) L + s / 2) for label targets and weight * (exp(-s) L / 2 + s / 2) for
    regression, s = log sigma^2 a parameter per target. It is least at exp(s) = 2 L, or exp(s) = L for
    regression, so a target that is hard at the scale of its loss weighs less. Give `parameters()` of the loss
    to the optimizer, without weight decay. A target without a valid voxel in the batch leaves its s alone.
    """

    def __init__(self, kinds: Mapping[str, str], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.halved = {name: 1.0 if kind in LABEL_KINDS else 0.5 for name, kind in kinds.items()}
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in kinds})

    def forward(
        self, values: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms, factors = [], {}
        for name, value in values.items():
            s = self.log_variances[name]
            factors[name] = self.weights[name] * self.halved[name] * torch.exp(-s)
            regulariser = 0.5 * self.weights[name] * s
            if name in present:
                regulariser = regulariser * present[name]
            terms.append(factors[name] * value + regulariser)
        return torch.stack(terms).sum(), factors


def build_balancing(
    name: str, kinds: Mapping[str, str], weights: Mapping[str, float], kwargs: Mapping[str, Any]
) -> nn.Module:
    """Build a balancing by name.

    Args:
        name: "fixed", "uncertainty" or "gradnorm".
        kinds: target -> kind.
        weights: target -> the user's weight, which multiplies whatever the balancing finds.
        kwargs: arguments of the balancing.

    Raises:
        VolumenError: unknown name or arguments.
    """
    classes = {"fixed": FixedBalancing, "uncertainty": UncertaintyBalancing}
    if name not in classes:
        raise VolumenError("tr_config.loss_balancing", expected=f"one of {', '.join(classes)}", found=name)
    try:
        return classes[name](kinds, weights, **kwargs)
    except TypeError as error:
        raise VolumenError("tr_config.loss_balancing_kwargs", str(error)) from error
