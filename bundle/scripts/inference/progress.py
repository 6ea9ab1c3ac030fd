"""How far a prediction is, counted in windows and in the blocks of each pass."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Progress:
    """Counts settled windows of one volume, or of several that are predicted at once.

    Args:
        name: what is told of them.
        tell: called with the name, what is done and all of it.
        stages: whether what follows the windows is told as well.
    """

    def __init__(self, name: str, tell: Callable[[str, int, int], None], *, stages: bool = True) -> None:
        self._name, self._tell, self._count, self._total = name, tell, 0, 0
        self._stages = stages
        self._lock = threading.Lock()

    def expect(self, windows: int) -> None:
        """Add windows to those that are to be settled."""
        with self._lock:
            self._total += windows

    def __call__(self, windows: int) -> None:
        with self._lock:
            self._count += windows
            self._tell(self._name, self._count, self._total)

    def stage(self, title: str, count: int, total: int) -> None:
        """Tell how far a pass over the blocks of the volume is, as of `run_here`."""
        if self._stages:
            self._tell(f"{self._name}, {title}", count, total)
