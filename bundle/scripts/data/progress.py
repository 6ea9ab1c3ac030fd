"""Progress bars whose length becomes known bit by bit."""

from __future__ import annotations

from typing import Any


def grow(bar: Any, steps: int) -> None:
    """Add steps to the total of a tqdm bar."""
    bar.total = (bar.total or 0) + steps
    bar.refresh()
