"""Finds losses by name: those of this project, those a user registers, and any of torch.nn or monai.losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, cast

from torch import nn

from volumen.losses.arguments import OLDER_KEYS, check_weights, typed_kwargs
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

ENTRY_POINT_GROUP = "volumen.losses"
# Arguments that a loss may declare in `forward` besides prediction and target.
EXTRAS = ("mask", "source_pred", "source_mask", "scale", "confidence", "certain", "field")
# Constructor arguments that the program fills in from the experiment.
CONTEXT = ("kind", "source_kind", "spacing")

_OWN = {
    "SoftDiceLoss": "dice",
    "DiceCELoss": "dice",
    "TverskyLoss": "dice",
    "FocalLoss": "cross_entropy",
    "BoundaryLoss": "boundary",
    "SoftClDiceLoss": "topology",
    "SkeletonRecallLoss": "topology",
    "FieldWeightedLoss": "field_weighted",
    "EigenvalueLoss": "tensors",
    "PlanarityLoss": "tensors",
    "NormalGatedRepulsionLoss": "vectors",
    "BCEWithLogitsLoss": "cross_entropy",
    "CrossEntropyLoss": "cross_entropy",
    "MSELoss": "regression",
    "MaskedMSELoss": "regression",
    "L1Loss": "regression",
    "SmoothL1Loss": "regression",
    "WeightedSmoothL1Loss": "regression",
    "SignedDistanceLoss": "distance",
    "CosineSimilarityLoss": "vectors",
    "SignInvariantCosineLoss": "vectors",
    "NormalSmoothnessLoss": "vectors",
}
_registered: dict[str, type[nn.Module]] = {}


def register_loss(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Make a class available by name in `losses:`; `volumen.losses.base.Loss` describes the required interface.

    Example:
        >>> @register_loss("TripleL1Loss")
        ... class TripleL1Loss(L1Loss):
        ...     def voxelwise(self, pred, target):
        ...         return 3 * super().voxelwise(pred, target)
    """

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        _registered[name] = cls
        return cls

    return add


def loss_names() -> list[str]:
    """Return the names of this project's and the registered losses, sorted."""
    return sorted({*_OWN, *_registered, *(e.name for e in entry_points(group=ENTRY_POINT_GROUP))})


def loss_class(name: str, *, where: str = "losses") -> type[nn.Module]:
    """Find the class of a loss: in this project, registered, an entry point, then torch.nn, then monai.losses.

    Args:
        name: a name alone, or "torch.nn.X" / "monai.losses.X" to select the library.
        where: configuration key to name in errors.

    Raises:
        VolumenError: the loss does not exist; the message names the closest one.
    """
    if name in _registered:
        return _registered[name]
    if name in _OWN:
        return getattr(import_module(f"volumen.losses.{_OWN[name]}"), name)
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return entry.load()
    library, _, bare = name.rpartition(".")
    for module in ("torch.nn", "monai.losses"):
        if library in ("", module) and _is_loss(found := getattr(import_module(module), bare, None)):
            return cast(type[nn.Module], found)
    known = [*loss_names(), *_library_names()]
    raise VolumenError(
        where,
        f"unknown loss {name!r}",
        expected=f"one of {', '.join(loss_names())}, or any loss of torch.nn or monai.losses",
        remedy=closest(bare, known) or "choose one of these",
    )


def _is_loss(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, nn.Module) and found.__name__.endswith("Loss")


def _library_names() -> list[str]:
    modules = (import_module("monai.losses"), import_module("torch.nn"))
    return [
        name
        for module in modules
        for name, found in inspect.getmembers(module, inspect.isclass)
        if _is_loss(found)
    ]


def accepted_extras(loss: nn.Module) -> frozenset[str]:
    """Return which of `EXTRAS` the loss declares in `forward`; only its signature is read."""
    declared = frozenset(inspect.signature(loss.forward).parameters) & frozenset(EXTRAS)
    return declared - {"confidence"} if getattr(loss, "takes_confidence", True) is False else declared


def build_loss(
    name: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    kind: str,
    where: str = "losses",
    source_kind: str | None = None,
    spacing: tuple[float, ...] | None = None,
    channels: int | None = None,
) -> nn.Module:
    """Build a loss that takes (pred, target, mask, ...) and ignores voxels outside the mask.

    Args:
        name: see `loss_class`.
        kwargs: constructor arguments of the user.
        kind: kind of the target, see `volumen.losses.base.Loss`.
        where: configuration key to name in errors.
        source_kind: kind of the source target, for losses that use its prediction.
        spacing: voxel size in spatial order, for losses that measure distances, unless `kwargs` sets it.
        channels: channels of the prediction, to check the number of weights; None if they are not known.

    Raises:
        VolumenError: unknown name or argument, a value that the loss refuses, or a kind that it does not support.
    """
    from volumen.losses.base import Loss
    from volumen.losses.wrap import WrappedLoss

    cls = loss_class(name, where=where)
    kwargs = dict(kwargs or {})
    # A `mask` argument of a library's loss may mean something else, and its defaults do not expect logits.
    foreign = cls.__module__.split(".")[0] in ("torch", "monai")
    own = issubclass(cls, Loss) or (not foreign and "mask" in inspect.signature(cls.forward).parameters)
    _check_kwargs(cls, name, kwargs, where, hidden=CONTEXT[:2] if own else ())
    if cls.__module__.rpartition(".")[0] == __package__:
        kwargs = typed_kwargs(cls, kwargs, where)
    check_weights(kwargs, channels, where)
    if own:
        known = {"kind": kind, "source_kind": source_kind, "spacing": spacing}
        accepted = inspect.signature(cls).parameters
        kwargs = {k: v for k, v in known.items() if k in accepted and v is not None} | kwargs
    try:
        return cls(**kwargs) if own else WrappedLoss(cls, kwargs, kind=kind, where=where)
    except VolumenError as error:
        if str(error).startswith(where):
            raise
        raise VolumenError(where, str(error)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise VolumenError(where, f"{name} refuses its kwargs: {error}", remedy="correct kwargs") from error


def _check_kwargs(
    cls: type[nn.Module], name: str, kwargs: Mapping[str, Any], where: str, hidden: tuple
) -> None:
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [p for p in parameters if p not in hidden]
    for key in kwargs:
        if key in allowed:
            continue
        raise VolumenError(
            f"{where}.kwargs",
            f"{name} takes no {key!r}",
            expected=", ".join(allowed) or "no arguments",
            remedy=OLDER_KEYS.get(key) or closest(key, allowed) or "remove it",
        )
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in kwargs]
    missing = [
        m for m in missing if m not in hidden and parameters[m].kind is not inspect.Parameter.VAR_POSITIONAL
    ]
    if missing:
        raise VolumenError(f"{where}.kwargs", f"{name} needs {', '.join(missing)}", remedy="add it")
