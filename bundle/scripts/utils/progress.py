"""Progress bars for long reading: shown on a terminal, with a total that grows as it becomes known."""

from __future__ import annotations

import os
from typing import Any


def grow(bar: Any, steps: int) -> None:
    """Add steps to the total of a tqdm bar."""
    bar.total = (bar.total or 0) + steps
    bar.refresh()


def hidden(progress: bool) -> bool | None:
    """Return tqdm's `disable`: True if not `progress` or `TQDM_DISABLE` is set, else None (shown on a terminal)."""
    return True if not progress or os.environ.get("TQDM_DISABLE") else None
