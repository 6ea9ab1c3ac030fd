"""The scores by which the benchmark compares both systems, against loops over single voxels."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def versus():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import versus_nnunet

        yield versus_nnunet
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def boundary(mask: np.ndarray) -> set[tuple[int, ...]]:
    """Return the voxels of a mask with a face neighbour inside the array that is not in it."""
    found = set()
    for place in zip(*np.nonzero(mask)):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            near = list(place)
            near[axis] += step
            if 0 <= near[axis] < mask.shape[axis] and not mask[tuple(near)]:
                found.add(tuple(map(int, place)))
    return found


def share_near(edge: set, other: set, valid: np.ndarray) -> tuple[int, int]:
    own = [place for place in edge if valid[place]]
    near = [p for p in own if any(sum(abs(a - b) for a, b in zip(p, q)) <= 1 for q in other)]
    return len(near), len(own)


@pytest.mark.parametrize("shape", [(9, 12), (5, 6, 7)])
def test_scores_equal_those_of_loops(versus, shape):
    random = np.random.default_rng(len(shape))
    truth, found, valid = (random.random(shape) < share for share in (0.6, 0.5, 0.8))
    dice, edges = versus.ratios([part.sum() for part in versus.counted(truth, found, valid)])
    both = sum(bool(truth[p] and found[p] and valid[p]) for p in np.ndindex(shape))
    each = sum(int(truth[p] and valid[p]) + int(found[p] and valid[p]) for p in np.ndindex(shape))
    assert dice == pytest.approx(2 * both / each)
    counts = [share_near(boundary(a), boundary(b), valid) for a, b in ((truth, found), (found, truth))]
    expected = sum(near for near, _ in counts) / sum(count for _, count in counts)
    assert edges == pytest.approx(expected)


def test_nothing_in_both_is_no_score(versus):
    nothing = np.zeros((4, 4), bool)
    assert np.isnan(versus.ratios([part.sum() for part in versus.counted(nothing, nothing, ~nothing)])).all()


def test_blocks_cover_every_voxel_once(versus):
    covered = np.zeros((150, 40, 65), int)
    for box in versus.blocks(covered.shape):
        covered[box] += 1
    assert (covered == 1).all()


def test_rows_come_back_and_units_are_paired(versus, tmp_path):
    head = dict(zip(versus.COLUMNS, ("set", "volumen", "0", "60", 61, 100, "8x8", 2)))
    path = tmp_path / "rows.csv"
    for system, better in (("volumen", 0.1), ("nnU-Net", 0.0)):
        rows = [
            {
                **head,
                "system": system,
                "unit": str(unit),
                "label": 1,
                "dice": 0.5 + unit / 10 + better,
                "boundary": 0.5,
            }
            for unit in range(4)
        ]
        versus.append_rows(path, rows)
    rows = versus.read_rows(path)
    assert len(rows) == 8
    assert versus.table(rows).splitlines()[-1] == (
        "| difference | | | | | 0.100 (0.100 to 0.100) | 0.000 (0.000 to 0.000) |"
    )
