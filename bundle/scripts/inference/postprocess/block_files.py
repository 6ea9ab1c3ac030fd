"""Files that a pass over blocks writes for the next pass: a small file per block, and a table for all of them.

Files are written atomically, so that an interrupted pass continues with the blocks that have no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from volumen.utils.files.arrays import read_array, read_arrays
from volumen.utils.files.atomic import write_atomically


class BlockFiles:
    """The files of one pass.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, number: int) -> bool:
        """Whether the block with a number is finished."""
        return self._path(number).exists()

    def save(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a block's file."""
        content: Any = arrays
        write_atomically(self._path(number), lambda stream: np.savez_compressed(stream, **content))

    def load(self, number: int, *names: str) -> dict[str, np.ndarray]:
        """Read the named arrays of a block's file; without names, all of them."""
        return read_arrays(self._path(number), *names)

    def forget(self, numbers: Iterable[int]) -> None:
        """Remove the table, and the files of blocks."""
        for name in ("table.npy", "offsets.npy"):
            (self.folder / name).unlink(missing_ok=True)
        for number in numbers:
            self._path(number).unlink(missing_ok=True)

    @property
    def has_table(self) -> bool:
        """Whether the table exists, which is computed after all blocks."""
        return (self.folder / "table.npy").exists()

    def save_table(self, offsets: np.ndarray, table: np.ndarray) -> None:
        """Write the table of all components or instances, by their numbers in the blocks.

        Args:
            offsets: first row of each block in the table, and the end of the table, (blocks + 1,).
            table: one row per number.
        """
        write_atomically(self.folder / "offsets.npy", lambda stream: np.save(stream, offsets))
        write_atomically(self.folder / "table.npy", lambda stream: np.save(stream, table))

    def table(self, number: int) -> np.ndarray:
        """Return a block's part of the table."""
        offsets = read_array(self.folder / "offsets.npy")
        table = read_array(self.folder / "table.npy")
        return np.array(table[int(offsets[number]) : int(offsets[number + 1])])

    def _path(self, number: int) -> Path:
        return self.folder / f"block_{number}.npz"
