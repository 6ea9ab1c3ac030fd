"""Lets the C library keep the memory of freed tensors for later tensors, on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import get_worker_info

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# The value that glibc itself chooses in a process that has freed a large block.
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_MMAPS = 65536
_PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 0
#: Settings of malloc that a user may have made; they take precedence.
_ENVIRONMENT = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

# Number of steps in which a process allocates what it needs, and the multiple of that which it may hold afterwards.
_SETTLING, _ROOM = 3, 1.02
# If memory exceeds the limit again within this many steps, it is needed and not merely unused.
_SOON = 10


@dataclass
class _RetainedMemory:
    """The state of the memory that this process retains: number of callers, limit, and how it was measured."""

    holders: int = 0
    limit: float = 0.0
    settling: int = _SETTLING
    rising: bool = True
    steps: int = 0


_retained = _RetainedMemory()
_lock = threading.Lock()


def keep_freed_memory(device: torch.device) -> None:
    """Retain freed memory from now on, until `return_freed_memory` has been called equally often.

    glibc requests each block of more than 32 MiB from the system and returns it when it is freed, and the system
    clears every page of it at its first use. A training step frees and allocates the same gigabytes each time:
    clearing them can be a third of its time (benchmarks/train_step.py). Nothing changes with CUDA, whose allocator
    retains memory itself, with another C library, and if environment variables configure malloc.
    Call `limit_kept_memory` after each step in the meantime.

    Args:
        device: where the network runs.
    """
    global _retained
    library = _glibc()
    if device.type != "cpu" or library is None:
        return
    with _lock:
        if not _retained.holders:
            _retained = _RetainedMemory()
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, -1)
        _retained.holders += 1


def limit_kept_memory() -> None:
    """Return unused memory to the system if the process holds more than its first steps needed.

    If the memory soon grows again, the process may hold more from then on.

    Before 2.38 glibc cannot place an aligned block where a single block of the same size was freed, and requests
    more from the system instead: without this function, sizes that cause this at each step would fill the memory.
    """
    if not _retained.holders:
        return
    with _lock:
        resident = _resident()
        _retained.steps += 1
        if _retained.settling:
            _retained.settling -= 1
            if _retained.rising:
                _retained.limit = max(_retained.limit, _ROOM * resident)
        elif resident > _retained.limit:
            ctypes.CDLL(None).malloc_trim(0)
            _retained.rising, _retained.steps, _retained.settling = _retained.steps < _SOON, 0, _SETTLING


def return_freed_memory(device: torch.device) -> None:
    """Return the freed memory to the system, also memory that is freed later.

    Args:
        device: the argument of `keep_freed_memory`.
    """
    library = _glibc()
    if device.type != "cpu" or library is None:
        return
    with _lock:
        _retained.holders = max(_retained.holders - 1, 0)
        if not _retained.holders:
            library.mallopt(_MMAP_MAX, _MMAPS)
            library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
            library.malloc_trim(0)


def keep_in_worker() -> None:
    """Retain freed memory, and limit it, in a process that loads data; call it there before each sample.

    In any other process nothing changes.
    """
    if get_worker_info() is None:
        return
    if not _retained.holders:
        keep_freed_memory(torch.device("cpu"))
    limit_kept_memory()


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Retain memory that is freed inside the block, and return it at its end; see `keep_freed_memory`."""
    keep_freed_memory(device)
    try:
        yield
    finally:
        return_freed_memory(device)


def _after_fork() -> None:
    """Reset the state in a child process, which inherits malloc's settings only, and replace a lock that was held."""
    global _retained, _lock
    _retained, _lock = _RetainedMemory(holders=_retained.holders), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _resident() -> int:
    """Return the bytes of memory that this process occupies."""
    # Without the layers of a text file, since every window of a prediction reads it.
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 128).split()[1]) * _PAGE
    finally:
        os.close(file)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc on Linux with the default settings of malloc."""
    if sys.platform != "linux" or any(name in os.environ for name in _ENVIRONMENT):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
