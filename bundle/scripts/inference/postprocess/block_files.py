"""What a pass over blocks leaves for the next one: a small file per block, and a table of what all of them give.

Every file is there whole or not at all, so an interrupted pass goes on with the blocks that have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from volumen.utils.files.atomic import write_atomically


class BlockFiles:
    """The files of one pass.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, number: int) -> bool:
        """Whether a block is done, by its place in the order of all."""
        return self._path(number).exists()

    def save(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a block's file."""
        content: Any = arrays
        write_atomically(self._path(number), lambda stream: np.savez_compressed(stream, **content))

    def load(self, number: int, *names: str) -> dict[str, np.ndarray]:
        """Read arrays of a block's file, all without names."""
        with np.load(self._path(number)) as content:
            return {name: content[name] for name in names or content.files}

    @property
    def has_table(self) -> bool:
        """Whether all blocks are done and the table is made of them."""
        return (self.folder / "table.npy").exists()

    def save_table(self, offsets: np.ndarray, table: np.ndarray) -> None:
        """Write what is known of every number that blocks gave.

        Args:
            offsets: where each block's numbers start in the table, and its end, (blocks + 1,).
            table: per number.
        """
        write_atomically(self.folder / "offsets.npy", lambda stream: np.save(stream, offsets))
        write_atomically(self.folder / "table.npy", lambda stream: np.save(stream, table))

    def table(self, number: int) -> np.ndarray:
        """Return a block's part of the table."""
        offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
        table = np.load(self.folder / "table.npy", mmap_mode="r")
        return np.array(table[int(offsets[number]) : int(offsets[number + 1])])

    def _path(self, number: int) -> Path:
        return self.folder / f"block_{number}.npz"
