"""The data loader that copies one batch ahead."""

from __future__ import annotations

import pytest
import torch

from volumen.data.sampling.loader import PatchLoader, on_device, one_ahead
from volumen.handlers.epochs import remaining_batches
from volumen.transforms.deferred import DeferredBatch, RawPatch


def test_the_next_item_is_started_before_the_current_one_is_used():
    seen = []

    def items():
        for number in range(3):
            seen.append(f"read {number}")
            yield number

    def start(item):
        seen.append(f"copy {item}")
        return item, item * 10

    for value in one_ahead(items(), start, lambda item, event: (item, event)):
        seen.append(f"use {value}")
    assert seen == [
        *("read 0", "copy 0", "read 1", "copy 1", "use (0, 0)"),
        *("read 2", "copy 2", "use (1, 10)", "use (2, 20)"),
    ]
    assert list(one_ahead([], start, lambda item, event: item)) == []


def test_facts_that_the_host_reads_are_not_copied():
    batch = {
        "image": torch.zeros(2, 1),
        "start": torch.zeros(2, 3),
        "wide/ink": torch.zeros(2),
        "wide/ink/flags": torch.ones(2),
        "wide/spacing": torch.ones(2),
        "volume_name": ["a", "b"],
        "deferred": DeferredBatch([RawPatch(image=torch.zeros(1, 2, 2))]),
    }
    moved = on_device(batch, torch.device("meta"))
    there = {key for key, value in moved.items() if getattr(value, "is_meta", False)}
    assert there == {"image", "wide/ink"}
    assert moved["deferred"].patches[0].image.is_meta
    assert moved["volume_name"] == ["a", "b"]


@pytest.mark.parametrize("done", [0, 2])
def test_on_a_cpu_it_is_monai_s_loader(done):
    loader = PatchLoader(torch.arange(10), device="cpu", batch_size=2)
    rest = remaining_batches(loader, done)
    assert isinstance(rest, PatchLoader)
    assert [batch.tolist() for batch in rest] == [[2 * n, 2 * n + 1] for n in range(done, 5)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_of_the_host():
    samples = [{"image": torch.randn(4, 64, 64), "start": torch.tensor([n])} for n in range(9)]
    loader = PatchLoader(samples, device="cuda", batch_size=2, pin_memory=True)
    for batch, expected in zip(loader, PatchLoader(samples, device="cpu", batch_size=2), strict=True):
        assert batch["image"].is_cuda
        assert torch.equal(batch["image"].cpu(), expected["image"])
