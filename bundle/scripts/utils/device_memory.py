"""Reads how much memory a device can still give to this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

# A cgroup without limit states a number near 2^63 (version 1) or "max" (version 2).
_NO_LIMIT = 2**60


def device_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still use on a device; None if the system does not state it.

    Args:
        device: a GPU, of which memory that torch has reserved and does not use counts as free; or the CPU.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return main_memory()


def main_memory() -> int | None:
    """Return the bytes of main memory that this process can still use; None if the system does not state it.

    The least of what the system has available without swapping, and of what the limit of a container (cgroup) leaves.
    """
    known = [value for value in (_available(), *_cgroup_rests()) if value is not None]
    return max(0, min(known)) if known else None


def resident_memory() -> int:
    """Return the bytes of main memory that this process occupies; 0 where the system does not state it."""
    if not sys.platform.startswith("linux"):
        return 0
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _cgroup_rests() -> list[int | None]:
    """Return what the limits of this process's cgroup leave, of version 2 and version 1."""
    second, first = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    return [
        _rest(second / "memory.max", second / "memory.current", second / "memory.stat"),
        _rest(first / "memory.limit_in_bytes", first / "memory.usage_in_bytes", first / "memory.stat"),
    ]


def _rest(limit: Path, usage: Path, statistics: Path) -> int | None:
    """Return limit less usage, where cached pages of files, which are given up first, do not count as used."""
    try:
        most, used = limit.read_text("ascii").strip(), int(usage.read_text("ascii"))
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
        entries = dict(line.split(maxsplit=1) for line in statistics.read_text("ascii").splitlines())
    except (OSError, ValueError):
        return None
    cached = int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
    return int(most) - max(0, used - cached)
