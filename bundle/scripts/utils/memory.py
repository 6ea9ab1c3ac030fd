"""Have the C library keep the memory of freed tensors for the next ones, on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc comes to by itself in a process that has freed a large block.
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_MMAPS = 65536
#: Settings of malloc that a user may have made, which then stand.
_ENVIRONMENT = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

# Steps in which a process takes what it needs, and the share of that which it may hold from then on.
_SETTLING, _ROOM = 3, 1.02
# Steps within which memory that is short again was not short by what was left lying, but is needed.
_SOON = 10


@dataclass
class _Kept:
    """What this process keeps: for how many, what it may hold, and how it came to that."""

    holders: int = 0
    limit: float = 0.0
    settling: int = _SETTLING
    rising: bool = True
    steps: int = 0


_kept = _Kept()
_lock = threading.Lock()


def keep_freed_memory(device: torch.device) -> None:
    """Keep what is freed from now on, until `return_freed_memory` has been called as often as this.

    glibc takes each block of more than 32 MiB from the system and gives it back when freed, and the system
    clears every page of it at its first use. A training step frees and takes the same gigabytes each time:
    clearing them can be a third of its time (benchmarks/train_step.py). With CUDA, whose allocator keeps
    memory by itself, with another C library, and where the environment sets malloc up, nothing changes.
    Call `limit_kept_memory` after each step meanwhile.

    Args:
        device: where the network runs.
    """
    global _kept
    library = _glibc()
    if device.type != "cpu" or library is None:
        return
    with _lock:
        if not _kept.holders:
            _kept = _Kept()
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, -1)
        _kept.holders += 1


def limit_kept_memory() -> None:
    """Give what is free back to the system if the process has outgrown what its first steps took.

    Where that does not help for long, the process may hold more from then on.

    Until 2.38 glibc finds no room for an aligned block where one of the same size was freed alone, and takes
    more from the system instead: without this, a pattern of sizes that does so at each step would fill the memory.
    """
    if not _kept.holders:
        return
    with _lock:
        resident = _resident()
        _kept.steps += 1
        if _kept.settling:
            _kept.settling -= 1
            if _kept.rising:
                _kept.limit = max(_kept.limit, _ROOM * resident)
        elif resident > _kept.limit:
            ctypes.CDLL(None).malloc_trim(0)
            _kept.rising, _kept.steps, _kept.settling = _kept.steps < _SOON, 0, _SETTLING


def return_freed_memory(device: torch.device) -> None:
    """Give the freed memory back to the system, and what is freed later as well.

    Args:
        device: as given to `keep_freed_memory`.
    """
    library = _glibc()
    if device.type != "cpu" or library is None:
        return
    with _lock:
        _kept.holders = max(_kept.holders - 1, 0)
        if not _kept.holders:
            library.mallopt(_MMAP_MAX, _MMAPS)
            library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
            library.malloc_trim(0)


def keep_in_worker() -> None:
    """Keep freed memory, and limit it, in a process that loads data; to be called there before each sample.

    In any other process nothing changes.
    """
    if get_worker_info() is None:
        return
    if not _kept.holders:
        keep_freed_memory(torch.device("cpu"))
    limit_kept_memory()


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Keep what is freed inside the block, and give it back at its end; see `keep_freed_memory`."""
    keep_freed_memory(device)
    try:
        yield
    finally:
        return_freed_memory(device)


def _after_fork() -> None:
    """A child has its parent's settings of malloc and not its needs; a lock that was held would stay so."""
    global _kept, _lock
    _kept, _lock = _Kept(holders=_kept.holders), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _resident() -> int:
    """Return the bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc on Linux, and its malloc as it comes."""
    if sys.platform != "linux" or any(name in os.environ for name in _ENVIRONMENT):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
