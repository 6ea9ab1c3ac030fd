"""Limits the number of open files: data sets have thousands, but a process may open only about a thousand."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from typing import Protocol

DEFAULT_LIMIT = 256


class Closable(Protocol):
    """An object that can close its file and open it again."""

    def drop_handle(self) -> None: ...


class OpenHandles:
    """Records the objects with an open file; above the limit, the one that opened its file first must close it.

    Args:
        limit: largest number of open files.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._holders: deque[weakref.ref[Closable]] = deque()
        self._lock = threading.Lock()

    def add(self, holder: Closable) -> None:
        """Record that a holder has just opened its file."""
        dropped = []
        with self._lock:
            self._holders.append(weakref.ref(holder))
            while len(self._holders) > self.limit:
                dropped.append(self._holders.popleft())
        for reference in dropped:
            oldest = reference()
            if oldest is not None and oldest is not holder:
                oldest.drop_handle()

    def _after_fork(self) -> None:
        # The lock may have been held by a thread that the child does not have.
        self._lock = threading.Lock()


HANDLES = OpenHandles()
"""The open files of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=HANDLES._after_fork)
