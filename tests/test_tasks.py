"""The derived targets other than distance, normals and tensors, each compared with a naive implementation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volumen.derived.derivation import derive_target


def instances(shape, seed, smoothness=1.5):
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.label(ndimage.gaussian_filter(noise, smoothness) > 0.05)[0].astype(np.int32)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), ndim=st.sampled_from([2, 3]), step=st.sampled_from([1.0, 2.0]))
def test_nearest_component_points_to_a_nearest_foreground_voxel(seed, ndim, step):
    shape = (13, 12, 11)[-ndim:]
    spacing = (step, 1.0, 1.0)[-ndim:] if ndim == 3 else (1.0, step)
    label = (np.random.default_rng(seed).random(shape) < 0.02).astype(np.uint8)
    values, valid = derive_target("nearest_component", label[None], spacing=spacing, reach=6)
    signed, _ = derive_target("distance_transform", label[None], spacing=spacing, reach=6)
    assert (valid[0] == ((signed[0] > 0) & (signed[0] < 6))).all()
    np.testing.assert_array_equal(values[-1][valid[0]], signed[0][valid[0]])
    np.testing.assert_allclose(np.linalg.norm(values[:-1], axis=0)[valid[0]], 1, atol=1e-6)
    foreground = np.argwhere(label) * np.array(spacing)
    inner = (np.array(spacing) - min(spacing)) / 2
    for point in np.argwhere(valid[0])[::17]:
        away = foreground - point * np.array(spacing)
        bodies = np.sqrt((np.maximum(np.abs(away) - inner, 0) ** 2).sum(axis=1))
        candidates = away[bodies < bodies.min() + 1e-5]
        candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
        direction = values[:-1][::-1][(slice(None), *point)]
        assert (candidates @ direction).max() > 1 - 1e-5


@pytest.mark.parametrize("thickness", [1, 2, 3, 5, 8])
def test_skeleton_of_a_sheet_is_its_middle(thickness):
    label = np.zeros((1, 12, 12, 40), np.uint8)
    label[..., 12 : 12 + thickness] = 1
    values, valid = derive_target("skeleton", label)
    assert valid.all()
    profile = values[0, 5, 5]
    assert (values[0] == profile).all()
    places = np.flatnonzero(profile)
    middle = 12 + (thickness - 1) / 2
    assert 1 <= places.size <= 3
    assert places.mean() == middle


def test_skeleton_of_a_tube_is_its_centreline_and_of_a_ball_its_centre():
    z, y, x = np.meshgrid(*[np.arange(-14, 15)] * 3, indexing="ij")
    for label, core in (
        (np.hypot(y, x) <= 5.5, np.hypot(y, x)),
        (np.sqrt(z**2 + y**2 + x**2) <= 8.5, np.sqrt(z**2 + y**2 + x**2)),
    ):
        values, _ = derive_target("skeleton", label[None].astype(np.uint8))
        found = values[0] > 0
        assert found[core == 0].all()
        assert core[found].max() < 2


def test_skeleton_meets_every_component():
    label = instances((40, 40, 40), 3)
    values, _ = derive_target("skeleton", (label[None] > 0).astype(np.uint8))
    sizes = ndimage.sum(label > 0, label, np.arange(1, label.max() + 1))
    met = ndimage.sum(values[0], label, np.arange(1, label.max() + 1)) > 0
    assert met[sizes > 8].all()
    assert not (values[0] > 0)[label == 0].any()
    assert 0.02 < values.sum() / (label > 0).sum() < 0.7


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    ndim=st.sampled_from([2, 3]),
    side=st.sampled_from(["both", "inner", "outer"]),
    holes=st.sampled_from([0.0, 0.1]),
)
def test_boundary_equals_the_definition(seed, ndim, side, holes):
    rng = np.random.default_rng(seed)
    shape = (6, 7, 8)[-ndim:]
    label = rng.integers(0, 3, shape)
    label[rng.random(shape) < 0.6] = 0
    known = rng.random(shape) >= holes
    values, valid = derive_target("boundary", label[None], known=known[None], side=side)
    for point in itertools.product(*map(range, shape)):
        neighbours = [
            tuple(np.add(point, step * np.eye(ndim, dtype=int)[axis]))
            for axis in range(ndim)
            for step in (-1, 1)
        ]
        neighbours = [one for one in neighbours if all(0 <= a < n for a, n in zip(one, shape))]
        differs = any(known[one] and label[one] != label[point] for one in neighbours)
        unsure = any(not known[one] for one in neighbours)
        wanted = side == "both" or (label[point] > 0) == (side == "inner")
        assert valid[(0, *point)] == (known[point] and (differs or not unsure or not wanted))
        if valid[(0, *point)]:
            assert values[(0, *point)] == (differs and wanted)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    offsets=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=4),
    holes=st.sampled_from([0.0, 0.1]),
)
def test_affinities_equal_the_definition(seed, offsets, holes):
    rng = np.random.default_rng(seed)
    shape = (5, 6, 7)
    label = rng.integers(0, 3, shape)
    known = rng.random(shape) >= holes
    values, valid = derive_target(
        "affinities", label[None], known=known[None], offsets=[list(o) for o in offsets]
    )
    for point in itertools.product(*map(range, shape)):
        partners = [tuple(np.add(point, offset)) for offset in offsets]
        usable = all(all(0 <= a < n for a, n in zip(one, shape)) and known[one] for one in partners)
        assert valid[(0, *point)] == (usable and known[point])
        if valid[(0, *point)]:
            expected = [label[one] == label[point] > 0 for one in partners]
            assert values[(slice(None), *point)].tolist() == expected


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("step", [1.0, 2.0])
def test_shape_descriptors_equal_the_definition(ndim, step):
    shape = (9, 10, 11)[-ndim:]
    spacing = (step, *[1.0] * (ndim - 1))
    label = instances(shape, 4)
    sigma = 1.5
    values, valid = derive_target("local_shape_descriptors", label[None], spacing=spacing, sigma=sigma)
    assert (valid[0] == (label > 0)).all()
    radii = [int(4 * sigma / size + 0.5) for size in spacing]
    grids = np.meshgrid(*[np.arange(-r, r + 1) for r in radii], indexing="ij")
    offsets = np.stack([grid.reshape(-1) for grid in grids], axis=1)
    scaled = offsets * np.array(spacing) / sigma
    weights = np.exp(-0.5 * (scaled**2).sum(axis=1))
    weights /= weights.sum()
    pairs = [(i, j) for i in range(ndim) for j in range(i, ndim)]
    for point in np.argwhere(label)[::23]:
        places = point + offsets
        inside = ((places >= 0) & (places < shape)).all(axis=1)
        same = inside.copy()
        same[inside] = label[tuple(places[inside].T)] == label[tuple(point)]
        share = weights * same
        mean = (share[:, None] * scaled).sum(axis=0) / share.sum()
        spread = (share[:, None, None] * scaled[:, :, None] * scaled[:, None, :]).sum(axis=0) / share.sum()
        spread -= mean[:, None] * mean[None]
        expected = [*mean[::-1], *[spread[pair] for pair in pairs], share.sum()]
        np.testing.assert_allclose(values[(slice(None), *point)], expected, atol=2e-5)


def test_channels_of_a_source_count_as_instances():
    channels = np.zeros((2, 12, 12), np.uint8)
    channels[0, 2:6, 2:10] = 1
    channels[1, 6:10, 2:10] = 1
    numbers = (channels[0] + 2 * channels[1])[None]
    for name in ("boundary", "affinities", "local_shape_descriptors"):
        split, valid = derive_target(name, channels)
        whole, valid_whole = derive_target(name, numbers)
        assert (valid == valid_whole).all()
        np.testing.assert_array_equal(split, whole)


@pytest.mark.parametrize("name", ["boundary", "affinities", "local_shape_descriptors"])
def test_classes_choose_what_counts_and_keep_it_apart(name):
    """Other classes are background; two chosen classes that touch remain two."""
    numbers = np.random.default_rng(0).integers(0, 4, (1, 9, 10))
    chosen, valid = derive_target(name, numbers, classes=[1, 3])
    alone, valid_alone = derive_target(name, np.where(np.isin(numbers, [1, 3]), numbers, 0))
    assert (valid == valid_alone).all()
    np.testing.assert_array_equal(chosen, alone)
    everything, _ = derive_target(name, numbers)
    assert (chosen != everything).any()
    channels = np.stack([numbers[0] == value for value in (1, 2, 3)]).astype(np.uint8)
    of_channels, _ = derive_target(name, channels, classes=[0, 2])
    np.testing.assert_array_equal(of_channels, alone)
