"""Learning-rate schedules as pure functions of the progress of the training.

Every schedule here is `lr = initial lr * factor(step / total)`, so a resumed run with another number of
epochs continues at the right place of the new curve: no state of the old curve is carried over.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

KEY = "tr_config.scheduler"

Curve = Callable[[float], float]


def cosine(*, eta_min: float = 0.0) -> Curve:
    """Half a cosine from 1 to `eta_min` (a fraction of the initial rate); torch's CosineAnnealingLR.

    Loshchilov and Hutter, "SGDR", 2017, equation 5 without restarts.
    """
    return lambda t: eta_min + (1 - eta_min) * (1 + math.cos(math.pi * t)) / 2


def poly(*, power: float = 0.9) -> Curve:
    """`(1 - t) ** power`; with 0.9 it is the schedule of nnU-Net and DeepLab."""
    return lambda t: max(0.0, 1 - t) ** power


def linear(*, end: float = 0.0) -> Curve:
    """A straight line from 1 to `end`."""
    return lambda t: 1 + (end - 1) * t


def constant() -> Curve:
    """The constant 1."""
    return lambda t: 1.0


def onecycle(*, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4) -> Curve:
    """A cosine from 1 / `div_factor` up to 1 at `pct_start`, then a cosine down to 1 / (div * final_div).

    The initial rate is the maximum. Smith and Topin, "Super-convergence", 2018, like torch's OneCycleLR, without
    its cycling of momentum.
    """

    def curve(t: float) -> float:
        low, end = 1 / div_factor, 1 / (div_factor * final_div_factor)
        start, stop, part = (
            (low, 1.0, t / pct_start) if t < pct_start else (1.0, end, (t - pct_start) / (1 - pct_start))
        )
        return stop + (start - stop) * (1 + math.cos(math.pi * part)) / 2

    return curve


CURVES: dict[str, Callable[..., Curve]] = {
    "cosine": cosine,
    "poly": poly,
    "linear": linear,
    "onecycle": onecycle,
    "constant": constant,
}

_ALIASES = {
    "cosineannealinglr": "cosine",
    "cosineannealing": "cosine",
    "polynomiallr": "poly",
    "polylr": "poly",
    "polynomial": "poly",
    "linearlr": "linear",
    "onecyclelr": "onecycle",
    "constantlr": "constant",
    "none": "constant",
}


class Schedule(LRScheduler):
    """A curve over a run of `total` steps, after a linear warm-up.

    Args:
        optimizer: the optimizer whose learning rates are set; their current values are the initial ones.
        curve: factor as a function of progress from 0 to 1.
        total: number of steps of the whole run (epochs, or iterations if it is stepped per iteration).
        warmup: steps of linear warm-up from `1 / (warmup + 1)` of the initial rate; the curve covers the rest.
    """

    def __init__(self, optimizer: Optimizer, curve: Curve, total: int, warmup: int = 0) -> None:
        if total < 1:
            raise ValueError(f"total must be at least 1, got {total}")
        if not 0 <= warmup < total:
            raise VolumenError(
                "tr_config.warmup_epochs", expected=f"fewer than {total}, the length of the run", found=warmup
            )
        self.curve = curve
        self.total = total
        self.warmup = warmup
        self.scale = 1.0
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Return the fraction of the initial learning rate at a step, 0 for the first; constant after the last."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return self.curve(min(1.0, (step - self.warmup) / (self.total - self.warmup)))

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the current learning rate of each parameter group."""
        return [base * self.scale * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return only the position: the curve belongs to the configuration."""
        return {"last_epoch": self.last_epoch, "total": self.total, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to the position of a checkpoint on this run's own curve."""
        self.last_epoch = int(state["last_epoch"])
        self.scale = float(state.get("scale", 1.0))
        # Torch warns if the schedule steps before the optimizer; here the optimizer stepped before the checkpoint.
        self._step_count = self.last_epoch + 2
        self._set_rates()

    def extend(self, total: int) -> None:
        """Stretch the curve over `total` steps and take the learning rate of this step on it."""
        self.total = total
        self._set_rates()

    def lower(self, factor: float) -> None:
        """Multiply all learning rates from now on by a factor."""
        self.scale *= factor
        self._set_rates()

    def _set_rates(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def build_scheduler(
    name: str | None,
    optimizer: Optimizer,
    total: int,
    *,
    warmup: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Schedule:
    """Build a schedule by name.

    Args:
        name: "cosine" (also "CosineAnnealingLR"), "poly", "linear", "onecycle", "constant" (also None), in any
            case; "warmup_" before a name warms up for a twentieth of the run unless `warmup` is set.
        optimizer: the optimizer whose learning rates are set.
        total: steps of the whole run.
        warmup: steps of warm-up.
        options: the curve's own arguments.

    Raises:
        VolumenError: the schedule does not exist, or it does not have one of the arguments.
    """
    curve, warmup = named_curve(name, total, warmup=warmup, options=options)
    return Schedule(optimizer, curve, total, warmup)


def named_curve(
    name: str | None, total: int, *, warmup: int = 0, options: Mapping[str, Any] | None = None
) -> tuple[Curve, int]:
    """Return the curve and the warm-up of a schedule's name; see `build_scheduler`."""
    key = str(name or "constant").lower()
    if key.startswith("warmup_"):
        key = key.removeprefix("warmup_")
        warmup = warmup or min(total - 1, max(1, total // 20))
    key = _ALIASES.get(key, key)
    if key not in CURVES:
        raise VolumenError(
            KEY,
            expected=f"one of {', '.join(CURVES)}",
            found=repr(name),
            remedy=closest(key, [*CURVES, *_ALIASES]),
        )
    given = dict(options or {})
    _check_options(key, given)
    return CURVES[key](**given), warmup


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = list(inspect.signature(CURVES[name]).parameters)
    for key, value in options.items():
        if key not in known:
            raise VolumenError(
                f"{KEY}_kwargs",
                f"{name} takes no {key!r}",
                expected=", ".join(known) or "nothing",
                remedy=closest(key, known),
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise VolumenError(f"{KEY}_kwargs.{key}", expected="a number", found=repr(value))
