"""A cache of decoded blocks with a size limit, shared by all volumes of a process."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import numpy as np

DEFAULT_BYTES = 128 * 2**20


class BlockCache:
    """Stores the most recently used decoded blocks, up to a number of bytes.

    A patch rarely ends where a stored block ends, so its neighbours need the same blocks again.
    Blocks are marked read-only, so callers must copy the values that they return.

    Args:
        max_bytes: memory that all blocks together may take; 0 stores none.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def largest(self) -> int:
        """Size of the largest block that is stored: half of the limit."""
        return self._max_bytes // 2

    @property
    def nbytes(self) -> int:
        return self._bytes

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the block of a key; `make` computes it if it is not stored.

        Two threads that miss the block at the same time both compute it. A block larger than `largest` is not stored.
        """
        block = self.find(key)
        if block is None:
            block = make()
            self.keep(key, block)
        return block

    def find(self, key: Hashable) -> np.ndarray | None:
        """Return the block of a key, or None if it is not stored."""
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
            return block

    def keep(self, key: Hashable, block: np.ndarray) -> None:
        """Store a block, unless it is larger than `largest`."""
        if block.nbytes > self.largest:
            return
        block.flags.writeable = False
        with self._lock:
            if key in self._blocks:
                return
            self._blocks[key] = block
            self._bytes += block.nbytes
            while self._bytes > self._max_bytes:
                _, oldest = self._blocks.popitem(last=False)
                self._bytes -= oldest.nbytes

    def resize(self, max_bytes: int) -> None:
        """Change the limit and drop the oldest blocks beyond it."""
        with self._lock:
            self._max_bytes = max_bytes
            while self._bytes > max_bytes:
                _, oldest = self._blocks.popitem(last=False)
                self._bytes -= oldest.nbytes

    @contextmanager
    def paused(self, enabled: bool = True) -> Iterator[None]:
        """Store no block meanwhile, for a pass that needs each once; filling takes three times as long as decoding."""
        before = self._max_bytes
        if enabled:
            self.resize(0)
        try:
            yield
        finally:
            self.resize(before)

    def clear(self) -> None:
        """Drop all blocks."""
        with self._lock:
            self._blocks.clear()
            self._bytes = 0

    def _after_fork(self) -> None:
        # The lock may have been held by a thread that the child does not have.
        self._lock = threading.Lock()


BLOCKS = BlockCache()
"""The cache of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BLOCKS._after_fork)
