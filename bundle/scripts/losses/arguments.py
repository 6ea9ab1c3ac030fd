"""Checks the arguments of losses in the settings: their types, and weights per class."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import nn

from volumen.utils.errors import VolumenError

WEIGHT_KEYS = ("weight", "pos_weight", "channel_weights", "weights")
"""Arguments that hold a weight, or one for each class, channel or eigenvalue."""

# Names of the types in error messages.
_WORDS = {
    "Sequence[float]": "a list of numbers",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "None": "null",
}

OLDER_KEYS: dict[str, str] = {
    "threshold": "WeightedSmoothL1Loss weighs voxels by nonzero_weight",
    "initial_weight": "WeightedSmoothL1Loss takes nonzero_weight: 1 / initial_weight",
    "apply_below_threshold": "without it nonzero_weight is initial_weight itself",
    "mask_channel": "masks come from masks/ and ignore labels, not from a channel of the target",
    "normalization": "the kind of the target decides between sigmoid and softmax",
}
"""Arguments of weighted and masked losses of other programs that do not exist here, each with its replacement."""


def typed_kwargs(cls: type[nn.Module], kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert the arguments of a loss of this project to the types in its constructor's annotations.

    Args:
        cls: a loss of this project.
        kwargs: the user's arguments; their names are already checked.
        where: configuration key to name in errors.

    Raises:
        VolumenError: a value is of another type.
    """
    hints = get_type_hints(cls.__init__)
    result = dict(kwargs)
    for key, value in kwargs.items():
        hint = hints.get(key)
        if hint is None:
            continue
        try:
            if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
                raise ValueError
            result[key] = TypeAdapter(hint).validate_python(value)
        except (ValidationError, ValueError):
            raise VolumenError(
                f"{where}.kwargs.{key}", expected=_in_words(cls, key), found=repr(value)
            ) from None
    return result


def _in_words(cls: type[nn.Module], key: str) -> str:
    annotation = str(inspect.signature(cls).parameters[key].annotation)
    return " or ".join(_WORDS.get(part, part) for part in annotation.split(" | "))


def check_weights(kwargs: Mapping[str, Any], channels: int | None, where: str) -> None:
    """Check the weights among the arguments of a loss.

    Args:
        kwargs: the loss's arguments.
        channels: channels of the prediction, or None if they are not known yet.
        where: configuration key to name in errors.

    Raises:
        VolumenError: a weight is negative or not a number, all are 0, or their number differs from that of the
            channels.
    """
    for key in WEIGHT_KEYS:
        given = kwargs.get(key)
        if given is None or isinstance(given, str):
            continue
        weights = list(given) if isinstance(given, Sequence) else [given]
        if not all(_is_weight(value) for value in weights) or not any(weights):
            raise VolumenError(
                f"{where}.kwargs.{key}",
                expected="finite numbers of at least 0, one of them above 0",
                found=repr(given),
                remedy="a negative weight would reward mistakes" if _any_negative(weights) else "",
            )
        if key == "weights" or channels is None or not isinstance(given, Sequence):
            continue
        # MONAI counts only the foreground classes if the background is excluded.
        due = channels - (kwargs.get("include_background") is False)
        if len(weights) != due and not (key == "pos_weight" and len(weights) == 1):
            raise VolumenError(
                f"{where}.kwargs.{key}",
                expected=f"{due} numbers, one for each {'class' if due > 1 else 'channel'} of the head",
                found=f"{len(weights)}: {given!r}",
            )


def _is_weight(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    )


def _any_negative(weights: Sequence[Any]) -> bool:
    return any(isinstance(value, int | float) and value < 0 for value in weights)
