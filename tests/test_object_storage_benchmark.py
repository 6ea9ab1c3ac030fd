"""The simulated object storage: patches are right, and requests are in flight together."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("aiohttp")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import object_storage

    return object_storage


def test_readers_have_all_chunks_of_their_patches_in_flight(benchmark, tmp_path):
    values = benchmark.write_volume(tmp_path, 48, 16)
    with benchmark.storage(tmp_path, 0.1, 1e8) as url:
        one = benchmark.read_patches(url, 48, 16, 1, 3)
        three = benchmark.read_patches(url, 48, 16, 3, 6)
    for (z, y, x), total in {**one["sums"], **three["sums"]}.items():
        assert total == values[z : z + 16, y : y + 16, x : x + 16].sum(dtype=np.int64)
    assert len(one["sums"]) == 3
    # Chunks of one patch are requested together, and several readers do so at the same time.
    assert 1 < one["most_in_flight"] <= 8
    assert one["most_in_flight"] < three["most_in_flight"] <= 24
    assert 1 < one["requests_per_patch"] <= 8


def test_bytes_wait_for_the_line(benchmark, tmp_path):
    import asyncio

    storage = benchmark.Storage(tmp_path, 0.0, 1e3)

    async def three():
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(storage._share_line(100) for _ in range(3)))
        return loop.time() - began

    assert asyncio.run(three()) >= 0.3 - 1e-3
