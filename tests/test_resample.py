"""Compiled resampling compared with SciPy, and its three methods compared with each other."""

from __future__ import annotations

import numpy as np
import pytest
from patch_cases import smooth
from scipy.ndimage import affine_transform

from volumen.transforms.kernels import resample

SHAPE = (20, 22, 24)


def _rotation(degrees):
    a, b, c = np.deg2rad(degrees)
    z = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    x = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return z @ y @ x


MATRICES = {
    "general": _rotation((20, -15, 28)) * 1.1,
    "in plane": _rotation((33, 0, 0)),
    "mirrored plane": _rotation((33, 0, 0)) * np.array([[-1.0], [1], [1]]),
    "scaling": np.diag([0.8, 1.3, -0.9]),
    "sheared plane": _rotation((33, 0, 0)) * np.array([[1.2], [1], [1]]),
}


def _offset(matrix, shape=SHAPE, out=SHAPE):
    return (np.asarray(shape) - 1) / 2 - matrix @ ((np.asarray(out) - 1) / 2)


@pytest.mark.parametrize("name", MATRICES)
def test_linear_equals_scipy_inside_and_is_outside_beyond_half_a_voxel(name):
    matrix = MATRICES[name]
    source, offset = smooth(SHAPE), _offset(MATRICES[name])
    out = resample.linear(source, matrix, offset, -7.0, np.empty(SHAPE, np.float32))
    reference = affine_transform(source, matrix, offset, order=1, mode="nearest", prefilter=False)
    inside = resample.nearest_index(SHAPE, matrix, offset, SHAPE) >= 0
    assert 0.2 < inside.mean() < 1 or name == "scaling"
    np.testing.assert_allclose(out[inside], reference[inside], atol=2e-6)
    assert (out[~inside] == -7).all()


@pytest.mark.parametrize("name", ["in plane", "scaling"])
def test_the_cheap_ways_equal_the_general_one(name):
    matrix, offset, source = MATRICES[name], _offset(MATRICES[name]), smooth(SHAPE)
    cheap = resample.linear(source, matrix, offset, 0.5, np.empty(SHAPE, np.float32))
    general = np.empty(SHAPE, np.float32)
    resample._trilinear(source, matrix, offset, np.float32(0.5), general)
    np.testing.assert_allclose(cheap, general, atol=2e-6)


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "float32", "int8", "float16", "int32", "float64"]
)
@pytest.mark.parametrize("name", ["general", "in plane", "scaling"])
def test_every_dtype_is_interpolated_as_its_float_values(name, dtype):
    matrix, offset = MATRICES[name], _offset(MATRICES[name])
    source = (smooth(SHAPE) * 100).astype(dtype)
    out = resample.linear(source, matrix, offset, 0, np.empty(SHAPE, np.float32))
    expected = resample.linear(source.astype(np.float32), matrix, offset, 0, np.empty(SHAPE, np.float32))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_unit_steps_copy_bitwise():
    source = smooth(SHAPE)
    out = resample.linear(source, np.eye(3), np.array([2.0, 3, 4]), 0, np.empty((8, 8, 8), np.float32))
    np.testing.assert_array_equal(out, source[2:10, 3:11, 4:12])


@pytest.mark.parametrize("name", MATRICES)
def test_nearest_equals_scipy(name):
    matrix, offset = MATRICES[name], _offset(MATRICES[name])
    source = np.random.default_rng(1).integers(1, 255, SHAPE).astype(np.uint8)
    index = resample.nearest_index(SHAPE, matrix, offset, SHAPE)
    reference = affine_transform(source, matrix, offset, order=0, mode="grid-constant", cval=0)
    ours = resample.gather(source[None], index)[0]
    # Positions that lie halfway between voxels up to rounding may be assigned to either.
    assert (ours != reference).mean() < 1e-3


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float64", "bool"])
def test_gather_copies_any_dtype_and_fills_with_zero(dtype):
    source = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(dtype)
    index = np.array([[[0, -1, 59], [5, 20, -1]]])
    out = resample.gather(source, index)
    assert out.dtype == source.dtype
    flat = source.reshape(2, -1)
    for channel in range(2):
        expected = [flat[channel, i] if i >= 0 else 0 for i in index.reshape(-1)]
        np.testing.assert_array_equal(out[channel].reshape(-1), np.array(expected).astype(dtype))


def test_spline_equals_scipy_inside():
    matrix, offset, source = MATRICES["general"], _offset(MATRICES["general"]), smooth(SHAPE)
    out = resample.spline(source, matrix, offset, 0.0, np.empty(SHAPE, np.float32))
    inside = resample.nearest_index(SHAPE, matrix, offset, SHAPE) >= 0
    reference = affine_transform(source, matrix, offset, order=3, mode="nearest")
    np.testing.assert_allclose(out[inside], reference[inside], atol=1e-6)
    assert (out[~inside] == 0).all()
