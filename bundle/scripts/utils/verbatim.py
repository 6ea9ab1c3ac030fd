"""Text that reaches the objects of a bundle config as a person wrote it.

MONAI's parser looks at every string of a config: it turns `#` into `::`, evaluates what begins with `$`, and replaces
what begins with `@` or `%`. A path may hold all of these. The parser passes over what is no `str`.
"""

from __future__ import annotations

from collections import UserString
from collections.abc import Mapping
from typing import Any

_FIRST = ("$", "@", "%")
_ANYWHERE = ("#", "::")


class Verbatim(UserString):
    """Text that behaves like a `str` and a path, but that MONAI's parser does not take for a `str`."""

    def __fspath__(self) -> str:
        return self.data


def protect(value: Any) -> Any:
    """Return plain values in which every text that MONAI's parser would change is a `Verbatim`.

    Args:
        value: plain values, nested in mappings and lists.
    """
    if isinstance(value, str):
        changes = value.startswith(_FIRST) or any(mark in value for mark in _ANYWHERE)
        return Verbatim(value) if changes else value
    if isinstance(value, Mapping):
        return {key: protect(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [protect(inner) for inner in value]
    return value


def reveal(value: Any) -> Any:
    """Return the plain values that were given to `protect`."""
    if isinstance(value, Verbatim):
        return value.data
    if isinstance(value, Mapping):
        return {key: reveal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [reveal(inner) for inner in value]
    return value
