"""Builds any optimizer of torch by its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from volumen.engines.finetune_schedule import ENCODER, PART
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

KEY = "tr_config.optimizer"

# These need a closure or sparse gradients, which this training does not have.
_UNUSABLE = ("LBFGS", "SparseAdam")
_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    name: value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value)
    and issubclass(value, torch.optim.Optimizer)
    and value is not torch.optim.Optimizer
    and name not in _UNUSABLE
}


def build_optimizer(
    name: str,
    params: torch.nn.Module | Iterable[torch.nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    *,
    decay_norm_and_bias: bool = True,
    undecayed: Iterable[torch.nn.Parameter] = (),
    encoder: Iterable[torch.nn.Parameter] = (),
    options: Mapping[str, Any] | None = None,
    fused: bool | None = False,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer of `torch.optim`.

    Args:
        name: the class's name, in any case: "AdamW", "SGD", "RAdam", ...
        params: a network or its parameters.
        lr: learning rate.
        weight_decay: passed on if the optimizer has this argument.
        decay_norm_and_bias: False exempts parameters with one axis (biases, normalisation) from weight
            decay.
        undecayed: further parameters that are always exempt from weight decay.
        encoder: those of `params` that get groups of their own, named "encoder", for `FinetuneSchedule`.
        options: the optimizer's other arguments as a mapping, e.g. `tr_config.optimizer_kwargs`.
        fused: update all weights in one kernel; None: if the optimizer has one and `options` chooses no other way.
        kwargs: the same as keywords, e.g. `momentum=0.99, nesterov=True`.

    Raises:
        VolumenError: the optimizer does not exist, or it does not have one of the arguments.
    """
    kwargs = {**(options or {}), **kwargs}
    kind = _CLASSES.get(_match(name))
    if kind is None:
        raise VolumenError(
            KEY,
            expected=f"an optimizer of torch.optim ({', '.join(sorted(_CLASSES))})",
            found=repr(name),
            remedy=closest(name, _CLASSES),
        )
    known = inspect.signature(kind).parameters
    own = {
        "params": "the network has them",
        "lr": "set tr_config.initial_lr",
        "weight_decay": "set tr_config.weight_decay",
    }
    for key in own.keys() & kwargs.keys():
        raise VolumenError(f"{KEY}_kwargs.{key}", "is not set here", remedy=own[key])
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise VolumenError(
            f"{KEY}_kwargs",
            f"{kind.__name__} takes no {', '.join(map(repr, unknown))}",
            expected=", ".join(key for key in known if key not in own),
            remedy=closest(unknown[0], known),
        )
    if fused and "fused" not in known:
        raise VolumenError(
            "tr_config.fused_optimizer",
            expected="an optimizer with a fused kernel, such as AdamW or SGD",
            found=kind.__name__,
            remedy="set it to auto",
        )
    if fused or (
        fused is None and "fused" in known and not {"foreach", "fused", "differentiable"} & set(kwargs)
    ):
        kwargs["fused"] = True
    if "weight_decay" in known:
        kwargs["weight_decay"] = weight_decay
    elif weight_decay:
        raise VolumenError(
            "tr_config.weight_decay", f"{kind.__name__} has no weight decay", remedy="set it to 0"
        )
    parameters = list(params.parameters() if isinstance(params, torch.nn.Module) else params)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    apart = {id(parameter) for parameter in encoder}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in apart]}]
    if apart:
        groups.append({"params": [p for p in parameters if id(p) in apart], PART: ENCODER})
    if not decay_norm_and_bias and weight_decay:
        groups = [
            {**group, "params": [p for p in group["params"] if (p.ndim > 1) == decays], **exempt}
            for group in groups
            for decays, exempt in ((True, {}), (False, {"weight_decay": 0.0}))
        ]
    more = [parameter for parameter in undecayed if parameter.requires_grad]
    if more:
        groups.append({"params": more, **({"weight_decay": 0.0} if "weight_decay" in known else {})})
    try:
        return kind(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    except (ValueError, TypeError) as error:
        raise VolumenError(KEY, f"{kind.__name__} refuses its arguments: {error}") from error


def _match(name: str) -> str:
    return next((known for known in _CLASSES if known.lower() == str(name).lower()), "")
