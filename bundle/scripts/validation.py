"""Checks of plain values against the dataclasses of the configuration, with one-line errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from scripts.errors import VolumenError
from scripts.suggest import closest


def check_section(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make the dataclass `cls` of plain values.

    Args:
        cls: a dataclass whose annotations pydantic understands.
        values: the values by key; missing keys take their defaults.
        where: the file and section, for errors.

    Returns:
        An instance of `cls`.

    Raises:
        VolumenError: for an unknown key (with the closest known one) or a value of the wrong type or range.
    """
    if not isinstance(values, Mapping):
        raise VolumenError(where, expected="a mapping of keys to values", found=repr(values))
    known = [item.name for item in fields(cls)]
    for key in values:
        if key not in known:
            remedy = closest(str(key), known) or f"known keys: {', '.join(known)}"
            raise VolumenError(f"{where}.{key}", "unknown key", remedy=remedy)
    try:
        return _adapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise _told(error, where) from None


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _told(error: ValidationError, where: str) -> VolumenError:
    """Turn pydantic's first complaint into ours."""
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"] if not _is_type_label(str(part)))
    expected = first["msg"][0].lower() + first["msg"][1:]
    remedy = "correct the value"
    if first["type"] == "unexpected_keyword_argument":
        remedy = "remove it or correct its name"
    return VolumenError(f"{where}.{path}".rstrip("."), expected, found=repr(first["input"]), remedy=remedy)


def _is_type_label(part: str) -> bool:
    """Whether a part of pydantic's path names a member of a union rather than a key of ours."""
    return part in {"int", "float", "str", "none", "bool"} or "[" in part
