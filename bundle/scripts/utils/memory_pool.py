"""Has all threads of a process take memory from one pool, so that what one frees another can use."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_ARENA_MAX = -8
"""Parameter of glibc's mallopt (malloc.h): the number of pools, "arenas", that its threads share."""


@cache
def share_memory_between_threads() -> None:
    """Give the threads that start from now on the pool of the main thread; without glibc nothing happens.

    The thread that reads URLs frees much that it has used once. In a pool of its own, training could not use that
    memory: 60 MB at the first step on a volume whose chunks are listed by HTTP. A user's MALLOC_ARENA_MAX or
    GLIBC_TUNABLES takes precedence.
    """
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_ARENA_MAX, 1)
