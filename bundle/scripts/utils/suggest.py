"""What somebody who mistyped a name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: object, known: Iterable[object]) -> str:
    """Return `did you mean X?` for the known name closest to `name`, whatever the case, or an empty string."""
    names = {str(candidate).lower(): str(candidate) for candidate in known}
    match = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f"did you mean {names[match[0]]}?" if match else ""
