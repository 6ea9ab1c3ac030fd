"""Reading patches: plain crops are exact, resampled ones geometrically correct, and no forbidden voxel is read."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose
from patch_cases import case_of, sample_of, smooth
from scipy.ndimage import affine_transform

from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd, SpatialTransform
from volumen.utils.errors import VolumenError

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (40, 44, 48)).astype(np.uint8)
LABEL = (NOISE > 128).astype(np.uint8)


def _turned(ndim, degrees, plane, scale=1.0):
    matrix = np.eye(ndim) * scale
    a, (i, j) = np.deg2rad(degrees), plane
    matrix[i, i] = matrix[j, j] = np.cos(a) * scale
    matrix[i, j], matrix[j, i] = -np.sin(a) * scale, np.sin(a) * scale
    return SpatialTransform(tuple(range(ndim)), (False,) * ndim, matrix)


def _skewed(degrees=25.0, scale=1.0):
    matrix = (_turned(3, degrees, (1, 2)).matrix @ _turned(3, -degrees, (0, 1)).matrix) * scale
    return SpatialTransform((0, 1, 2), (False,) * 3, matrix)


def test_plain_crop_with_halo():
    case = case_of(NOISE, {"m": LABEL}, spacing=(2.0, 1.0, 1.0))
    out = ReadPatchd(["m"], halo=(1, 2, 3))(sample_of(case, (10, 11, 12), (16, 14, 12)))
    np.testing.assert_array_equal(out["image"][0], NOISE[10:26, 11:25, 12:24] / np.float32(255))
    np.testing.assert_array_equal(out["m"][0], LABEL[9:27, 9:27, 9:27])
    assert out["image"].dtype == np.float32
    assert out["m"].dtype == np.uint8
    assert out["m_mask"].all()
    assert out["m_mask"].dtype == bool
    assert out["in_volume"] is None
    assert (out["spacing"], out["volume_name"], out["start"]) == ((2.0, 1.0, 1.0), "case", (10, 11, 12))
    assert not {"case", "location", "spatial"} & set(out)


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (True, True, True)])
def test_flips_and_axis_swaps_are_exact_views_of_the_crop(permutation, flips):
    size, halo = (12, 12, 12), 3
    plain = ReadPatchd(["m"], halo=halo)(sample_of(case_of(NOISE, {"m": LABEL}), (8, 9, 10), size))
    spatial = SpatialTransform(permutation, flips)
    turned = ReadPatchd(["m"], halo=halo)(
        sample_of(case_of(NOISE, {"m": LABEL}), (8, 9, 10), size, spatial=spatial)
    )
    for key in ("image", "m", "m_mask"):
        np.testing.assert_array_equal(turned[key], spatial.orient(plain[key]))


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=3)))
def test_a_flip_commutes_with_rotation_and_scaling(permutation, flips):
    base = _skewed(20, 1.1)
    image = smooth((48, 48, 48))
    read = ReadPatchd(["m"], halo=2, normalization_scheme="none")
    label = (image > 0.5).astype(np.uint8)
    plain = read(sample_of(case_of(image, {"m": label}), (16, 16, 16), (12, 12, 12), spatial=base))
    both = SpatialTransform(permutation, flips, base.matrix)
    turned = read(sample_of(case_of(image, {"m": label}), (16, 16, 16), (12, 12, 12), spatial=both))
    np.testing.assert_allclose(turned["image"], both.orient(plain["image"]), atol=1e-5)
    # Rounding may move a position halfway between two voxels to either of them.
    assert (turned["m"] != both.orient(plain["m"])).mean() < 2e-3


@pytest.mark.parametrize("plane", [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("size", [12, 13])
def test_a_quarter_turn_by_resampling_equals_rot90(plane, size):
    volume = NOISE[:40, :40, :40]
    sample = sample_of(
        case_of(volume, {"m": volume}), (10, 10, 10), (size,) * 3, spatial=_turned(3, 90, plane)
    )
    out = ReadPatchd(["m"], halo=2)(sample)
    wide = volume[8 : 12 + size, 8 : 12 + size, 8 : 12 + size]
    np.testing.assert_array_equal(out["m"][0], np.rot90(wide, -1, plane))
    expected = np.rot90(wide, -1, plane)[2:-2, 2:-2, 2:-2] / np.float32(255)
    np.testing.assert_allclose(out["image"][0], expected, atol=1e-5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_image_equals_scipy_in_physical_space(spacing):
    image, spatial = smooth((40, 44, 48)), _skewed(15)
    case = case_of(image, spacing=spacing)
    out = ReadPatchd([], normalization_scheme="none")(
        sample_of(case, (14, 16, 18), (12, 12, 12), spatial=spatial)
    )
    scale = np.diag(spacing)
    matrix = np.linalg.inv(scale) @ spatial.matrix @ scale
    centre = np.array([14, 16, 18]) + 5.5
    expected = affine_transform(
        image, matrix, centre - matrix @ np.full(3, 5.5), output_shape=(12, 12, 12), order=1, prefilter=False
    )
    np.testing.assert_allclose(out["image"][0], expected, atol=1e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_a_constant_stays_constant_where_the_volume_is(order):
    image = np.full((24, 24, 24), 3.5, np.float32)
    case = case_of(image, {"m": np.ones((24, 24, 24), np.uint8)})
    read = ReadPatchd(["m"], normalization_scheme="none", image_order=order)
    out = read(sample_of(case, (-2, 10, 10), (16, 16, 16), spatial=_skewed(30)))
    known = out["m_mask"]
    assert 0.3 < known.mean() < 0.99
    np.testing.assert_allclose(out["image"], 3.5, rtol=1e-5)
    np.testing.assert_array_equal(out["m"] == 1, known)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_image_and_label_stay_aligned(seed):
    # The label is the image's own threshold: after any transform they must still agree except at the surface.
    image = smooth((48, 48, 48), sigma=4.0)
    label = (image > 0.5).astype(np.uint8)
    draw = RandSpatialTransformd(prob_rotation=0.7, prob_scale=0.7)
    draw.set_random_state(seed=seed)
    read = Compose([draw, ReadPatchd(["m"], normalization_scheme="none")])
    out = read(sample_of(case_of(image, {"m": label}), (14, 15, 16), (16, 16, 16)))
    sure = np.abs(out["image"] - 0.5) > 0.06
    known = out["m_mask"] & sure
    np.testing.assert_array_equal((out["image"] > 0.5)[known], (out["m"] > 0)[known])


@given(
    seed=st.integers(0, 2**31),
    start=st.tuples(*[st.integers(-6, 36)] * 3),
    size=st.tuples(*[st.integers(1, 24)] * 3),
    halo=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_nothing_outside_the_bounds_is_read_and_what_is_known_is_inside(seed, start, size, halo):
    bounds = ((5, 30), (8, 40), (0, 33))
    case = case_of(NOISE, {"m": LABEL + 1}, {"m": np.ones_like(LABEL)}, allowed=bounds)
    draw = RandSpatialTransformd(prob_rotation=0.7, prob_scale=0.7)
    draw.set_random_state(seed=seed)
    out = Compose([draw, ReadPatchd(["m", "absent"], halo=halo)])(sample_of(case, start, size, bounds=bounds))
    wide = tuple(n + 2 * halo for n in size)
    assert out["image"].shape == (1, *size)
    assert out["m"].shape == out["m_mask"].shape == out["absent"].shape == (1, *wide)
    # The label is 1 or 2 everywhere in the volume.
    np.testing.assert_array_equal(out["m"] > 0, out["m_mask"])
    if out["in_volume"] is not None:
        assert out["in_volume"].shape == (1, *wide)
        assert not (out["m_mask"] & ~out["in_volume"]).any()


def test_padding_distinguishes_the_volume_from_the_bounds():
    case = case_of(NOISE, {"m": LABEL})
    bounds = ((4, 40), (0, 44), (0, 48))
    out = ReadPatchd(["m"])(sample_of(case, (-3, 0, 0), (10, 8, 8), bounds=bounds))
    mask, inside = out["m_mask"][0, :, 0, 0], out["in_volume"][0, :, 0, 0]
    np.testing.assert_array_equal(inside, [False] * 3 + [True] * 7)
    np.testing.assert_array_equal(mask, [False] * 7 + [True] * 3)
    # The image is reflected at the bounds, within which three planes are read: 4 5 6.
    planes = [5, 6, 5, 4, 5, 6, 5, 4, 5, 6]
    expected = np.pad(NOISE[4:7, :8, :8], ((7, 0), (0, 0), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(out["image"][0], expected / np.float32(255))
    np.testing.assert_array_equal(expected[:, 0, 0], NOISE[planes, 0, 0])


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("spatial", [None, _turned(3, 30, (1, 2)), _skewed(20, 1.1)])
def test_what_lies_beyond_a_volume_is_reflected(spatial, order):
    # SciPy calls this mode "mirror". The label stays unknown there.
    image = smooth((20, 24, 22), sigma=2.0)
    start, size = (-4, 6, 5), (12, 12, 12)
    read = ReadPatchd(["m"], normalization_scheme="none", image_order=order)
    case = case_of(image, {"m": np.ones(image.shape, np.uint8)})
    out = read(sample_of(case, start, size, spatial=spatial))
    matrix = np.eye(3) if spatial is None else spatial.matrix
    offset = np.array(start) + 5.5 - matrix @ np.full(3, 5.5)
    expected = affine_transform(image, matrix, offset, output_shape=size, order=order, mode="mirror")
    np.testing.assert_allclose(out["image"][0], expected, atol=1e-5 if order == 1 else 2e-2)
    where = np.indices(size).reshape(3, -1)
    position = (matrix @ where + offset[:, None]).reshape(3, *size)
    limits = np.array(image.shape).reshape(3, 1, 1, 1) - 0.5
    inside = ((position >= -0.5) & (position < limits)).all(axis=0)
    np.testing.assert_array_equal(out["m_mask"][0], inside)
    assert not inside.all()


@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 9, 40), (5, 7, 6)])
def test_a_patch_larger_than_the_volume_has_the_volumes_statistics_and_no_label_beyond_it(shape):
    image = (np.random.default_rng(5).normal(120, 20, shape)).astype(np.float32)
    case = case_of(image, {"m": np.ones(shape, np.uint8)})
    start = tuple((n - 24) // 2 for n in shape)
    out = ReadPatchd(["m"], halo=2, normalization_scheme="none")(sample_of(case, start, (24, 24, 24)))
    assert set(np.unique(out["image"])) <= set(np.unique(image))
    assert abs(out["image"].mean() - image.mean()) < 5
    assert 0.7 < out["image"].std() / image.std() < 1.4
    first = [2 - s for s in start]
    inside = np.zeros((28, 28, 28), bool)
    inside[tuple(slice(max(f, 0), f + n) for f, n in zip(first, shape))] = True
    np.testing.assert_array_equal(out["m_mask"][0], inside)
    np.testing.assert_array_equal(out["m"][0] > 0, inside)


def test_masks_and_ignored_labels_make_unknown_voxels():
    label = (NOISE % 3).astype(np.int16)
    label[20:22] = 255
    mask = np.zeros_like(NOISE)
    mask[:, 10:30] = 7
    case = case_of(NOISE, {"m": label}, {"m": mask})
    out = ReadPatchd(["m"], ignore_labels={"m": 255})(sample_of(case, (16, 4, 0), (10, 12, 8)))
    expected = (mask[16:26, 4:16, :8] > 0) & (label[16:26, 4:16, :8] != 255)
    np.testing.assert_array_equal(out["m_mask"][0], expected)
    assert out["m"].max() == 2
    assert out["m"].dtype == np.int16


def test_a_target_without_a_label_is_all_unknown():
    out = ReadPatchd(["m", "ink"], halo=2)(sample_of(case_of(NOISE, {"m": LABEL}), (8, 8, 8), (8, 8, 8)))
    assert out["ink"].shape == out["ink_mask"].shape == (1, 12, 12, 12)
    assert not out["ink"].any()
    assert not out["ink_mask"].any()
    assert out["m_mask"].all()


def test_a_missing_label_has_the_channels_of_the_others():
    read = ReadPatchd(["m", "ink"], halo=2, label_channels={"m": 1, "ink": 3})
    out = read(sample_of(case_of(NOISE, {"m": LABEL}), (8, 8, 8), (8, 8, 8)))
    assert out["ink"].shape == (3, 12, 12, 12)
    assert out["ink_mask"].shape == (1, 12, 12, 12)
    assert not out["ink_mask"].any()


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "int8", "float16", "float32", "float64", "bool"]
)
@pytest.mark.parametrize("spatial", [None, _skewed(10)])
def test_image_dtypes(dtype, spatial):
    image = (smooth((32, 32, 32)) * 100).astype(dtype)
    read = ReadPatchd([], normalization_scheme="none")
    out = read(sample_of(case_of(image), (10, 10, 10), (8, 8, 8), spatial=spatial))
    expected = read(sample_of(case_of(image.astype(np.float32)), (10, 10, 10), (8, 8, 8), spatial=spatial))
    np.testing.assert_allclose(out["image"], expected["image"], rtol=1e-6)


def test_channels_and_two_dimensions():
    image = np.stack([smooth((40, 44), seed) for seed in range(3)])
    label = (image[0] > 0.5).astype(np.uint8)
    read = ReadPatchd(["m"], halo=(2, 3), normalization_scheme="none")
    case = case_of(image, {"m": label}, channels=True)
    plain = read(sample_of(case, (8, 9), (16, 12)))
    np.testing.assert_array_equal(plain["image"], image[:, 8:24, 9:21])
    np.testing.assert_array_equal(plain["m"][0], label[6:26, 6:24])
    matrix = _turned(2, 30, (0, 1)).matrix
    turned = read(sample_of(case, (8, 9), (16, 12), spatial=SpatialTransform((0, 1), (False, False), matrix)))
    for channel in range(3):
        expected = affine_transform(
            image[channel],
            matrix,
            np.array([15.5, 14.5]) - matrix @ [7.5, 5.5],
            output_shape=(16, 12),
            order=1,
            mode="nearest",
            prefilter=False,
        )
        np.testing.assert_allclose(turned["image"][channel], expected, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value, caplog):
    image = smooth((24, 24, 24))
    image[12, 13, 14] = value
    case = case_of(image)
    sample = sample_of(case, (8, 8, 8), (8, 8, 8))
    known = {"mean": 0.4, "std": 0.1, "min": 0, "max": 1, "percentile_00_5": 0, "percentile_99_5": 1}
    read = ReadPatchd([], normalization_scheme="zscore", intensity_properties={"channels": [known]})
    with caplog.at_level(logging.WARNING):
        out = read(sample)
        read(sample)
    assert np.isfinite(out["image"]).all()
    assert out["image"][0, 4, 5, 6] == 0
    assert np.count_nonzero(out["image"]) == out["image"].size - 1
    assert len(caplog.records) == 1
    assert "memory" in caplog.text
    with pytest.raises(VolumenError, match=r"memory: .*found 1 NaN .* at \(12, 13, 14\)"):
        ReadPatchd([], normalization_scheme="none", nonfinite="refuse")(sample)


@pytest.mark.parametrize("options", [{"image_order": 2}, {"nonfinite": "ignore"}])
def test_bad_settings_are_refused_by_name(options):
    with pytest.raises(VolumenError, match=next(iter(options))):
        ReadPatchd([], **options)


def test_each_volume_is_read_once_and_no_more_than_the_transform_needs():
    case = case_of(NOISE, {"m": LABEL})
    ReadPatchd(["m"], halo=2)(sample_of(case, (12, 12, 12), (12, 12, 12), spatial=_turned(3, 45, (1, 2))))
    (image,), (label,) = case.image.regions, case.labels["m"].regions
    assert image[0] == slice(12, 25)
    assert label[0] == slice(10, 27)
    assert all(span.stop - span.start <= np.ceil(12 * 2**0.5) + 2 for span in image)


def test_per_volume_statistics_are_used_and_sampled_once():
    image = smooth((40, 40, 40)) * 1e5
    case = case_of(image)
    read = ReadPatchd([], intensity_properties={"channels": [], "per_volume": True})
    sample = sample_of(case, (8, 8, 8), (8, 8, 8))
    out = read(sample)
    sampled = len(case.image.regions)
    expected = (image[8:16, 8:16, 8:16] - image.min()) / (image.max() - image.min())
    np.testing.assert_allclose(out["image"][0], expected, atol=0.02)
    read(sample)
    assert len(case.image.regions) == sampled + 1
