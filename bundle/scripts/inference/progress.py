"""Counts the progress of a prediction in windows and in the blocks of each pass."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Progress:
    """Counts finished windows of one volume, or of several that are predicted at the same time.

    Args:
        name: name shown to the user.
        callback: called with the name, the number finished and the total.
        stages: whether the passes after the windows are reported as well.
    """

    def __init__(self, name: str, callback: Callable[[str, int, int], None], *, stages: bool = True) -> None:
        self._name, self._callback, self._count, self._total = name, callback, 0, 0
        self._stages = stages
        self._lock = threading.Lock()

    def expect(self, windows: int) -> None:
        """Add windows to the total."""
        with self._lock:
            self._total += windows

    def __call__(self, windows: int) -> None:
        with self._lock:
            self._count += windows
            self._callback(self._name, self._count, self._total)

    def stage(self, title: str, count: int, total: int) -> None:
        """Report the progress of a pass over the blocks of the volume; see `run_here`."""
        if self._stages:
            self._callback(f"{self._name}, {title}", count, total)
