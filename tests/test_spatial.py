"""Drawing of spatial transforms: the possible values, their frequency, and their dependence on the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_cases import RecordingVolume, StubCase, sample_of

from volumen.transforms.spatial import RandSpatialTransformd, SpatialTransform, thin_axis
from volumen.utils.errors import VolumenError

CUBE, ONES = (16, 16, 16), (1.0, 1.0, 1.0)


def _draws(transform, size, spacing, count=400, seed=0):
    transform.set_random_state(seed=seed)
    return [transform.draw(size, spacing) for _ in range(count)]


def test_call_writes_the_transform_and_touches_nothing_else():
    case = StubCase(RecordingVolume(np.zeros(CUBE, np.uint8)))
    sample = sample_of(case, (0, 0, 0), CUBE)
    out = RandSpatialTransformd()(sample)
    assert isinstance(out["spatial"], SpatialTransform)
    assert "spatial" not in sample
    assert case.image.regions == []


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_a_seed_decides_the_transform(seed):
    one, two = RandSpatialTransformd(), RandSpatialTransformd()
    two.draw(CUBE, ONES)
    one.set_random_state(seed=seed)
    two.set_random_state(seed=seed)
    first, second = one.draw(CUBE, ONES), two.draw(CUBE, ONES)
    assert (first.permutation, first.flips) == (second.permutation, second.flips)
    np.testing.assert_equal(first.matrix, second.matrix)


def test_default_probabilities_are_those_of_nnunet():
    draws = _draws(RandSpatialTransformd(), CUBE, ONES, count=3000)
    # 1 - 0.8 * 0.8; the tolerances are four standard errors.
    assert np.mean([d.matrix is not None for d in draws]) == pytest.approx(0.36, abs=0.035)
    assert np.mean([d.flips for d in draws], axis=0) == pytest.approx([0.5] * 3, abs=0.037)
    assert len({d.permutation for d in draws}) == 6


def test_rotations_keep_physical_lengths_and_scaling_stays_in_range():
    spacing = (2.0, 1.0, 1.0)
    for draw in _draws(RandSpatialTransformd(prob_rotation=1, prob_scale=0), CUBE, spacing, count=50):
        np.testing.assert_allclose(draw.matrix @ draw.matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(draw.matrix) == pytest.approx(1)
    scales = [
        d.matrix[0, 0]
        for d in _draws(RandSpatialTransformd(prob_rotation=0, prob_scale=1), CUBE, spacing, count=400)
    ]
    assert min(scales) >= 0.7
    assert max(scales) <= 1.4
    assert np.mean(np.asarray(scales) < 1) == pytest.approx(0.5, abs=0.1)


def test_voxel_matrix_of_a_rotation_follows_the_spacing():
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    spatial = SpatialTransform((0, 1), (False, False), turn)
    # One step of 3 units along y is 3 units along x: 6 voxels of 0.5.
    np.testing.assert_allclose(spatial.mirrored_matrix((3.0, 0.5)) @ [1, 0], [0, 6])


@pytest.mark.parametrize(
    ("size", "spacing", "thin"),
    [
        (CUBE, ONES, None),
        ((16, 16, 16), (3.0, 1.0, 1.0), None),  # nnU-Net's limit itself is still isotropic
        ((16, 16, 16), (3.1, 1.0, 1.0), 0),
        ((8, 256, 256), (45.0, 4.6, 4.6), 0),
        ((8, 256, 256), ONES, 0),
        ((64, 16, 64), ONES, 1),
        ((16, 16, 16), (1.0, 1.0, 9.0), 2),
        ((8, 256), (1.0, 1.0), None),
    ],
)
def test_thin_axis(size, spacing, thin):
    assert thin_axis(size, spacing) == thin


def test_anisotropic_data_turn_and_scale_in_the_plane_only():
    transform = RandSpatialTransformd(prob_rotation=1, prob_scale=1)
    for draw in _draws(transform, (8, 32, 32), (45.0, 4.6, 4.6), count=100):
        np.testing.assert_array_equal(draw.matrix[0], [1, 0, 0])
        np.testing.assert_array_equal(draw.matrix[:, 0], [1, 0, 0])
        assert draw.permutation[0] == 0


@pytest.mark.parametrize(("axes", "kept"), [(["z"], 0), (["y"], 1), ([2], 2), (["x", 2], 2)])
def test_rotation_axes_name_what_stays_fixed(axes, kept):
    transform = RandSpatialTransformd(prob_rotation=1, prob_scale=0, rotation_axes=axes)
    for draw in _draws(transform, CUBE, ONES, count=30):
        assert draw.matrix[kept, kept] == 1
        assert draw.permutation[kept] == kept


def test_no_rotation_axis_leaves_flips_and_scaling():
    draws = _draws(RandSpatialTransformd(prob_rotation=1, prob_scale=0, rotation_axes=[]), CUBE, ONES)
    assert all(d.matrix is None and d.permutation == (0, 1, 2) for d in draws)
    assert any(any(d.flips) for d in draws)


def test_no_spatial_draws_the_identity():
    for draw in _draws(RandSpatialTransformd(no_spatial=True), CUBE, ONES, count=20):
        assert draw.matrix is None
        assert draw.permutation == (0, 1, 2)
        assert not any(draw.flips)


@pytest.mark.parametrize(
    ("size", "spacing", "orders"),
    [
        ((16, 16, 16), ONES, 6),
        ((8, 16, 16), ONES, 2),
        ((16, 16, 16), (2.0, 1.0, 1.0), 2),
        ((8, 12, 16), ONES, 1),
        ((16, 16), (1.0, 1.0), 2),
        ((16, 12), (1.0, 1.0), 1),
        ((16, 16), (1.0, 2.0), 1),
    ],
)
def test_axes_are_exchanged_only_where_size_and_spacing_agree(size, spacing, orders):
    draws = _draws(RandSpatialTransformd(), size, spacing, count=200)
    assert len({d.permutation for d in draws}) == orders


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"prob_rotation": 1.5}, "prob_rotation"),
        ({"prob_flip": -0.1}, "prob_flip"),
        ({"scale_range": (1.4, 0.7)}, "scale_range"),
        ({"scale_range": (0.0, 1.0)}, "scale_range"),
    ],
)
def test_bad_settings_are_refused_by_name(options, key):
    with pytest.raises(VolumenError, match=key):
        RandSpatialTransformd(**options)


@pytest.mark.parametrize(("axes", "size"), [(["w"], CUBE), ([3], CUBE), (["y"], (16, 16))])
def test_unknown_rotation_axes_are_refused(axes, size):
    with pytest.raises(VolumenError, match="rotation_axes"):
        RandSpatialTransformd(rotation_axes=axes).draw(size, (1.0,) * len(size))
