"""Thickness, gaps, curvature, contrast and distances of labels: analytic shapes, independent references, any block."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from volumen.metrics.geometry.contrast import surface_contrast
from volumen.metrics.geometry.counts import QuantityCounts, error_kinds, round_edges
from volumen.metrics.geometry.curvature import mean_curvature, object_surfaces
from volumen.metrics.geometry.distances import filled, nearest_places, squared_to, squared_to_other
from volumen.metrics.geometry.scale import NEAR, RADIUS, Scale
from volumen.metrics.geometry.suspects import MISSING, WRONG, SuspectPiece, SuspectTally, piece_region
from volumen.metrics.geometry.tally import (
    ALL,
    BORDER,
    CONTRAST,
    CURVATURE,
    EDGE,
    GAP,
    THICKNESS,
    GeometryTally,
    Piece,
)  # fmt: skip
from volumen.metrics.geometry.thickness import local_thickness
from volumen.metrics.grid import BlockGrid, three_axes

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 1.0, 1.5), (12.1, 1.0, 1.0), (2.0, 0.5)]


def blobs(shape, sigma, share, seed=0):
    values = gaussian_filter(np.random.default_rng(seed).random(shape), sigma)
    return values > np.quantile(values, 1 - share)


def cells(shape, seed=0):
    """Return touching objects of large numbers, with some background."""
    rng = np.random.default_rng(seed)
    seeds = rng.random(shape) < 0.002
    nearest = distance_transform_edt(~seeds, return_indices=True)[1]
    numbers = np.cumsum(seeds.ravel()).reshape(shape)[tuple(nearest)]
    return numbers * blobs(shape, 4, 0.7, seed) * 2**40


def tally(truth, pred, known=None, image=None, spacing=None, side=1000, hit=None, parts=1):
    """Count errors by blocks; `parts` accumulators share the blocks and are merged."""
    spacing = spacing or (1.0,) * truth.ndim
    scale, grid = Scale(spacing), BlockGrid.of(truth.shape, side)
    known = np.ones(truth.shape, bool) if known is None else known
    hit = (truth > 0) & pred if hit is None else hit
    truth, pred, known, hit = (three_axes(x) for x in (truth, pred, known, hit))
    image = None if image is None else three_axes(image)
    tallies = [GeometryTally(min(spacing)) for _ in range(parts)]
    for number in np.random.default_rng(side).permutation(len(grid)):
        box = grid.box(int(number))
        outer = piece_region(box, grid, scale.wide_halo)
        arrays = [None if x is None else x[outer] for x in (truth, pred, hit, known, image)]
        tallies[number % parts].add(Piece(box, outer, *arrays), scale, [(0, n) for n in grid.shape])
    for other in tallies[1:]:
        tallies[0].merge(other)
    return tallies[0]


def bins_with(rows, column):
    return [(row.low, row.high) for row in rows if getattr(row, column)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["mask", "partly known", "instances"])
def test_blocks_of_any_size_and_order_count_as_the_whole(spacing, kind):
    shape = {(12.1, 1.0, 1.0): (10, 60, 52), (2.0, 0.5): (110, 130)}.get(spacing, (38, 60, 52))
    truth = cells(shape) if kind == "instances" else blobs(shape, 4, 0.4)
    pred = (truth > 0) ^ blobs(shape, 2, 0.1, 1)
    known = None if kind == "mask" else ~blobs(shape, 8, 0.3, 2)
    image = np.random.default_rng(3).normal(size=shape).astype(np.float32) + (truth > 0)
    whole = tally(truth, pred, known, image, spacing)
    assert set(whole.counts) == {ALL, CURVATURE, THICKNESS, GAP, BORDER, EDGE, CONTRAST}
    assert (EDGE in whole.tables()) == (known is not None)
    for side, parts in ((17, 3), (40, 1)):
        found = tally(truth, pred, known, image, spacing, side, parts=parts)
        for quantity, counts in whole.counts.items():
            assert np.array_equal(found.counts[quantity].steps, counts.steps), quantity
            assert np.array_equal(found.counts[quantity].counts, counts.counts), quantity


def test_blocks_counted_by_dask_workers_count_as_the_whole():
    dask = pytest.importorskip("dask")
    truth, grid, scale = blobs((30, 40, 44), 4, 0.4), BlockGrid.of((30, 40, 44), 20), Scale((2.0, 1.0, 1.0))
    pred, known = truth ^ blobs(truth.shape, 2, 0.1, 1), np.ones(truth.shape, bool)

    @dask.delayed(pure=False)
    def one(number):
        counts, suspects = GeometryTally(1.0), SuspectTally(grid, scale, MISSING)
        box = grid.box(number)
        outer = piece_region(box, grid, scale.halo)
        arrays = [x[outer] for x in (truth, pred, truth & pred, known)]
        counts.add(Piece(box, outer, *arrays), scale, [(0, n) for n in grid.shape])
        suspects.add(number, SuspectPiece(box, outer, arrays[0], arrays[1], arrays[3], None))
        return pickle.dumps((counts, suspects))

    parts = dask.compute(*[one(number) for number in grid], scheduler="threads", num_workers=2)
    whole, pieces = GeometryTally(1.0), SuspectTally(grid, scale, MISSING)
    for counts, found in map(pickle.loads, parts):
        whole.merge(counts)
        pieces.merge(found)
    expected = tally(truth, pred, known, spacing=(2.0, 1.0, 1.0))
    assert repr(whole.tables()) == repr(expected.tables())
    boxes = [(s.low, s.high, s.voxels) for s in pieces.suspects(99)]
    assert boxes
    alone = suspects(MISSING, truth, pred, known, spacing=(2.0, 1.0, 1.0))
    assert boxes == [(s.low, s.high, s.voxels) for s in alone]


@pytest.mark.parametrize("spacing", SPACINGS[:3])
def test_distances_are_those_of_scipy_up_to_the_reach(spacing):
    scale, mask = Scale(spacing), blobs((20, 40, 36), 3, 0.3)
    found = np.sqrt(squared_to(mask, scale, scale.radius))
    expected = distance_transform_edt(~mask, sampling=spacing)
    near = expected <= scale.radius
    assert np.allclose(found[near], expected[near], rtol=1e-6)
    assert (found[~near] > scale.radius * (1 - 1e-6)).all()
    both = np.sqrt(squared_to_other(mask.astype(np.int32), scale, scale.radius))
    expected = np.where(mask, distance_transform_edt(mask, sampling=spacing), expected)
    near = expected <= scale.radius
    assert np.allclose(both[near], expected[near], rtol=1e-6)
    places = nearest_places(np.argwhere(~mask), mask, scale, scale.near)
    there = places[:, 0] >= 0
    gaps = (places - np.argwhere(~mask)) * np.array(spacing)
    away = distance_transform_edt(~mask, sampling=spacing)[~mask]
    assert np.array_equal(there, away <= NEAR * min(spacing) * (1 + 1e-6))
    assert np.allclose(np.sqrt((gaps[there] ** 2).sum(axis=1)), away[there])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (4.6, 2.0, 7.0)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slabs_and_the_gap_between_them_have_their_thickness_exactly(spacing, axis):
    scale = Scale(spacing)
    for voxels in range(1, 8):
        numbers = np.zeros((40, 40, 40), np.int32)
        lines = np.moveaxis(numbers, axis, 0)
        lines[10 : 10 + voxels] = 1
        lines[10 + 2 * voxels :] = 2
        found = np.moveaxis(local_thickness(numbers, scale), axis, 0)[:, 20, 20]
        expected = min(voxels * spacing[axis], 2 * RADIUS * min(spacing))
        assert found[10 : 10 + 2 * voxels] == pytest.approx(expected)


def brute_thickness(mask, spacing, radius):
    """Return twice the radius of the largest ball around a voxel of the mask that holds each voxel: loops."""
    depth = distance_transform_edt(mask, sampling=spacing)
    out, voxels = np.zeros(mask.shape), np.argwhere(mask)
    for voxel, own in zip(voxels, depth[mask]):
        own = min(own, radius)
        away = np.sqrt((((voxels - voxel) * np.array(spacing)) ** 2).sum(axis=1))
        inside = voxels[(away < own * (1 - 1e-6)) | ((own == radius) & (away <= radius))]
        place = tuple(inside.T)
        out[place] = np.maximum(out[place], 2 * own)
    return out


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 1.0)])
def test_thickness_lies_within_a_voxel_plane_of_the_largest_ball_by_loops(spacing):
    mask = blobs((14, 26, 24), 2.5, 0.4)
    found = local_thickness(mask.astype(np.int32), Scale(spacing))[mask]
    expected = brute_thickness(mask, spacing, RADIUS * min(spacing))[mask]
    # Between 2 D - h and 2 D, h at most the largest side.
    assert (found <= expected + 1e-4).all()
    assert (found >= expected - max(spacing) - 1e-4).all()


def ball(shape, radius, centre=None, spacing=(1.0, 1.0, 1.0)):
    grid = np.indices(shape) * np.array(spacing).reshape(3, 1, 1, 1)
    middle = np.array(centre or [(n - 1) * s / 2 for n, s in zip(shape, spacing)]).reshape(3, 1, 1, 1)
    return ((grid - middle) ** 2).sum(axis=0) < radius**2


@pytest.mark.parametrize(("radius", "within"), [(8, 0.02), (12, 0.02), (20, 0.015)])
def test_a_ball_has_the_curvature_of_its_radius_and_a_hollow_the_negative_of_it(radius, within):
    mask = ball((56, 56, 56), radius + 0.3)
    for inside, sign in ((mask, 1), (~mask, -1)):
        numbers = inside.astype(np.int32)
        surface = object_surfaces(numbers)
        found = sign * mean_curvature(numbers, np.argwhere(surface), Scale((1.0, 1.0, 1.0)))
        assert np.median(found) == pytest.approx(1 / radius, rel=0.06)
        assert np.abs(found - 1 / radius).max() < within


@pytest.mark.parametrize("thickness", [1, 2, 3, 20])
def test_flat_sheets_of_any_thickness_and_direction_are_not_curved(thickness):
    grid = np.indices((48, 48, 48)) - 23.3
    for normal in ((1, 0, 0), (0.5, 0.3, 0.8), (0, 1, 1)):
        along = np.tensordot(np.array(normal) / np.linalg.norm(normal), grid, 1)
        numbers = (np.abs(along) < thickness / 2).astype(np.int32)
        middle = np.zeros(numbers.shape, bool)
        middle[12:-12, 12:-12, 12:-12] = True
        places = np.argwhere(object_surfaces(numbers) & middle)
        assert np.nanmax(np.abs(mean_curvature(numbers, places, Scale((1.0, 1.0, 1.0))))) < 0.02


def test_a_cylinder_has_half_the_curvature_of_its_radius_and_a_disc_all_of_it():
    grid = np.indices((40, 48, 48)) - 23.3
    disc = np.hypot(grid[1], grid[2]) < 10
    numbers = disc.astype(np.int32)
    middle = object_surfaces(numbers)
    middle[:12], middle[-12:] = False, False
    found = mean_curvature(numbers, np.argwhere(middle), Scale((1.0, 1.0, 1.0)))
    assert np.median(found) == pytest.approx(0.05, rel=0.05)
    flat = numbers[:1]
    found = mean_curvature(flat, np.argwhere(object_surfaces(flat)), Scale((1.0, 1.0)))
    assert np.median(found) == pytest.approx(0.1, rel=0.05)


def ellipsoid(sizes, shape, centre):
    """Return a mask, and what gives the exact mean curvature at the points of the surface nearest to voxels."""
    grid = np.indices(shape) - np.array(centre).reshape(3, 1, 1, 1)
    squares = np.array(sizes, float) ** 2
    mask = sum(axis**2 / square for axis, square in zip(grid, squares)) < 1

    def curvature(voxels):
        points = voxels - np.array(centre)
        points = points / np.sqrt((points**2 / squares).sum(axis=1, keepdims=True))
        support = 1 / np.sqrt((points**2 / squares**2).sum(axis=1))
        return support**3 * (squares.sum() - (points**2).sum(axis=1)) / (2 * np.prod(squares))

    return mask, curvature


def test_curvature_of_an_ellipsoid_is_the_exact_one_at_each_place():
    mask, exact = ellipsoid((14, 18, 24), (56, 64, 72), (27.4, 31.6, 35.3))
    numbers = mask.astype(np.int32)
    places = np.argwhere(object_surfaces(numbers))
    found, expected = mean_curvature(numbers, places, Scale((1.0, 1.0, 1.0))), exact(places)
    assert found.mean() == pytest.approx(expected.mean(), rel=0.03)
    assert np.abs(found - expected).max() < 0.02
    assert np.corrcoef(found, expected)[0, 1] > 0.95


def test_curvature_agrees_with_that_of_triangle_meshes():
    """Twice the mean curvature is how the area of parallel surfaces grows with their volume (Steiner)."""
    from skimage.measure import marching_cubes, mesh_surface_area

    mask = gaussian_filter(np.random.default_rng(3).random((60, 60, 60)), 9)
    mask = ball((60, 60, 60), 24) & (mask > np.quantile(mask, 0.4))
    mask = gaussian_filter(mask.astype(float), 3) > 0.5
    distance = np.where(mask, 0.5 - distance_transform_edt(mask), distance_transform_edt(~mask) - 0.5)
    distance = gaussian_filter(distance, 1.5)
    areas, volumes = [], []
    for level in (-1.0, 1.0):
        points, faces, _, _ = marching_cubes(distance, level)
        corners = points[faces].astype(float)
        areas.append(mesh_surface_area(points, faces))
        volumes.append(
            abs(np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum()) / 6
        )
    expected = (areas[1] - areas[0]) / (volumes[1] - volumes[0]) / 2
    numbers = mask.astype(np.int32)
    found = mean_curvature(numbers, np.argwhere(object_surfaces(numbers)), Scale((1.0, 1.0, 1.0)))
    assert found.mean() == pytest.approx(expected, rel=0.08)


def test_contrast_is_the_difference_over_the_spread_by_loops():
    rng = np.random.default_rng(0)
    numbers, known = blobs((12, 14, 16), 2, 0.4).astype(np.int32), rng.random((12, 14, 16)) < 0.9
    image = (rng.normal(size=numbers.shape) + 2 * numbers).astype(np.float32)
    places = np.argwhere(object_surfaces(numbers))
    found = surface_contrast(image, numbers, known, places, Scale((2.0, 1.0, 1.0)))
    voxels = np.argwhere(known)
    for place, value in zip(places[::7], found[::7]):
        near = voxels[(((voxels - place) * [2, 1, 1]) ** 2).sum(axis=1) <= 2.5**2]
        values, inside = image[tuple(near.T)].astype(float), numbers[tuple(near.T)] > 0
        if min(inside.sum(), (~inside).sum()) < 5:
            assert np.isnan(value)
            continue
        spread = np.sqrt((values[inside].var() + values[~inside].var()) / 2)
        assert value == pytest.approx((values[inside].mean() - values[~inside].mean()) / spread, rel=1e-4)


def test_errors_where_a_gap_is_narrow_are_in_exactly_those_bins():
    """Three slabs, gaps of 4 and 9 voxels: a prediction that misses the slab faces at the narrow gap."""
    truth = np.zeros((60, 40, 40), bool)
    for start in (14, 24, 39):
        truth[start : start + 6] = True
    pred = truth.copy()
    pred[19], pred[24] = False, False
    rows = tally(truth, pred).tables()[GAP]
    assert {row.low for row in rows if row.missed} == {4.0}
    (narrow,) = [row for row in rows if row.low == 4]
    assert narrow.missed == 2 * 40 * 40
    (wide,) = [row for row in rows if row.low <= 9 < row.high]
    assert wide.truth_voxels >= 6 * 40 * 40
    assert wide.missed == 0


def test_a_false_bridge_is_counted_by_the_gap_that_it_crosses():
    truth = np.zeros((40, 40, 40), bool)
    truth[8:12], truth[17:30] = True, True
    pred = truth.copy()
    pred[12:17, 18:22, 18:22] = True
    tables = tally(truth, pred, spacing=(2.0, 1.0, 1.0)).tables()
    (row,) = [row for row in tables[GAP] if row.false]
    assert row.low <= 10 < row.high
    assert row.false == 5 * 16
    # Beside the bridge, the nearer slab.
    assert sum(row.false for row in tables[THICKNESS]) == 5 * 16


def test_errors_where_a_surface_is_curved_are_in_exactly_those_bins():
    """A small and a large ball: only the small one is missed."""
    truth = ball((64, 64, 120), 22.3, (31.5, 31.5, 30)) | ball((64, 64, 120), 6.3, (31.5, 31.5, 90))
    pred = truth.copy()
    pred[:, :, 70:] = False
    counts = tally(truth, pred).counts[CURVATURE]
    gentle, sharp = counts.table(edges=[100])[:2]
    assert (gentle.high, sharp.low) == (0.1, 0.1)
    assert gentle.missed == 0
    assert sharp.missed == sharp.truth_voxels > 900


def test_errors_by_thickness_border_and_edge_are_in_their_bins():
    truth = np.zeros((40, 60, 60), bool)
    truth[10:12], truth[20:28] = True, True
    known = np.ones(truth.shape, bool)
    known[:, :, 50:] = False
    pred = truth.copy()
    pred[10:12] = False
    pred[20:28, :3], pred[20:28, :, 48:] = False, False
    tables = tally(truth, pred, known, spacing=(1.0, 2.0, 1.0)).tables()
    thick = {row.low: row for row in tables[THICKNESS]}
    assert thick[2.0].miss_rate == 1
    assert thick[8.0].miss_rate == pytest.approx(1 - 57 * 48 / (60 * 50))
    # All voxels are missed up to 2 voxels from the label's edge.
    (edge,) = [row for row in tally(truth, pred, known).counts[EDGE].table(edges=[25]) if row.high == 2.5]
    assert edge.miss_rate == 1
    (border,) = [row for row in tally(truth, pred).counts[BORDER].table(edges=[30]) if row.high == 3]
    assert border.truth_voxels == int(
        truth[:, :3].sum() + truth[:, -3:].sum() + truth[:, 3:-3, :3].sum() + truth[:, 3:-3, -3:].sum()
    )


def test_unknown_voxels_neither_count_nor_end_a_structure():
    truth = np.zeros((30, 40, 60), bool)
    truth[12:17] = True
    known = np.ones(truth.shape, bool)
    known[:, :, 30:] = False
    hidden = truth.copy()
    hidden[:, :, 30:] = np.random.default_rng(0).random((30, 40, 30)) < 0.5
    pred = truth.copy()
    pred[12] = False
    one, other = (tally(label, pred & known, known) for label in (truth, hidden))
    for quantity, counts in one.counts.items():
        assert np.array_equal(counts.counts, other.counts[quantity].counts), quantity
    assert [(row.low, row.truth_voxels) for row in one.tables()[THICKNESS]] == [(5.0, 5 * 40 * 30)]
    straight, unmeasured = one.tables()[CURVATURE]
    assert straight.low == 0
    # Beside the mask it is not known.
    assert unmeasured.truth_voxels == 5 * 40 * 5
    assert filled(hidden.astype(np.int32), known, Scale((1.0, 1.0, 1.0)))[:, :, 35].sum() == 5 * 40


def test_objects_that_touch_have_no_gap_and_a_shape_of_their_own():
    numbers = np.zeros((40, 40, 50), np.int64)
    numbers[10:30, 10:30, 5:20], numbers[10:30, 10:30, 20:26] = 2**50, 7
    rows = tally(numbers, numbers > 0).tables()
    assert rows[GAP][0].low == 0
    assert rows[GAP][0].truth_voxels > 2 * 20 * 20
    assert {row.low for row in rows[THICKNESS]} >= {6.0}


def test_no_truth_and_no_prediction():
    empty, full = np.zeros((20, 20, 20), bool), ball((20, 20, 20), 5)
    assert tally(empty, empty).tables() == {}
    assert tally(full, full, known=empty).tables() == {}
    missed = tally(full, empty).tables()
    assert missed[ALL][0].miss_rate == 1
    assert np.isnan(missed[ALL][0].false_rate)
    false = tally(empty, full).tables()
    assert false[ALL][0].false == full.sum()
    assert np.isnan(false[CURVATURE][0].low)


def test_tables_have_round_edges_from_the_truth_and_all_voxels_are_in_a_bin():
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 3, 5000)
    values[:7] = np.nan
    kinds = error_kinds(rng.random(5000) < 0.5, rng.random(5000) < 0.9, rng.random(5000) < 0.3)
    counts = QuantityCounts(0.1, 0.0)
    for part in np.array_split(np.arange(5000), 3):
        counts.add(values[part], kinds[part])
    rows = counts.table()
    assert np.isnan(rows[-1].low)
    assert sum(row.truth_voxels for row in rows) == int((kinds != 2).sum())
    for row in rows[:-1]:
        inside = (np.nan_to_num(values, nan=-1) >= row.low - 0.001) & (values < row.high - 0.001)
        assert row.missed == int(((kinds == 1) | (kinds == 3))[inside].sum())
    edges = [row.low for row in rows[1:-1]]
    assert np.allclose(np.diff(edges), np.diff(edges)[0])
    assert round_edges(np.array([3]), np.array([5])) == [3]


def suspects(kind, truth, pred, known=None, probability=None, side=1000, most=50, spacing=None):
    spacing = spacing or (1.0,) * truth.ndim
    grid = BlockGrid.of(truth.shape, side)
    found = SuspectTally(grid, Scale(spacing), kind)
    known = np.ones(truth.shape, bool) if known is None else known
    truth, pred, known = (three_axes(x) for x in (truth, pred, known))
    probability = None if probability is None else three_axes(probability)
    for number in grid:
        box = grid.box(number)
        outer = piece_region(box, grid, found.halo)
        arrays = [None if x is None else x[outer] for x in (truth, pred, known, probability)]
        found.add(number, SuspectPiece(box, outer, *arrays))
    return found.suspects(most)


@pytest.mark.parametrize("side", [13, 1000])
def test_planted_missing_and_wrong_labels_are_found_with_their_boxes(side):
    sheet = np.zeros((30, 50, 60), bool)
    sheet[14:17] = True
    truth = sheet.copy()
    truth[14:17, 10:30, 20:45] = False
    truth[3:9, 5:15, 5:15] = True
    probability = np.where(sheet, 0.9, 0.05).astype(np.float32)
    pred = probability >= 0.5
    (missing,) = suspects(MISSING, truth, pred, probability=probability, side=side)
    assert (missing.low, missing.high) == ((14, 12, 22), (17, 28, 43))
    assert (missing.reason, missing.voxels) == ("continues", 3 * 16 * 21)
    assert missing.score == pytest.approx(0.9)
    (wrong,) = suspects(WRONG, truth, pred, probability=probability, side=side)
    assert (wrong.low, wrong.high, wrong.reason) == ((3, 5, 5), (9, 15, 15), "alone")
    assert wrong.score == pytest.approx(0.95)
    for kind in (MISSING, WRONG):
        assert suspects(kind, sheet, sheet, side=side) == []
        assert suspects(kind, truth, pred, known=np.zeros_like(truth), side=side) == []
        # A prediction that is not sure, and one shifted by two voxels.
        assert suspects(kind, truth, pred, probability=np.where(sheet, 0.7, 0.3).astype(np.float32)) == []
        assert suspects(kind, sheet, np.roll(sheet, 2, axis=0), side=side) == []
