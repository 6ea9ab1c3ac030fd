"""Betti numbers, Euler characteristics and common features against scikit-image, gudhi and linear algebra."""

from __future__ import annotations

import numpy as np
import pytest

from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.surface_blocks import surface_distances
from volumen.metrics.surface_challenge import ChallengeTopology, challenge_score
from volumen.metrics.topology.counts import betti_numbers, euler_characteristic
from volumen.metrics.topology.homology import _closure, cell_homology, match_features


def noise(seed, shape):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < rng.uniform(0.1, 0.9)


@pytest.mark.parametrize("connectivity", ["26/6", "6/26"])
@pytest.mark.parametrize("shape", [(6, 8, 9), (12, 11)])
def test_the_euler_characteristic_is_scikit_image_s_and_that_of_the_betti_numbers(connectivity, shape):
    euler_number = pytest.importorskip("skimage.measure").euler_number
    degree = len(shape) if connectivity == "26/6" else 1
    for seed in range(12):
        mask = noise(seed, shape)
        b0, b1, b2 = betti_numbers(mask, connectivity)
        assert min(b0, b1, b2) >= 0
        assert euler_characteristic(mask, connectivity) == euler_number(mask, degree) == b0 - b1 + b2
        assert b2 == 0 or len(shape) == 3


@pytest.mark.parametrize("shape", [(6, 8, 9), (12, 11)])
def test_betti_numbers_are_those_of_persistent_homology(shape):
    gudhi = pytest.importorskip("gudhi")
    for seed in range(12):
        mask = noise(seed, shape)
        # Voxels as closed cells of the highest dimension: 26/6. As vertices: 6/26.
        for cells, connectivity in (("top_dimensional_cells", "26/6"), ("vertices", "6/26")):
            complex_ = gudhi.CubicalComplex(**{cells: np.where(mask, 0.0, 1.0)})
            complex_.compute_persistence(homology_coeff_field=2)
            found = [*complex_.persistent_betti_numbers(0.5, 0.5), 0, 0][:3]
            assert tuple(found) == betti_numbers(mask, connectivity), (seed, connectivity)


def test_known_shapes():
    ring = np.zeros((5, 9, 9), bool)
    ring[2, 2:7, 2:7] = True
    ring[2, 4, 4] = False
    assert betti_numbers(ring) == (1, 1, 0)
    shell = np.ones((5, 5, 5), bool)
    shell[2, 2, 2] = False
    assert betti_numbers(shell) == (1, 0, 1)
    corner = np.zeros((4, 4, 4), bool)
    corner[1, 1, 1] = corner[2, 2, 2] = True
    assert betti_numbers(corner, "26/6")[0] == 1
    assert betti_numbers(corner, "6/26")[0] == 2
    assert betti_numbers(ring[2]) == (1, 1, 0)
    assert betti_numbers(np.zeros((3, 3, 3), bool)) == (0, 0, 0)


def closed_cells(mask):
    cells = np.zeros(tuple(2 * n + 1 for n in mask.shape), np.uint8)
    _closure(np.ascontiguousarray(mask).view(np.uint8), cells, 1)
    return cells > 0


def reduced(matrix):
    """Return the row echelon form modulo 2 and the rank."""
    m, rank = matrix.astype(np.uint8) % 2, 0
    for column in range(m.shape[1]):
        rows = np.flatnonzero(m[rank:, column])
        if len(rows):
            m[[rank, rank + rows[0]]] = m[[rank + rows[0], rank]]
            others = np.flatnonzero(m[:, column])
            m[others[others != rank]] ^= m[rank]
            rank += 1
        if rank == len(m):
            break
    return m, rank


def cycles(boundary):
    """Return a basis of the kernel of a matrix modulo 2, as columns."""
    rows, columns = boundary.shape
    wide = np.concatenate([boundary.T, np.eye(columns, dtype=np.uint8)], axis=1)
    echelon, _ = reduced(wide)
    return echelon[~echelon[:, :rows].any(axis=1), rows:].T


def common_by_linear_algebra(pred, truth):
    """Return the dimensions of the intersections of the images of the homology of both in that of their union."""
    union = closed_cells(pred | truth)
    places = [
        {
            tuple(cell): i
            for i, cell in enumerate(np.argwhere(union & (odd_coordinates(union.shape) == k)).tolist())
        }
        for k in range(4)
    ]
    boundary = [np.zeros((0, len(places[0])), np.uint8)]
    for k in (1, 2, 3):
        matrix = np.zeros((len(places[k - 1]), len(places[k])), np.uint8)
        for cell, column in places[k].items():
            for axis in range(3):
                for step in (-1, 1) if cell[axis] % 2 else ():
                    matrix[places[k - 1][tuple(np.add(cell, step * np.eye(3, dtype=int)[axis]))], column] ^= 1
        boundary.append(matrix)
    found = []
    for k in range(3):

        def rank_with(*masks, k=k):
            columns = [boundary[k + 1]]
            for mask in masks:
                cells = closed_cells(mask)
                own = [i for cell, i in places[k].items() if cells[cell]]
                basis = np.zeros((len(places[k]), 0), np.uint8)
                if own:
                    kernel = cycles(boundary[k][:, own])
                    basis = np.zeros((len(places[k]), kernel.shape[1]), np.uint8)
                    basis[own] = kernel
                columns.append(basis)
            return reduced(np.concatenate(columns, axis=1))[1]

        base = rank_with()
        ranks = [rank_with(pred) - base, rank_with(truth) - base, rank_with(pred, truth) - base]
        found.append(ranks[0] + ranks[1] - ranks[2])
    return tuple(found)


def odd_coordinates(shape):
    return sum(
        np.arange(n).reshape([-1 if i == axis else 1 for i in range(3)]) % 2 for axis, n in enumerate(shape)
    )


def test_common_features_are_those_of_linear_algebra():
    seen = np.zeros(3, int)
    for seed in range(14):
        rng = np.random.default_rng(seed)
        pred = np.ones((3, 5, 4), bool) if seed % 2 else rng.random((3, 5, 4)) < 0.6
        pred[1, 1 : 2 + seed % 3, 1:3] = False
        pred[rng.random(pred.shape) < 0.08] = False
        truth = pred ^ (rng.random(pred.shape) < 0.12)
        found = match_features(pred, truth)
        assert found.matched == common_by_linear_algebra(pred, truth), seed
        assert found.pred == betti_numbers(pred)
        seen += found.matched
    assert (seen > 1).all()


def test_the_homology_of_a_closed_set_of_cells_is_that_of_the_voxels():
    for seed in range(8):
        mask = noise(seed, (5, 6, 7))
        assert cell_homology(closed_cells(mask)) == betti_numbers(mask)[:2]


def test_a_filled_hole_and_a_joined_pair_are_no_common_features():
    truth = np.zeros((9, 20, 20), bool)
    truth[2, 2:18, 2:18] = truth[6, 2:18, 2:18] = True
    pred = truth.copy()
    pred[2:7, 10, 10] = True
    assert match_features(pred, truth).matched == (1, 0, 0)
    holed = truth.copy()
    holed[2, 5:8, 5:8] = False
    assert match_features(holed, truth).matched == (2, 0, 0)
    assert match_features(holed, holed).matched == (2, 1, 0)


def test_the_challenge_s_score_by_hand():
    truth = np.zeros((9, 20, 20), bool)
    truth[2, 2:18, 2:18] = truth[6, 2:18, 2:18] = True
    pred = truth.copy()
    pred[3:6, 10, 10] = True
    topology = ChallengeTopology()
    topology.add(pred, truth)
    # Components: one of 1 + 2 is common. Neither has tunnels or cavities, which then do not count.
    assert topology.score() == pytest.approx(2 / 3)
    labels = np.zeros(truth.shape, np.uint8)
    labels[2], labels[6] = truth[2], 2 * truth[6]
    table = overlaps(pred.astype(np.uint8), labels)
    n = np.array([256, 256, 3])
    merge = (n / n.sum() * np.log2(n.sum() / n)).sum()
    distances = surface_distances(pred, truth, border=True)
    expected = 0.3 * 2 / 3 + 0.35 * 1.0 + 0.35 / (1 + 0.3 * merge)
    assert challenge_score(distances, table, topology) == pytest.approx(expected)
    with_hole = truth.copy()
    with_hole[2, 5:8, 5:8] = False
    alone = ChallengeTopology()
    alone.add(with_hole, truth)
    assert alone.score() == pytest.approx((0.34 * 1 + 0.33 * 0.5 / 1.5) / 0.67)
