"""Arrays in files whose whole space is taken when they are made: a full disk would else end the process later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from volumen.checkpoints.file import writing_failed


def scratch_array(path: Path, dtype: DTypeLike, shape: Sequence[int]) -> Any:
    """Return an array of zeros in a new file, mapped into memory.

    Raises:
        VolumenError: the disk has too little space.
    """
    try:
        array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), tuple(shape))
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise writing_failed(path, error, go_on="give the command again, or another -o") from error
    return array
