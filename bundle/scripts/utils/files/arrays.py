"""Reads NumPy's array files in threads.

NumPy parses the header of a file with `ast.literal_eval`. Up to Python 3.12 the parser counts its depth for all threads
together (github.com/python/cpython/issues/106905): if two threads parse at once, one may end with "AST constructor
recursion depth mismatch". So one thread at a time reads a header here.
"""

from __future__ import annotations

import os
import threading

import numpy as np

_ONE = threading.Lock()


def read_array(path: str | os.PathLike, *, mapped: bool = True) -> np.ndarray:
    """Return the array of an .npy file.

    Args:
        path: the file.
        mapped: map the file into memory, read-only, instead of reading it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    with _ONE:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def read_arrays(path: str | os.PathLike, *names: str) -> dict[str, np.ndarray]:
    """Return the named arrays of an .npz file, all of them without names.

    Raises:
        OSError: the file cannot be read.
        KeyError: it lacks a name.
        ValueError, zipfile.BadZipFile: it is no such file, or damaged.
    """
    with _ONE, np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in names or content.files}
