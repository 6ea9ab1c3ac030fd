"""Suggests the right name for a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: object, candidates: Iterable[object]) -> str:
    """Return `did you mean X?` for the candidate closest to `name`, ignoring case, or an empty string."""
    names = {str(candidate).lower(): str(candidate) for candidate in candidates}
    match = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f"did you mean {names[match[0]]}?" if match else ""
