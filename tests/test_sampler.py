"""The plan of an epoch, and how processes share it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data.distributed import DistributedSampler

from volumen.data.index.patch_index import PatchIndex, PatchTable
from volumen.data.sampling.sampler import PatchSampler, plan_epoch, sample_rng


def table(count, presence=()):
    return PatchTable(
        region=np.zeros(count, np.int32),
        start=np.stack([np.arange(count)] * 2, 1).astype(np.int32),
        share=np.ones(count, np.float32),
        shifts=np.ones(count, np.uint64),
        class_shifts=np.array([[i in rows for i in range(count)] for rows in presence], np.uint64).reshape(
            len(presence), count
        ),
    )


def make_index(foreground, background=0, presence=()):
    return PatchIndex(
        patch_size=(4, 4),
        stride=(2, 2),
        regions=((0, ((0, 10_000), (0, 10_000))),),
        shifts=((0, 0),),
        classes=tuple(("t", k) for k in range(len(presence))),
        foreground=table(foreground, presence),
        background=table(background, [()] * len(presence)),
    )


@given(
    foreground=st.integers(1, 50),
    background=st.integers(0, 50),
    samples=st.integers(1, 300),
    ratio=st.floats(0, 3),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_patches_are_drawn_evenly_and_background_at_its_ratio(
    foreground, background, samples, ratio, seed, epoch
):
    index = make_index(foreground, background)
    options = {"seed": seed, "epoch": epoch, "samples": samples, "bg_to_fg_ratio": ratio}
    plan = plan_epoch(index, **options)
    again = plan_epoch(index, **options)
    assert np.array_equal(plan.row, again.row)
    empty = round(samples * ratio / (1 + ratio)) if background else 0
    assert plan.background.sum() == empty
    for kind, population in ((False, foreground), (True, background)):
        rows = plan.row[plan.background == kind]
        if len(rows):
            counts = np.bincount(rows, minlength=population)
            assert len(counts) == population
            assert counts.max() - counts.min() <= 1


def test_epochs_and_seeds_differ():
    index = make_index(100)
    orders = {tuple(plan_epoch(index, seed=s, epoch=e, samples=100).row) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_classes_are_oversampled_evenly():
    index = make_index(1000, presence=[(3,), range(0, 1000, 2), ()])
    plan = plan_epoch(index, seed=0, epoch=0, samples=300, class_oversampling=1 / 3)
    forced = plan.class_row >= 0
    assert np.bincount(plan.class_row[forced]).tolist() == [50, 50]
    assert set(plan.row[plan.class_row == 0]) == {3}
    assert all(row % 2 == 0 for row in plan.row[plan.class_row == 1])
    assert not plan.background.any()
    every = plan_epoch(index, seed=0, epoch=0, samples=300, class_oversampling=1)
    assert np.bincount(every.class_row).tolist() == [150, 150]


def test_oversampling_without_classes_draws_as_usual():
    plan = plan_epoch(make_index(10), seed=0, epoch=0, samples=10, class_oversampling=0.5)
    assert sorted(plan.row) == list(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bg_to_fg_ratio": -1}, "bg_to_fg_ratio must not be negative, got -1"),
        ({"class_oversampling": 2}, "class_oversampling must be a share between 0 and 1, got 2"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        plan_epoch(make_index(4), seed=0, epoch=0, samples=4, **options)
    with pytest.raises(ValueError, match="no patch to draw"):
        plan_epoch(make_index(0), seed=0, epoch=0, samples=4)


def test_sample_rng_depends_on_everything():
    draws = {sample_rng(s, e, i).integers(2**62) for s in range(3) for e in range(3) for i in range(3)}
    assert len(draws) == 27


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_processes_share_every_index_once(length, world_size, batch_size, epoch):
    samplers = [
        PatchSampler(length, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    drawn = [list(sampler) for sampler in samplers]
    assert [len(d) for d in drawn] == [len(s) for s in samplers]
    shared = length - length % world_size
    assert sorted(pair for d in drawn for pair in d) == [(epoch, i) for i in range(shared)]
    assert len({len(d) for d in drawn}) == 1
    assert all(s.steps == -(-len(s) // batch_size) for s in samplers)


def test_two_processes_see_what_one_sees_with_twice_the_batch():
    one = [i for _, i in PatchSampler(24, batch_size=6)]
    two = [[i for _, i in PatchSampler(24, batch_size=3, rank=r, world_size=2)] for r in range(2)]
    for step in range(4):
        together = two[0][3 * step : 3 * step + 3] + two[1][3 * step : 3 * step + 3]
        assert sorted(together) == one[6 * step : 6 * step + 6]


def test_monai_recognises_the_sampler():
    assert isinstance(PatchSampler(3), DistributedSampler)
    assert len(PatchSampler(range(7))) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must lie in 0 to 1, got 2"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ],
)
def test_bad_sampler_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PatchSampler(4, **options)
