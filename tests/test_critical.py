"""Critical voxels: against counts of components, holes and the Euler number before and after a flip."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.measure import euler_number

from volumen.derived.arrays.critical import critical
from volumen.derived.batches.critical import critical as batch_critical
from volumen.derived.derivation import derive_target


def _topology(mask: np.ndarray) -> tuple[int, int, int]:
    """Components of the foreground (26 or 8), of the background (6 or 4, with a border), and the Euler number."""
    padded = np.pad(mask, 1)
    full, faces = np.ones((3,) * mask.ndim), ndimage.generate_binary_structure(mask.ndim, 1)
    return (
        ndimage.label(padded, full)[1],
        ndimage.label(~padded, faces)[1],
        int(euler_number(padded, connectivity=mask.ndim)),
    )


def _changes(mask: np.ndarray, place: tuple[int, ...]) -> bool:
    flipped = mask.copy()
    flipped[place] ^= True
    return _topology(mask) != _topology(flipped)


def _trivial(mask: np.ndarray, place: tuple[int, ...]) -> bool:
    """Whether a voxel lies inside its class: all that a flip does is a hole, or an object, of one voxel."""
    around = np.pad(mask, 1)[tuple(slice(p, p + 3) for p in place)]
    if mask[place]:
        return bool(around[ndimage.generate_binary_structure(mask.ndim, 1)].all())
    return not around.any()


def _inner(found: np.ndarray) -> np.ndarray:
    return found[(slice(1, -1),) * found.ndim]


def test_every_neighbourhood_of_the_plane_is_decided_like_the_count():
    for number, own in itertools.product(range(256), (False, True)):
        bits = [bool(number >> k & 1) for k in range(8)]
        mask = np.zeros((5, 5), bool)
        mask[1:4, 1:4] = np.array([*bits[:4], own, *bits[4:]]).reshape(3, 3)
        known = np.ones_like(mask)
        expected = _changes(mask, (2, 2)) and not _trivial(mask, (2, 2))
        assert critical(mask, known)[2, 2] == expected, (number, own)
        assert (
            bool(batch_critical(torch.from_numpy(mask[None]), torch.from_numpy(known[None]))[0, 2, 2])
            == expected
        )


def test_random_neighbourhoods_of_space_are_decided_like_the_count():
    rng = np.random.default_rng(0)
    masks = np.zeros((800, 5, 5, 5), bool)
    for mask in masks:
        mask[1:4, 1:4, 1:4] = rng.random((3, 3, 3)) < rng.uniform(0.1, 0.95)
    found = batch_critical(torch.from_numpy(masks), torch.ones(masks.shape, dtype=torch.bool)).numpy()
    for mask, batch in zip(masks, found, strict=True):
        expected = _changes(mask, (2, 2, 2)) and not _trivial(mask, (2, 2, 2))
        assert critical(mask, np.ones_like(mask))[2, 2, 2] == expected
        assert batch[2, 2, 2] == expected
    assert 100 < found[:, 2, 2, 2].sum() < 700


@pytest.mark.parametrize("ndim", [2, 3])
def test_voxels_that_are_not_critical_change_no_count_of_a_whole_image(ndim):
    rng = np.random.default_rng(ndim)
    mask = ndimage.gaussian_filter(rng.normal(size=(24,) * 2 if ndim == 2 else (9, 10, 11)), 0.8) > 0
    found = critical(mask, np.ones_like(mask))
    inner = np.zeros_like(mask)
    inner[(slice(1, -1),) * ndim] = True  # at the border the rules about what lies outside differ
    kept = [tuple(p) for p in np.argwhere(inner & ~found)]
    assert len(kept) > 50
    for place in kept:
        assert not _changes(mask, place) or _trivial(mask, place)
    # A critical voxel changes the topology nearby; where it is joined elsewhere too, a tunnel appears or vanishes.
    for place in map(tuple, np.argwhere(inner & found)):
        assert _changes(mask, place)


@pytest.mark.parametrize("shape", [(30, 31), (12, 13, 14), (1, 20, 21)])
def test_the_batch_is_the_array_with_unknown_voxels_and_a_border(shape):
    rng = np.random.default_rng(0)
    masks, known, inside = (rng.random((3, *shape)) < share for share in (0.5, 0.995, 1.0))
    inside[1, ..., :4] = False
    inside[2, ..., -3:] = False
    tensors = [torch.from_numpy(array) for array in (masks, known, inside)]
    found = batch_critical(*tensors).numpy()
    # As on a GPU, where nothing is read back.
    np.testing.assert_array_equal(batch_critical(*tensors, compact=False).numpy(), found)
    for mask, one, place, expected in zip(masks, known, inside, found, strict=True):
        np.testing.assert_array_equal(critical(mask, one & place, place), expected)
    assert found.any()


def test_known_shapes():
    sheet = np.zeros((9, 9, 9), bool)
    sheet[4] = True
    known = np.ones_like(sheet)
    # Any voxel of a sheet of one voxel opens a hole, at the volume's border too; none of a thick one.
    np.testing.assert_array_equal(critical(sheet, known), sheet)
    sheet[5] = True
    assert not critical(sheet, known).any()
    # Sheets one voxel apart: each voxel between them would merge them.
    two = np.zeros((9, 9, 9), bool)
    two[:4] = two[5:] = True
    np.testing.assert_array_equal(critical(two, known)[4], np.ones((9, 9), bool))
    ring = np.zeros((7, 7), bool)
    ring[1:6, 1:6] = True
    ring[3, 3] = False
    found = critical(ring, np.ones_like(ring))
    assert found[3, 3]
    point = np.zeros((5, 5), bool)
    point[2, 2] = True
    assert critical(point, np.ones_like(point))[2, 2]
    assert not critical(np.ones((5, 5), bool), np.ones((5, 5), bool)).any()
    assert not critical(np.zeros((5, 5), bool), np.ones((5, 5), bool)).any()


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_a_patch_with_a_halo_is_the_crop_of_the_whole(radius):
    rng = np.random.default_rng(3)
    labels = (ndimage.gaussian_filter(rng.normal(size=(20, 22, 24)), 1) > 0).astype(np.uint8)[None]
    whole, _ = derive_target("critical", labels, radius=radius)
    halo = radius + 1
    core = (slice(5, 15), slice(6, 14), slice(4, 16))
    wide = tuple(slice(part.start - halo, part.stop + halo) for part in core)
    part, valid = derive_target("critical", labels[(slice(None), *wide)], halo=halo, radius=radius)
    assert valid.all()
    np.testing.assert_array_equal(part, whole[(slice(None), *core)])
    known = np.ones(labels.shape, bool)
    narrow, expected = critical(labels[0] > 0, known[0]), np.zeros(labels.shape[1:], bool)
    for place in np.argwhere(narrow):
        expected[tuple(slice(max(p - radius, 0), p + radius + 1) for p in place)] = True
    np.testing.assert_array_equal(whole[0], expected)


def test_near_unknown_voxels_nothing_is_said():
    labels = np.zeros((1, 9, 9), np.uint8)
    labels[0, 4] = 1
    known = np.ones((1, 9, 9), bool)
    known[0, :, 0] = False
    values, valid = derive_target("critical", labels, known=known, radius=1)
    assert not valid[0, :, :3].any()
    assert valid[0, :, 3:].all()
    assert not values[0][~valid[0]].any()
    assert values[0, 3:6, 3:].all()
