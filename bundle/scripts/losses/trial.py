"""Tests a loss on a tiny batch before the training, so that errors of the first step appear here, with their key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volumen.losses.base import LABEL_KINDS
from volumen.losses.masking import this_rank_alone
from volumen.losses.wrap import WrappedLoss
from volumen.utils.errors import VolumenError

# Different primes, so that an array whose axes are in the wrong order never fits by chance.
SIZES = {2: (19, 23), 3: (11, 13, 17)}
SURE = 3.0
"""A logit for which sigmoid and softmax are nearly 0 or 1; a larger one would cost with label smoothing."""

Call = Callable[[Tensor, Tensor], Any]


def try_loss(
    loss: nn.Module,
    name: str,
    *,
    kind: str,
    channels: int,
    ndim: int,
    where: str,
    extras: frozenset[str] = frozenset(),
    source_channels: int = 1,
) -> None:
    """Call a loss as the training does, with random predictions of two samples.

    Args:
        loss: the loss, not changed.
        name: its name in the user's settings.
        kind: kind of the target that the loss receives.
        channels: channels of the prediction.
        ndim: number of spatial axes.
        where: configuration key to name in errors.
        extras: further arguments of its forward, see `registry.EXTRAS`.
        source_channels: channels of the source target's prediction.

    Raises:
        VolumenError: the loss fails, returns no finite scalar, has no finite gradient, counts voxels outside the
            mask, or (a loss of another library, on labels) does not take logits.
    """
    loss = copy.deepcopy(loss)
    random = torch.Generator().manual_seed(0)
    size = SIZES[ndim]
    pred = torch.randn(2, channels, *size, generator=random)
    target = tiny_target(kind, channels, size, random)
    mask = torch.rand(2, 1, *size, generator=random) > 0.2
    given: dict[str, Any] = {"mask": mask}
    if "source_pred" in extras:
        given["source_pred"] = torch.randn(2, source_channels, *size, generator=random).requires_grad_()
    if "source_mask" in extras:
        given["source_mask"] = torch.ones_like(mask)
    for extra, value in (("confidence", mask.float()), ("certain", mask)):
        if extra in extras:
            given[extra] = value
    if "field" in extras:
        given["field"] = (torch.rand(2, 1, *size, generator=random) > 0.9).float()
    if "scale" in extras:
        given["scale"] = (1.0,) * ndim

    def call(pred: Tensor, target: Tensor) -> Any:
        # Losses that draw random numbers must not change those of the training.
        with torch.random.fork_rng(devices=[]), this_rank_alone():
            return _call(loss, name, pred, target, given, where)

    with torch.enable_grad():
        value, _ = _with_gradient(call, pred, target, name, where)
    with torch.no_grad():
        again = call(pred.masked_fill(~mask, 50.0), target.masked_fill(~mask, 0))
    if not torch.allclose(again, value, rtol=1e-4, atol=1e-6):
        raise VolumenError(
            where,
            f"{name} counts voxels that its `mask` leaves out",
            expected="a mask (B, 1, *spatial) that is True where a voxel counts",
            remedy="make it keep to the mask, or leave `mask` out of its forward",
        )
    if isinstance(loss, WrappedLoss) and kind in LABEL_KINDS:
        with torch.enable_grad():
            _check_reads_logits(call, target, kind, channels, name, where)


def tiny_target(kind: str, channels: int, size: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Return a target of two samples in the form that `MultiTaskLoss` passes; every class occurs."""
    if kind == "multiclass":
        return torch.randint(0, channels, (2, 1, *size), generator=random).to(torch.uint8)
    if kind in LABEL_KINDS:
        return torch.randint(0, 2, (2, channels, *size), generator=random).to(torch.uint8)
    field = torch.randn(2, channels, *size, generator=random)
    return F.normalize(field, dim=1) if kind in ("vector", "axis") else field


def _call(loss: nn.Module, name: str, pred: Tensor, target: Tensor, given: dict[str, Any], where: str) -> Any:
    try:
        return loss(pred, target, **given)
    except Exception as error:  # code of other people, which may raise any error
        raise failure(name, pred, error, where, "correct its kwargs or choose another loss") from error


def failure(name: str, pred: Tensor, error: Exception, where: str, remedy: str) -> VolumenError:
    """Return the error for a loss that raised an exception for a prediction."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return VolumenError(
        where,
        f"{name} fails on a prediction of shape {tuple(pred.shape)}: {reason}",
        remedy=remedy,
    )


def _with_gradient(call: Call, pred: Tensor, target: Tensor, name: str, where: str) -> tuple[Tensor, bool]:
    """Check a loss's value and gradient; return the value, and whether the prediction has a gradient."""
    pred = pred.clone().requires_grad_()
    value = call(pred, target)
    if not isinstance(value, Tensor) or value.dim() != 0:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise VolumenError(
            where,
            f"{name} gives no single number",
            expected="a tensor without axes",
            found=found,
            remedy="average over the samples that have a voxel in the mask",
        )
    if not value.requires_grad:
        raise VolumenError(where, f"{name} has no gradient", remedy="choose another loss")
    (gradient,) = torch.autograd.grad(value, pred, allow_unused=True)
    if not torch.isfinite(value) or (gradient is not None and not torch.isfinite(gradient).all()):
        what = "gradient" if torch.isfinite(value) else "value"
        raise VolumenError(
            where,
            f"{name} has a {what} that is not finite on a random prediction",
            remedy="correct its kwargs, or choose a loss for the outputs of this target",
        )
    return value.detach(), gradient is not None and bool(gradient.any())


def _check_reads_logits(call: Call, target: Tensor, kind: str, channels: int, name: str, where: str) -> None:
    """Raise for a loss of labels that does not take logits.

    The truth as large logits must cost less than an undecided prediction and than every class everywhere (a loss for
    targets -1 and 1 rates both as equally good), and a wrong prediction must have a gradient (a loss of probabilities
    clips values outside 0 to 1).
    """
    classes = torch.arange(channels).view(1, -1, *[1] * (target.dim() - 2))
    truth = (target == classes if kind == "multiclass" else target > 0).float()
    right, undecided, foreground = (
        _with_gradient(call, SURE * (2 * guess - 1), target, name, where)[0]
        for guess in (truth, torch.full_like(truth, 0.5), torch.ones_like(truth))
    )
    _, learns = _with_gradient(call, SURE * (1 - 2 * truth), target, name, where)
    if right < undecided and right < foreground and learns:
        return
    why = (
        f"costs {float(right):.4g} for the truth as sure logits, {float(undecided):.4g} for an undecided prediction "
        f"and {float(foreground):.4g} for every class everywhere"
        if learns
        else "has no gradient where the prediction is wrong"
    )
    raise VolumenError(
        where,
        f"{name} does not read the logits of the network: it {why}",
        remedy="choose a loss of logits, such as BCEWithLogitsLoss or SoftDiceLoss",
    )
