"""Structure tensors and axes against naive float64 implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volumen.derived.arrays import tensors
from volumen.derived.derivation import derive_target
from volumen.derived.kernels import eigen as eigen_kernels

PAIRS = {2: [(0, 0), (0, 1), (1, 1)], 3: [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]}


def pack(matrices):
    """Convert symmetric (N, d, d) matrices to (components, N) float32."""
    ndim = matrices.shape[-1]
    return np.ascontiguousarray(np.stack([matrices[:, i, j] for i, j in PAIRS[ndim]]).astype(np.float32))


def unpack(components):
    """Return the float64 matrices (N, d, d) of float32 components, exactly."""
    ndim = 2 if len(components) == 3 else 3
    matrices = np.empty((components.shape[1], ndim, ndim))
    for component, (i, j) in zip(components, PAIRS[ndim]):
        matrices[:, i, j] = matrices[:, j, i] = component
    return matrices


def solve(components, min_gap=1e-3):
    kernel = eigen_kernels.smallest_axis_2d if len(components) == 3 else eigen_kernels.smallest_axis_3d
    valid = np.ones(components.shape[1], bool)
    axes = np.empty((2 if len(components) == 3 else 3, components.shape[1]), np.float32)
    kernel(components, valid, min_gap, axes)
    return axes[::-1].T.astype(np.float64), valid


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    ndim=st.sampled_from([2, 3]),
    middle=st.sampled_from([2e-3, 1e-2, 0.5, 0.9, 0.999, 1.0]),
    low=st.sampled_from([0.0, 1e-4, 0.3]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_axes_are_accurate_near_degenerate_spectra(seed, ndim, middle, low, scale):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(200, ndim, ndim)))[0]
    values = np.array([low * middle, middle, 1.0] if ndim == 3 else [low * middle, middle]) * scale
    components = pack(basis * values[None, None] @ basis.transpose(0, 2, 1))
    exact, vectors = np.linalg.eigh(unpack(components))
    axes, valid = solve(components)
    gap = (exact[:, 1] - exact[:, 0]) / exact[:, -1]
    clear = gap > 1.01e-3
    assert valid[clear].all()
    assert not valid[gap < 0.99e-3].any()
    if clear.any():
        np.testing.assert_allclose(np.linalg.norm(axes[clear], axis=1), 1, atol=1e-6)
        cosine = np.abs((axes[clear] * vectors[clear, :, 0]).sum(axis=1))
        sine = np.sqrt(np.maximum(1 - cosine**2, 0))
        assert sine.max() < 1e-3
        residual = (
            unpack(components)[clear] @ axes[clear][..., None]
            - exact[clear, :1, None] * axes[clear][..., None]
        )
        assert np.abs(residual).max() < 3e-6 * scale


@pytest.mark.parametrize(
    "matrix",
    [np.zeros((3, 3)), np.eye(3), 7 * np.eye(3), np.diag([1.0, 0, 0]), np.zeros((2, 2)), np.eye(2)],
)
def test_axis_is_invalid_where_none_is_smallest(matrix):
    axes, valid = solve(pack(matrix[None]))
    assert not valid.any()
    assert (axes == 0).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_axes_of_diagonal_tensors_are_the_coordinate_axes(ndim):
    values = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])[:, :ndim]
    axes, valid = solve(pack(np.stack([np.diag(row) for row in values])))
    assert valid.all()
    np.testing.assert_allclose(axes, np.eye(ndim)[values.argmin(axis=1)], atol=1e-7)


def test_only_valid_voxels_are_computed_and_the_callers_mask_is_left_alone():
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(150, 3, 3))
    components = pack(roots @ roots.transpose(0, 2, 1)).reshape(6, 5, 5, 6)
    valid = rng.random((5, 5, 6)) > 0.5
    before = valid.copy()
    axes, good = tensors.smallest_axis(components, valid)
    assert (valid == before).all()
    assert not good[~before].any()
    assert (axes[:, ~good] == 0).all()


def naive_tensor(label, compute_from, spacing, grad_sigma=1.0, tensor_sigma=1.5, reach=16.0):
    """Compute the definition in float64 by SciPy (equal spacing), correct 11 voxels and more from the border."""
    field = label.astype(np.float64)
    if compute_from == "sdt":
        outside = ndimage.distance_transform_edt(label == 0, spacing) - min(spacing) / 2
        inside = ndimage.distance_transform_edt(label > 0, spacing) - min(spacing) / 2
        field = np.where(label > 0, -inside, outside).clip(-reach, reach) / min(spacing)
    slope = np.stack(np.gradient(ndimage.gaussian_filter(field, grad_sigma)))
    return np.stack(
        [ndimage.gaussian_filter(slope[i] * slope[j], tensor_sigma) for i, j in PAIRS[label.ndim]]
    )


@pytest.mark.parametrize("compute_from", ["sdt", "binary"])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("step", [1.0, 2.5])
def test_tensor_and_direction_equal_the_naive_float64_ones(ndim, compute_from, step):
    noise = ndimage.gaussian_filter(np.random.default_rng(ndim).normal(size=(44,) * ndim), 3)
    label = (noise > 0).astype(np.uint8)
    spacing = (step,) * ndim
    options = {"compute_from": compute_from, "spacing": spacing}
    tensor, valid = derive_target("structure_tensor", label[None], **options)
    axes, clear = derive_target("inplane_direction", label[None], **options)
    naive = naive_tensor(label, compute_from, spacing, reach=16.0 * step)
    inner = (slice(None), *[slice(11, -11)] * ndim)
    np.testing.assert_allclose((tensor - naive * valid)[inner], 0, atol=2e-6)
    matrices = unpack(np.stack([part.reshape(-1) for part in naive]))
    _, vectors = np.linalg.eigh(matrices)
    expected = vectors[:, ::-1, 0].T.reshape(ndim, *label.shape)
    good = clear[inner][0]
    assert good.mean() > (0.05 if compute_from == "binary" else 0.6)
    cosine = np.abs((axes * expected)[inner].sum(axis=0)[good])
    assert np.sqrt(np.maximum(1 - cosine**2, 0)).max() < 2e-3


def test_direction_of_a_rolled_sheet_is_the_axis_of_the_roll():
    y, x = np.meshgrid(np.arange(40) - 20.0, np.arange(40) - 20.0, indexing="ij")
    ring = (np.abs(np.hypot(y, x) - 12) < 2).astype(np.uint8)
    label = np.repeat(ring[None], 24, axis=0)
    axes, valid = derive_target("inplane_direction", label[None])
    near = (label > 0) & valid[0]
    assert near[4:-4].sum() > 0.9 * (label[4:-4] > 0).sum()
    assert np.abs(axes[2][near]).min() > 0.99


def test_direction_of_a_flat_sheet_is_invalid_in_3d_and_along_the_line_in_2d():
    label = np.zeros((1, 20, 20, 20), np.uint8)
    label[..., 9:11] = 1
    _, valid = derive_target("inplane_direction", label)
    assert not valid.any()
    axes, valid = derive_target("inplane_direction", label[:, 0])
    assert valid[0, :, 8:12].all()
    np.testing.assert_allclose(axes[1][valid[0]], 1, atol=1e-5)


@pytest.mark.parametrize("compute_from", ["sdt", "binary"])
@pytest.mark.parametrize("value", [0, 1])
def test_nothing_is_valid_without_a_surface(compute_from, value):
    label = np.full((1, 12, 12, 12), value, np.uint8)
    for task in ("structure_tensor", "inplane_direction"):
        values, valid = derive_target(task, label, compute_from=compute_from)
        assert not valid.any()
        assert (values == 0).all()


def test_tensors_are_positive_semidefinite_and_bounded_by_one():
    label = (ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(30, 30, 30)), 2) > 0).astype(
        np.uint8
    )
    tensor, valid = derive_target("structure_tensor", label[None])
    values = np.linalg.eigvalsh(unpack(tensor[:, valid[0]]))
    assert values.min() > -1e-5
    assert values.sum(axis=1).max() < 1.05
