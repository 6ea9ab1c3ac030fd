"""Blending: equality with the plain computation, bounded memory, constants kept."""

from __future__ import annotations

import os

import numpy as np
import pytest

from volumen.inference.windows.blending import (
    BlockAccumulator,
    SpillFile,
    axis_weight_sums,
    divide_by_weights,
    gaussian_axis,
    gaussian_window,
)
from volumen.inference.windows.plan import PredictPlan


def test_weights_are_symmetric_positive_and_highest_in_the_middle():
    for size in (1, 2, 7, 64, 193):
        weights = gaussian_axis(size)
        np.testing.assert_allclose(weights, weights[::-1], rtol=1e-6)
        assert weights.min() >= np.exp(-8) * 0.999
        assert weights.argmax() in ((size - 1) // 2, size // 2)
    assert gaussian_window((4, 6)).shape == (4, 6)


def test_weights_are_those_of_monai_above_its_floor():
    from monai.data.utils import compute_importance_map

    theirs = compute_importance_map((16, 24, 8), mode="gaussian", sigma_scale=0.125).numpy()
    ours = gaussian_window((16, 24, 8))
    above = ours > 1e-3
    np.testing.assert_allclose(ours[above], theirs[above], rtol=1e-4)


def accumulate(plan, values, channels, tmp_path, budget, done=None, order=None):
    """Return the blended array of the plan; values(position) gives windows."""
    sums = axis_weight_sums(plan)
    weight = gaussian_window(plan.patch_size)
    result = np.full((channels, *plan.output_shape), np.nan, np.float32)
    with BlockAccumulator(plan, channels, budget, tmp_path, done) as accumulator:
        for position in range(len(plan)):
            window = values(position)
            for block, array, _ in accumulator.add(position, None if window is None else window * weight):
                box = plan.block_box(block)
                array = array[(slice(None), *(slice(0, b.stop - b.start) for b in box))]
                divide_by_weights(array, sums, box)
                result[(slice(None), *box)] = array
    return result, accumulator


@pytest.mark.parametrize("shape", [(5, 30, 17), (40, 9), (3, 3, 3)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_blending_a_constant_returns_the_constant(shape, overlap, tmp_path):
    plan = PredictPlan(shape, (8,) * len(shape), overlap, block_shape=(4,) * len(shape))
    constant = np.full((2, *plan.patch_size), 3.25, np.float32)
    result, _ = accumulate(plan, lambda _: constant, 2, tmp_path, 1 << 20)
    np.testing.assert_allclose(result, 3.25, rtol=1e-6)


def test_spilled_sums_are_the_same_bits(tmp_path):
    rng = np.random.default_rng(0)
    plan = PredictPlan((20, 40, 40), (8, 8, 8), 0.5, block_shape=(8, 8, 8), tile=(1, 2, 2))
    windows = rng.normal(size=(len(plan), 1, 8, 8, 8)).astype(np.float32)
    roomy, kept = accumulate(plan, lambda p: windows[p], 1, tmp_path, 1 << 30)
    tight, spilled = accumulate(plan, lambda p: windows[p], 1, tmp_path, 0)
    assert kept.spilled == 0
    assert spilled.spilled > 0
    np.testing.assert_array_equal(roomy, tight)
    assert list(tmp_path.iterdir()) == []


def test_only_blocks_on_the_borders_of_tiles_are_parked_and_those_a_few_times(tmp_path):
    plan = PredictPlan((64, 48, 48), (8, 8, 8), 0.5, block_shape=(8, 8, 8), tile=(1, 5, 5))
    column = 2 * 4 * 4  # blocks that one tile touches while it moves along the first axis
    window = np.ones((1, 8, 8, 8), np.float32)
    _, accumulator = accumulate(plan, lambda _: window, 1, tmp_path, column * 4 * 8**3)
    assert 0 < accumulator.spilled < 2 * np.prod(plan.blocks)


def test_finished_blocks_are_left_out_and_the_others_keep_their_bits(tmp_path):
    rng = np.random.default_rng(1)
    plan = PredictPlan((16, 30), (8, 8), 0.5, block_shape=(8, 8))
    windows = rng.normal(size=(len(plan), 1, 8, 8)).astype(np.float32)
    whole, _ = accumulate(plan, lambda p: windows[p], 1, tmp_path, 1 << 20)
    done = np.zeros(plan.blocks, bool)
    done[0, :2] = True
    rest, _ = accumulate(plan, lambda p: windows[p], 1, tmp_path, 1 << 20, done=done)
    assert np.isnan(rest[:, :8, :16]).all()
    known = ~np.isnan(rest)
    np.testing.assert_array_equal(rest[known], whole[known])


def test_blocks_of_skipped_windows_only_are_handed_out_empty(tmp_path):
    plan = PredictPlan((8, 16), (8, 8), 0.0, block_shape=(8, 8))
    with BlockAccumulator(plan, 1, 1 << 20, tmp_path) as accumulator:
        ((block, values, parts),) = accumulator.add(0, None)
    assert values is None
    assert block == (0, 0)
    assert parts == [(slice(0, 8), slice(0, 8))]


def test_the_spill_file_reuses_places(tmp_path):
    spill = SpillFile(tmp_path, (2, 3))
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 3), np.float32)
    spill.put((0,), first)
    spill.put((1,), second)
    np.testing.assert_array_equal(spill.take((0,)), first)
    spill.put((2,), second * 2)
    np.testing.assert_array_equal(spill.take((1,)), second)
    np.testing.assert_array_equal(spill.take((2,)), second * 2)
    assert spill._next == 2
    # The file has no name, so its room on the disk is free once it is closed.
    descriptor = spill._fd
    os.fstat(descriptor)
    spill.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
