"""Targets of coarser outputs: which voxels enter a coarse voxel, and which must not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import make_target

from volumen.losses.deep_supervision import block_size, default_interpolation, downsample, level_weights


def _blocks(x: torch.Tensor, factor: tuple[int, ...]):
    """Yield the index of each coarse voxel and the slices of its fine ones."""
    size = [-(-n // f) for n, f in zip(x.shape[2:], factor)]
    for index in np.ndindex(*size):
        yield index, tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factor))


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_level_weights_halve_and_sum_to_one(levels):
    weights = level_weights(levels)
    assert sum(weights) == pytest.approx(1)
    assert all(a == pytest.approx(2 * b) for a, b in itertools.pairwise(weights))


def test_block_sizes():
    assert block_size((8, 64, 64), (8, 32, 16)) == (1, 2, 4)
    assert block_size((5, 7), (3, 2)) == (2, 4)
    with pytest.raises(ValueError, match="no downsampling"):
        block_size((8,), (7,))


@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 5, 7), (1, 7, 5, 9)])
@pytest.mark.parametrize("kind", ["distance", "tensor"])
def test_linear_is_the_mean_of_blocks_whose_voxels_are_all_valid(shape, kind):
    generator = torch.Generator().manual_seed(0)
    target = make_target(kind, shape, generator)
    mask = torch.rand(shape[0], 1, *shape[1:], generator=generator) > 0.1
    target = target.masked_fill(~mask, torch.nan)
    factor = (2,) * (len(shape) - 1)
    size = tuple(-(-n // 2) for n in shape[1:])
    coarse, known = downsample(target, mask, size, kind=kind, interpolation="linear")
    assert coarse.shape[2:] == known.shape[2:] == size
    assert known.dtype == torch.bool
    for index, block in _blocks(target, factor):
        here = (slice(None), slice(None), *index)
        fine, valid = target[(..., *block)].flatten(2), mask[(..., *block)].flatten(2)
        assert torch.equal(known[here], valid.all(dim=2))
        expected = torch.where(valid.all(dim=2), fine.mean(dim=2), 0.0)
        torch.testing.assert_close(coarse[here], expected)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("shape", [(16, 16, 8), (57, 43)])
def test_labels_are_picked_and_never_mixed(factor, shape):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (2, 1, *shape), generator=generator).to(torch.uint8)
    mask = torch.rand(2, 1, *shape, generator=generator) > 0.02
    target[~mask] = 255
    size = tuple(-(-n // factor) for n in shape)
    coarse, known = downsample(target, mask, size, kind="multiclass", interpolation="nearest")
    assert coarse.dtype == torch.uint8
    middle = (factor - 1) // 2
    for index, block in _blocks(target, (factor,) * len(shape)):
        here, fine = (slice(None), slice(None), *index), target[(..., *block)]
        picked = fine[(..., *(min(middle, n - 1) for n in fine.shape[2:]))]
        valid = mask[(..., *block)].flatten(2).all(dim=2)
        assert torch.equal(known[here], valid)
        assert torch.equal(coarse[here], torch.where(valid, picked, 0))
    assert coarse.max() < 5


def test_vectors_are_renormalised_and_cancelled_ones_left_out():
    target = torch.zeros(1, 2, 4, 4)
    target[:, 0] = 1.0
    target[:, :, :2, :2] = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    target[:, :, :1, :2] = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    target[:, 0, 2:, 2:] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    coarse, known = downsample(target, None, (2, 2), kind="vector", interpolation="linear")
    torch.testing.assert_close(coarse[0, :, 0, 0], torch.full((2,), 0.5**0.5))
    torch.testing.assert_close(coarse[0, :, 0, 1], torch.tensor([1.0, 0.0]))
    assert known[0, 0].tolist() == [[True, True], [True, False]]
    assert torch.all(coarse[0, :, 1, 1] == 0)


def test_axes_are_averaged_like_the_leading_eigenvector_of_their_outer_products():
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.randn(1, 3, 2, 2, 2, generator=generator), size=(8, 8, 8), mode="trilinear")
    axis = F.normalize(smooth, dim=1)
    flipped = axis * torch.where(torch.rand(1, 1, 8, 8, 8, generator=generator) < 0.5, -1.0, 1.0)
    coarse, known = downsample(flipped, None, (4, 4, 4), kind="axis", interpolation="linear")
    again, _ = downsample(axis, None, (4, 4, 4), kind="axis", interpolation="linear")
    torch.testing.assert_close((coarse * again).sum(1).abs(), torch.ones(1, 4, 4, 4))
    outer = F.avg_pool3d((flipped[:, :, None] * flipped[:, None]).flatten(1, 2), 2).unflatten(1, (3, 3))
    leading = torch.linalg.eigh(outer.movedim((1, 2), (-2, -1)))[1][..., -1].movedim(-1, 1)
    agreement = (coarse * leading).sum(1).abs()[known[:, 0]]
    assert known.float().mean() > 0.9
    assert agreement.min() > 1 - 1e-6


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("dims", [2, 3])
def test_coarse_axes_are_numpys_leading_eigenvectors_wherever_one_leads(dims, factor):
    rng = np.random.default_rng(dims * factor)
    coarse_size = (6,) * dims
    # The blocks range from complete agreement to hardly any.
    middle = rng.normal(size=(dims, *coarse_size))
    for axis in range(1, dims + 1):
        middle = np.repeat(middle, factor, axis)
    spread = np.linspace(0.1, 2.5, coarse_size[0] * factor).reshape(-1, *(1,) * (dims - 1))
    fine = middle + spread * rng.normal(size=middle.shape)
    fine = (fine / np.linalg.norm(fine, axis=0)).astype(np.float32)
    coarse, known = downsample(
        torch.from_numpy(fine)[None], None, coarse_size, kind="axis", interpolation="linear"
    )
    checked = 0
    for index, block in _blocks(torch.from_numpy(fine)[None], (factor,) * dims):
        vectors = fine[(slice(None), *block)].reshape(dims, -1).astype(np.float64)
        values, axes = np.linalg.eigh(vectors @ vectors.T / vectors.shape[1])
        gap = (values[-1] - values[-2]) / (values[-1] + values[-2])
        if abs(gap - 0.01) > 1e-5:
            assert bool(known[(0, 0, *index)]) == (gap > 0.01)
        if known[(0, 0, *index)]:
            found = coarse[(0, slice(None), *index)].numpy().astype(np.float64)
            assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
            # The sine of the angle between them: below 0.01 degrees.
            assert np.linalg.norm(found - (found @ axes[:, -1]) * axes[:, -1]) < 2e-4
            checked += 1
        else:
            assert not coarse[(0, slice(None), *index)].any()
    assert checked > 0.5 * 6**dims


def test_two_crossing_directions_have_no_mean_axis():
    target = torch.zeros(1, 3, 2, 2, 2)
    target[:, 0, 0], target[:, 1, 1] = 1.0, 1.0
    coarse, known = downsample(target, None, (1, 1, 1), kind="axis", interpolation="linear")
    assert not known.any()
    assert not coarse.any()


def test_same_size_is_untouched_and_no_mask_means_all_valid():
    target = torch.randn(1, 1, 4, 4)
    same, known = downsample(target, None, (4, 4), kind="distance", interpolation="linear")
    assert same is target
    assert known.all()


def test_defaults():
    assert default_interpolation("multiclass") == "nearest"
    assert default_interpolation("axis") == "linear"
