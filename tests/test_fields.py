"""Properties of the signed distance, the filters and the normals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volumen.derived.arrays import fields
from volumen.derived.derivation import derive_target

spacings = st.sampled_from([1.0, 0.5, 2.0, 3.3, 4.6])


def blobs(shape, seed, smoothness=2.0):
    """Return random smooth foreground, about half of the voxels."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, [min(smoothness, size / 4) for size in shape]) > 0


def brute_force(foreground, known, spacing, reach):
    """Compute distances by comparing every pair of voxels: (signed distance, valid)."""
    finest = min(spacing)
    points = np.argwhere(np.ones(foreground.shape, bool))
    steps = np.abs(points[:, None] - points[None]) * np.array(spacing)
    inner = (np.array(spacing) - finest) / 2
    pairwise = np.sqrt((np.maximum(steps - inner, 0) ** 2).sum(axis=-1)) - finest / 2
    kind = np.where(known, foreground.astype(int), 2).reshape(-1)

    def nearest(value):
        masked = np.where(kind[None] == value, pairwise, np.inf)
        return np.minimum(masked.min(axis=1), reach)

    signed = np.where(kind == 1, -nearest(0), nearest(1))
    valid = (kind != 2) & ((np.abs(signed) < nearest(2)) | (nearest(2) >= reach))
    return np.where(valid, signed, 0).reshape(foreground.shape), valid.reshape(foreground.shape)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(7, 9), (5, 6, 7), (1, 8, 6), (9, 1)]),
    seed=st.integers(0, 10**6),
    spacing=st.tuples(spacings, spacings, spacings),
    reach=st.sampled_from([2.0, 4.5, 100.0]),
    holes=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_signed_distance_equals_brute_force(shape, seed, spacing, reach, holes):
    spacing = spacing[: len(shape)]
    rng = np.random.default_rng(seed)
    foreground = rng.random(shape) < rng.choice([0.1, 0.5, 0.9])
    known = rng.random(shape) >= holes
    expected, expected_valid = brute_force(foreground, known, spacing, reach)
    signed, valid = fields.signed_distance(foreground, spacing=spacing, reach=reach, known=known)
    # Distances that are mathematically equal may differ in the last bit, so both results are right there.
    assert (valid != expected_valid).mean() < 0.02
    both = valid & expected_valid
    np.testing.assert_allclose(signed[both], expected[both], atol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_signed_distance_with_equal_spacing_is_scipys_less_half_a_voxel(ndim):
    foreground = blobs((40,) * ndim, seed=1)
    outside = ndimage.distance_transform_edt(~foreground) - 0.5
    inside = ndimage.distance_transform_edt(foreground) - 0.5
    expected = np.where(foreground, -inside, outside).clip(-16, 16)
    signed, valid = fields.signed_distance(foreground)
    assert valid.all()
    assert signed.dtype == np.float32
    np.testing.assert_allclose(signed, expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distance_of_a_slab_is_exact_along_every_axis_of_any_spacing(axis):
    spacing = (5.0, 1.0, 2.0)
    foreground = np.zeros((12, 12, 12), bool)
    np.moveaxis(foreground, axis, 0)[4:7] = True
    signed, _ = fields.signed_distance(foreground, spacing=spacing, reach=100)
    middle = (np.arange(12) - 5.0) * spacing[axis]
    expected = np.abs(middle) - 1.5 * spacing[axis]
    lines = np.moveaxis(signed, axis, 0).reshape(12, -1)
    np.testing.assert_allclose(lines, np.repeat(expected[:, None], lines.shape[1], axis=1), atol=1e-5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (2.0, 0.5, 1.0)])
def test_distance_of_a_ball_is_the_analytic_one_within_a_voxel(spacing):
    points = np.meshgrid(*[np.arange(-20, 21) * step for step in spacing], indexing="ij")
    radius = 9.0
    exact = np.sqrt(sum(axis**2 for axis in points)) - radius
    signed, _ = fields.signed_distance(exact <= 0, spacing=spacing, reach=6)
    near = np.abs(exact) < 5
    difference = np.abs(signed - exact)[near]
    assert difference.max() < 0.75 * max(spacing)
    assert difference.mean() < 0.25 * max(spacing)


@given(normal=st.tuples(*[st.floats(-1, 1)] * 3), offset=st.floats(-3, 3))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_distance_of_a_plane_is_the_analytic_one_within_a_voxel(normal, offset):
    normal = np.array(normal)
    if np.linalg.norm(normal) < 0.1:
        return
    normal /= np.linalg.norm(normal)
    points = np.stack(np.meshgrid(*[np.arange(-12, 13)] * 3, indexing="ij"), axis=-1)
    exact = points @ normal - offset
    signed, _ = fields.signed_distance(exact <= 0, reach=5)
    inner = (slice(6, -6),) * 3
    assert np.abs(signed - exact.clip(-5, 5))[inner].max() < 1.0


def test_distance_changes_sign_by_half_a_spacing_on_both_sides():
    foreground = np.zeros((4, 6), bool)
    foreground[:, 3:] = True
    signed, _ = fields.signed_distance(foreground, spacing=(1, 4))
    np.testing.assert_allclose(signed[0], [10, 6, 2, -2, -6, -10])
    np.testing.assert_allclose(fields.distance_transform(signed, "inside")[0], [0, 0, 0, 2, 6, 10])
    np.testing.assert_allclose(fields.distance_transform(signed, "outside")[0], [10, 6, 2, 0, 0, 0])


@pytest.mark.parametrize(("value", "sign"), [(False, 1), (True, -1)])
def test_distance_saturates_where_there_is_no_surface(value, sign):
    signed, valid = fields.signed_distance(np.full((6, 7), value), reach=5)
    assert valid.all()
    assert (signed == 5 * sign).all()


def test_no_label_known_means_nothing_valid():
    signed, valid = fields.signed_distance(np.ones((6, 7), bool), known=np.zeros((6, 7), bool))
    assert not valid.any()
    assert (signed == 0).all()


def test_unknown_voxels_make_no_surface_and_hide_what_lies_behind_them():
    foreground = np.zeros((1, 20), bool)
    known = np.ones((1, 20), bool)
    known[0, 5] = False
    foreground[0, 15] = True
    signed, valid = fields.signed_distance(foreground, known=known, reach=4)
    # For voxels up to 4 steps away the unknown one is nearer than the reach.
    assert valid[0].tolist() == [True] + [False] * 9 + [True] * 10
    assert (signed[0, 11:16] == [3.5, 2.5, 1.5, 0.5, -0.5]).all()


def test_outside_the_volume_is_neither_a_surface_nor_unknown():
    foreground = np.ones((9, 9), bool)
    foreground[0] = False
    in_volume = np.ones((9, 9), bool)
    in_volume[0] = False
    in_volume[4, 4] = False
    signed, valid = fields.signed_distance(foreground, in_volume=in_volume, reach=5)
    assert (valid == in_volume).all()
    assert (signed[in_volume] == -5).all()


def test_distance_leads_across_voxels_outside_the_volume():
    foreground = np.zeros((1, 7), bool)
    foreground[0, 6] = True
    in_volume = np.array([[True, True, True, False, True, True, True]])
    signed, _ = fields.signed_distance(foreground, in_volume=in_volume)
    np.testing.assert_allclose(signed[0], [5.5, 4.5, 3.5, 0, 1.5, 0.5, -0.5])


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.5])
def test_smoothing_equals_scipy_away_from_the_border(sigma):
    field = np.random.default_rng(0).normal(size=(22, 24, 26)).astype(np.float32)
    inner = (slice(8, -8),) * 3
    expected = ndimage.gaussian_filter(field.astype(np.float64), sigma)
    smoothed = fields.smooth(field, sigma, (1, 1, 1))
    np.testing.assert_allclose(smoothed[inner], expected[inner], atol=2e-6)


def test_smoothing_width_counts_in_voxels_of_the_smallest_spacing():
    field = np.random.default_rng(0).normal(size=(30, 30)).astype(np.float32)
    smoothed = fields.smooth(field, 1.5, (4.0, 2.0))
    expected = ndimage.gaussian_filter(field, (0.75, 1.5))
    np.testing.assert_allclose(smoothed[8:-8, 8:-8], expected[8:-8, 8:-8], atol=2e-6)


@pytest.mark.parametrize("shape", [(9, 11), (7, 8, 9), (1, 6, 7)])
def test_border_of_arrays_and_of_an_explicit_volume_are_the_same_thing(shape):
    rng = np.random.default_rng(3)
    field = rng.normal(size=shape).astype(np.float32)
    padded = np.pad(field, 5, constant_values=7)
    in_volume = np.pad(np.ones(shape, bool), 5)
    inner = tuple(slice(5, -5) for _ in shape)
    spacing = (1.0,) * len(shape)
    for derive in (
        lambda array, volume: fields.smooth(array, 1.0, spacing, volume)[None],
        lambda array, volume: fields.gradient(array, spacing, volume),
    ):
        np.testing.assert_allclose(
            derive(padded, in_volume)[(slice(None), *inner)], derive(field, None), atol=2e-6
        )


def test_gradient_equals_numpys():
    field = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    spacing = (2.0, 1.0, 0.5)
    np.testing.assert_allclose(
        fields.gradient(field, spacing), np.stack(np.gradient(field, *spacing)), atol=1e-5
    )


def test_gradient_of_a_smoothed_ramp_is_the_ramps_at_the_border_too():
    z, y, x = np.meshgrid(*[np.arange(12.0)] * 3, indexing="ij")
    ramp = (0.5 * z - 0.25 * y + 0.75 * x).astype(np.float32)
    slope = fields.gradient(fields.smooth(ramp, 0.0, (1, 1, 1)), (1, 1, 1))
    np.testing.assert_allclose(slope.reshape(3, -1).T, np.tile([0.5, -0.25, 0.75], (12**3, 1)), atol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), ndim=st.sampled_from([2, 3]), outside=st.booleans())
def test_erosion_equals_scipys(seed, ndim, outside):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(4, 12, ndim))
    radii = tuple(rng.integers(0, 4, ndim))
    valid = rng.random(shape) > 0.05
    in_volume = rng.random(shape) > 0.2 if outside else None
    counted = valid if in_volume is None else valid | ~in_volume
    expected = ndimage.minimum_filter(
        counted.astype(np.uint8), [2 * r + 1 for r in radii], mode="constant", cval=1
    ).astype(bool)
    if in_volume is not None:
        expected &= in_volume
    assert (fields.erode(valid, radii, in_volume) == expected).all()


@pytest.mark.parametrize(("spacing", "limit"), [((1.0, 1.0, 1.0), 2.0), ((2.0, 1.0, 1.0), 3.0)])
def test_normals_of_a_sphere_are_within_two_degrees_on_average(spacing, limit):
    points = np.meshgrid(*[np.arange(-24, 25) * step for step in spacing], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in points))
    normals, valid = derive_target(
        "surface_normals", (radius <= 14)[None].astype(np.uint8), spacing=spacing, reach=6
    )
    exact = np.stack(points[::-1]) / np.maximum(radius, 1e-6)
    cosine = (normals * exact).sum(axis=0)[valid[0]].clip(-1, 1)
    angles = np.degrees(np.arccos(cosine))
    assert angles.mean() < limit
    assert np.percentile(angles, 99) < 12
    assert valid[0][np.abs(radius - 14) < 4].mean() > 0.95


def test_normals_of_a_disc_are_within_two_degrees_on_average():
    y, x = np.meshgrid(np.arange(-30, 31), np.arange(-30, 31), indexing="ij")
    radius = np.hypot(y, x)
    normals, valid = derive_target("surface_normals", (radius <= 18)[None].astype(np.uint8), reach=8)
    exact = np.stack([x, y]) / np.maximum(radius, 1e-6)
    angles = np.degrees(np.arccos((normals * exact).sum(axis=0)[valid[0]].clip(-1, 1)))
    assert angles.mean() < 2


def test_normals_are_undefined_on_the_medial_axis_and_beyond_the_reach():
    label = np.zeros((1, 9, 60), np.uint8)
    label[..., 10:15] = 1
    normals, valid = derive_target("surface_normals", label, reach=8)
    assert not valid[0, :, 12].any()
    assert not valid[0, :, 30:].any()
    assert valid[0, :, [10, 11, 13, 14]].all()
    assert (normals[0, :, 10] < -0.999).all()
    assert (normals[0, :, 14] > 0.999).all()


@pytest.mark.parametrize("thickness", [1, 2, 3])
def test_thin_sheets_keep_their_normals(thickness):
    label = np.zeros((1, 5, 30), np.uint8)
    label[..., 14 : 14 + thickness] = 1
    normals, valid = derive_target("surface_normals", label, reach=6)
    beside = [13, 14 + thickness]
    assert valid[0][:, beside].all()
    assert (normals[0][:, 13] < -0.999).all()
    assert (normals[0][:, 14 + thickness] > 0.999).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foreground": np.zeros((3,), bool)}, "2 or 3 spatial axes"),
        ({"foreground": np.zeros((3, 3), bool), "spacing": (1, 0)}, "positive"),
        ({"foreground": np.zeros((3, 3), bool), "spacing": (1, 1, 1)}, "2 positive"),
        ({"foreground": np.zeros((3, 3), bool), "known": np.ones((3, 4), bool)}, "known has shape"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fields.signed_distance(**arguments)


def test_unknown_distance_type_is_refused():
    with pytest.raises(ValueError, match="nearest"):
        fields.distance_transform(np.zeros((3, 3), np.float32), "nearest")
