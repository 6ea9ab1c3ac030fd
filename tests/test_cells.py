"""Sums over cells and windows against counting voxel by voxel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from volumen.data.index.cells import (
    NONE_HIGH,
    NONE_LOW,
    AxisCut,
    cell_any,
    cell_extents,
    cell_sums,
    window_extremes,
    window_sums,
)

EDGES = {
    "even": [[2, 5, 8, 11], [0, 4, 8, 12], [1, 3, 5, 7]],
    "uneven": [[2, 3, 9, 11], [0, 5, 6, 12], [1, 2, 6, 7]],
    "beyond": [[-4, 2, 30], [3, 9, 40], [-1, 0, 1, 2, 50]],
}


def in_cells(edges, start, shape):
    """Yield the index of each cell among those that a block touches, and its voxels in the block."""
    kept = []
    for cuts, first, size in zip(edges, start, shape):
        spans = [(max(a, first) - first, min(b, first + size) - first) for a, b in itertools.pairwise(cuts)]
        kept.append([(a, b) for a, b in spans if a < b])
    for index in itertools.product(*(range(len(spans)) for spans in kept)):
        yield index, tuple(slice(*spans[i]) for spans, i in zip(kept, index))


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_cells_are_counted_as_voxels_are(name, share):
    edges = [np.array(cuts) for cuts in EDGES[name]]
    start, shape = (1, 2, 0), (11, 9, 8)
    block = np.random.default_rng(0).random(shape) < share
    cuts = [AxisCut.of(along, a, a + n) for along, a, n in zip(edges, start, shape)]
    inside = block[tuple(cut.crop for cut in cuts)]
    sums, found, extents = cell_sums(inside, cuts), cell_any(inside, cuts), cell_extents(inside, cuts)
    seen = 0
    for index, voxels in in_cells(edges, start, shape):
        true = np.argwhere(block[voxels])
        assert sums[index] == len(true)
        assert found[index] == bool(len(true))
        for axis, (low, high) in enumerate(extents):
            first = start[axis] + voxels[axis].start
            expected = (NONE_LOW, NONE_HIGH)
            if len(true):
                expected = (first + true[:, axis].min(), first + true[:, axis].max() + 1)
            assert (low[index], high[index]) == expected
        seen += 1
    assert seen == sums.size == np.prod([cut.cells.stop - cut.cells.start for cut in cuts])


def test_cells_of_a_block_are_numbered_as_in_the_grid():
    edges = np.array([0, 4, 8, 12, 16])
    assert AxisCut.of(edges, 4, 8).cells == slice(1, 2)
    assert AxisCut.of(edges, 5, 13).cells == slice(1, 4)
    assert AxisCut.of(edges, 16, 20) is None
    assert AxisCut.of(edges, -5, 0) is None


def test_a_wide_cell_beside_a_narrow_one_does_not_overflow():
    cuts = [AxisCut.of(np.array([0, 1, 700]), 0, 700), AxisCut.of(np.array([0, 300, 301]), 0, 301)]
    assert cell_sums(np.ones((700, 301), bool), cuts).tolist() == [[300, 1], [699 * 300, 699]]


def test_windows_are_summed_and_searched_as_they_overlap():
    generator = np.random.default_rng(0)
    cells = generator.integers(0, 200, (7, 6, 5)).astype(np.uint8)
    first, last = [], []
    for size in cells.shape:
        spans = [(a, b) for a in range(size) for b in range(a + 1, size + 1)]
        chosen = sorted(spans[i] for i in generator.choice(len(spans), 6, replace=False))
        first.append(np.array([a for a, _ in chosen]))
        last.append(np.array([b for _, b in chosen]))
    sums = window_sums(cells, first, last)
    low, high = (window_extremes(cells, first, last, ufunc) for ufunc in (np.minimum, np.maximum))
    for index in np.ndindex(sums.shape):
        window = cells[tuple(slice(a[i], b[i]) for a, b, i in zip(first, last, index))]
        assert (sums[index], low[index], high[index]) == (window.sum(), window.min(), window.max())


def test_sums_stay_exact_where_their_running_total_wraps_around():
    cells = np.full(4, 2**31, np.uint32)
    found = window_sums(cells, [np.arange(4)], [np.arange(1, 5)])
    assert found.tolist() == [2**31] * 4
