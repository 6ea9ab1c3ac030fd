"""The plan of windows: coverage, order, blocks, bounded frontier."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volumen.inference.windows.plan import (
    MOST_GROWTH,
    PredictPlan,
    axis_starts,
    choose_block_shape,
    choose_tile,
    fit_window,
)


@given(st.integers(1, 200), st.integers(1, 64), st.floats(0, 0.95))
def test_windows_cover_an_axis_and_stay_inside(size, patch, overlap):
    starts = axis_starts(size, patch, overlap)
    assert list(starts) == sorted(set(starts))
    if size <= patch:
        assert len(starts) == 1
        assert starts[0] <= 0
        assert starts[0] + patch >= size
        return
    assert starts[0] == 0
    assert starts[-1] == size - patch
    steps = np.diff(starts)
    assert steps.max() <= max(1, round(patch * (1 - overlap)))


def test_strides_and_counts_are_those_of_nnunet():
    assert axis_starts(192, 64, 0.5) == (0, 32, 64, 96, 128)
    assert axis_starts(100, 64, 0.5) == (0, 32, 36)
    assert axis_starts(30, 64, 0.5) == (-17,)


@pytest.mark.parametrize(("size", "patch", "overlap"), [(0, 4, 0.5), (4, 0, 0.5), (4, 4, 1.0), (4, 4, -0.1)])
def test_impossible_axes_are_refused(size, patch, overlap):
    with pytest.raises(ValueError, match="got"):
        axis_starts(size, patch, overlap)


def tiled_order(plan):
    """Return the windows in the order of work by sorting them: tile by tile, the first axis within a tile."""
    windows = itertools.product(*(range(len(starts)) for starts in plan.starts))
    tile = plan.tile
    return sorted(windows, key=lambda w: ([n // t for n, t in zip(w[1:], tile[1:])], w))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_of_all_windows_tile_the_region_once_per_window(data):
    ndim = data.draw(st.integers(2, 3))
    shape = tuple(data.draw(st.integers(1, 25)) for _ in range(ndim))
    region = []
    for n in shape:
        low = data.draw(st.integers(0, n - 1))
        region.append((low, data.draw(st.integers(low + 1, n))))
    plan = PredictPlan(
        shape,
        tuple(data.draw(st.integers(1, 9)) for _ in range(ndim)),
        data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.7])),
        region=tuple(region),
        block_shape=tuple(data.draw(st.integers(1, 8)) for _ in range(ndim)),
        tile=(1, *(data.draw(st.integers(1, 4)) for _ in range(ndim - 1))),
    )
    assert [plan.numbers(position) for position in range(len(plan))] == tiled_order(plan)
    assert [plan.position(numbers) for numbers in tiled_order(plan)] == list(range(len(plan)))
    counts = np.zeros(plan.blocks, dtype=int)
    cover = np.zeros(plan.output_shape, dtype=int)
    direct = np.zeros(plan.output_shape, dtype=int)
    for position in range(len(plan)):
        start = plan.start(position)
        place = tuple(
            slice(max(s, low) - low, min(s + p, high) - low)
            for s, p, (low, high) in zip(start, plan.patch_size, plan.box)
        )
        direct[place] += 1
        for block, in_window, in_block in plan.parts(position):
            counts[block] += 1
            box = plan.block_box(block)
            target = tuple(slice(b.start + i.start, b.start + i.stop) for b, i in zip(box, in_block))
            cover[target] += 1
            for axis in range(ndim):
                voxel = plan.box[axis][0] + target[axis].start
                assert in_window[axis].start == voxel - start[axis]
        touched = plan.touched(position)
        assert {b for b, _, _ in plan.parts(position)} == set(
            itertools.product(*(range(t.start, t.stop) for t in touched))
        )
    np.testing.assert_array_equal(cover, direct)
    for block in np.ndindex(*plan.blocks):
        assert counts[block] == plan.windows_of_block(block)
    assert direct.min() >= 1


def test_windows_of_a_region_are_those_of_the_whole():
    whole = PredictPlan((40, 50), (8, 8), 0.5)
    part = PredictPlan((40, 50), (8, 8), 0.5, region=((13, 22), (30, 50)))
    starts = {part.start(i) for i in range(len(part))}
    assert starts == {
        (y, x)
        for y, x in (whole.start(i) for i in range(len(whole)))
        if set(range(y, y + 8)) & set(range(13, 22)) and set(range(x, x + 8)) & set(range(30, 50))
    }


def test_block_shapes_are_powers_of_two_within_patch_and_output():
    assert choose_block_shape((1000, 1000, 1000), (192, 192, 192)) == (128, 128, 128)
    assert choose_block_shape((20, 1000, 1000), (8, 256, 256)) == (8, 128, 128)
    assert choose_block_shape((30, 600), (320, 224)) == (30, 128)


def test_a_tile_fits_its_budget_and_is_at_least_two_wide():
    assert choose_tile((64, 64, 64), 0.5, 1, 1) == (1, 2, 2)
    for channels in (1, 3):
        tile = choose_tile((16, 64, 64), 0.25, channels, 1 << 25)
        side, wider = (64 + (windows - 1) * 48 for windows in (tile[1], tile[1] + 1))
        assert 4 * channels * 16 * side**2 <= 1 << 25 < 4 * channels * 16 * wider**2


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_windows_of_a_box_of_blocks_are_those_that_touch_it_in_order(data):
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    plan = PredictPlan(
        shape, (6, 8), data.draw(st.sampled_from([0.0, 0.5, 0.7])), block_shape=(4, 8), tile=(1, 3)
    )
    box = []
    for n in plan.blocks:
        first = data.draw(st.integers(0, n - 1))
        box.append((first, data.draw(st.integers(first + 1, n))))
    inside = set(itertools.product(*(range(a, b) for a, b in box)))
    touching = [p for p in range(len(plan)) if inside & {block for block, _, _ in plan.parts(p)}]
    assert list(plan.positions(plan.windows_touching(box))) == touching


@given(
    divisor=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=3),
    data=st.data(),
)
def test_a_window_for_a_small_image_holds_it_as_the_network_allows(divisor, data):
    usual = tuple(step * data.draw(st.integers(2, 6)) for step in divisor)
    shape = tuple(data.draw(st.integers(1, 100)) for _ in divisor)
    window = fit_window(usual, shape, divisor)
    assert all(side % step == 0 for side, step in zip(window, divisor))
    if all(size > side - step for size, side, step in zip(shape, usual, divisor)):
        assert window == usual
    assert math.prod(window) <= MOST_GROWTH * math.prod(usual)
    # Something is left to normalise over in the last stage.
    assert window != tuple(divisor) or usual == tuple(divisor)
    most = tuple(-(-size // step) * step for size, step in zip(shape, divisor))
    if most != tuple(divisor):
        for side, other, size, step in zip(window, usual, shape, divisor):
            # Less than one divisor is reflected, and what is shorter than the usual side holds the image.
            assert side - size < step
            assert side >= min(other, size)


def test_windows_of_thin_images_grow_along_the_other_axes():
    assert fit_window((64, 64, 64), (20, 250, 250), (16, 16, 16)) == (32, 128, 128)
    assert fit_window((64, 64, 64), (20, 100, 250), (16, 16, 16)) == (32, 112, 144)
    assert fit_window((8, 128, 128), (6, 1024, 1024), (1, 16, 16)) == (6, 208, 208)
    assert fit_window((64, 64, 64), (64, 70, 250), (16, 16, 16)) == (64, 64, 64)
