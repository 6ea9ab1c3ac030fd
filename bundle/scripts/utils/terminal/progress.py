"""Progress bars for long reading: shown on a terminal, with a total that grows as it becomes known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def grow(bar: Any, steps: int) -> None:
    """Add steps to the total of a tqdm bar."""
    bar.total = (bar.total or 0) + steps
    bar.refresh()


@contextmanager
def growing_bar(what: str, unit: str = "block") -> Iterator[Any]:
    """Show a bar whose total grows with what is found to be done, see `grow`; gone when the block ends."""
    from tqdm import tqdm

    with tqdm(total=0, desc=what, unit=unit, disable=hidden(True), leave=False) as bar:
        yield bar


def hidden(progress: bool) -> bool | None:
    """Return tqdm's `disable`: True if not `progress` or `TQDM_DISABLE` is set, else None (shown on a terminal)."""
    return True if not progress or os.environ.get("TQDM_DISABLE") else None
