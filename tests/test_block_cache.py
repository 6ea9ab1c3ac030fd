"""The cache of decoded blocks: bounded, least recently used first, safe between threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from volumen.data.caching.block_cache import BlockCache


def block(value: int, size: int = 10) -> np.ndarray:
    return np.full(size, value, "u1")


def test_oldest_goes_first():
    cache, made = BlockCache(30), []

    def get(key):
        def make():
            made.append(key)
            return block(key)

        assert cache.get(key, make)[0] == key

    for key in (1, 2, 3, 1, 4, 1, 2):
        get(key)
    assert made == [1, 2, 3, 4, 2]
    assert cache.nbytes == 30


def test_large_blocks_are_not_kept():
    cache = BlockCache(30)
    assert cache.largest == 15
    cache.get("large", lambda: block(1, 16))
    assert cache.nbytes == 0


def test_kept_blocks_cannot_be_written():
    cache = BlockCache(30)
    with pytest.raises(ValueError, match="read-only"):
        cache.get(1, lambda: block(1))[0] = 2


def test_resize_and_clear():
    cache = BlockCache(100)
    for key in range(5):
        cache.get(key, lambda key=key: block(key))
    cache.resize(20)
    assert (cache.nbytes, cache.max_bytes) == (20, 20)
    cache.clear()
    assert cache.nbytes == 0


def test_failures_are_not_kept():
    cache = BlockCache(100)
    with pytest.raises(OSError, match="lost"):
        cache.get(1, lambda: (_ for _ in ()).throw(OSError("lost")))
    assert cache.get(1, lambda: block(7))[0] == 7


def test_threads_keep_count():
    cache = BlockCache(200)

    def work(seed):
        for key in np.random.default_rng(seed).integers(0, 40, 500):
            assert cache.get(int(key), lambda key=key: block(int(key)))[0] == key

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert cache.nbytes == 10 * len(cache._blocks) <= 200
