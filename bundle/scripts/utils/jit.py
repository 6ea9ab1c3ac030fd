"""Compiles the inner loops of the derived targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# NumPy's error model: a division by zero is inf; a check for it would prevent vectorisation.
# numba rebuilds a cached kernel only when the kernel's own file changes: touch the kernels after a change here.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba at the first call, and cache the machine code on disk if a folder for it is
    writable.

    The code is compiled once per machine, so that a data-loading worker loads it in milliseconds. numba tries
    the folder of the source file, then NUMBA_CACHE_DIR or the user's cache folder. If none of them is
    writable (a read-only container) numba refuses to create a cache, and every process compiles separately.
    The global interpreter lock is released, and arithmetic is strict IEEE: a sum does not depend on how a
    loop was vectorised, and hence not on where an array was cropped.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return numba.njit(**_OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a small function into every compiled one that calls it.

    It is for inner loops: otherwise a call that returns a view of an array costs up to 15 % of a distance transform.
    """
    return numba.njit(inline="always", **_OPTIONS)(function)
