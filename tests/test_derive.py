"""Derived targets as transforms of a sample: exact under cropping, and rotating with the image."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volumen.derived.derivation import derive_target
from volumen.derived.registry import get_task, task_kind, task_out_channels, task_types
from volumen.derived.source_fields import SourceFields
from volumen.transforms.derive import DeriveTargetsd, derive_halo
from volumen.utils.errors import VolumenError

SPEC_TASKS = ("distance_transform", "surface_normals", "structure_tensor", "inplane_direction")
ALL_TASKS = task_types()


def entries(names, **params):
    return {name: {"type": name, "source_target": "label", **params} for name in names}


def blobs(shape, seed, smoothness=1.5):
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, [min(smoothness, size / 4) for size in shape])


def instances(shape, seed):
    """Return labels with several numbered components."""
    return ndimage.label(blobs(shape, seed) > 0.08)[0].astype(np.int32)


def unknown_at(shape, seed, share):
    known = np.random.default_rng(seed).random(shape) >= share / 60
    return ndimage.binary_erosion(known, iterations=1, border_value=1) if share else known


def sample_of(label, known, in_volume, spacing):
    return {
        "label": label[None],
        "label_mask": known[None],
        "in_volume": None if in_volume is None else in_volume[None],
        "spacing": spacing,
    }


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(30, 34), (17, 18, 26), (3, 24, 25)]),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 3.0, 1.5), (45.0, 4.6, 4.6)]),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.1]),
    corner=st.tuples(*[st.floats(0, 1)] * 3),
)
def test_a_derived_patch_equals_the_crop_of_the_derived_whole(shape, spacing, seed, share, corner):
    spacing = spacing[-len(shape) :]
    label = instances(shape, seed)
    known = unknown_at(shape, seed, share)
    tasks = entries(ALL_TASKS)
    for task in tasks.values():
        if "reach" in get_task(task["type"]).defaults:
            task["reach"] = 5 * min(spacing)
    halo = derive_halo(tasks, spacing)
    whole = DeriveTargetsd(tasks)(sample_of(label, known, None, spacing))

    size = [min(8, length) for length in shape]
    # Patches may extend beyond the volume by a voxel or two.
    start = [round(where * (length - step + 3)) - 2 for where, length, step in zip(corner, shape, size)]
    padding = [edge + 3 for edge in halo]
    cut = tuple(
        slice(a + pad - edge, a + pad + step + edge) for a, pad, edge, step in zip(start, padding, halo, size)
    )
    around = [
        np.pad(array, [(pad, pad) for pad in padding])[cut] for array in (label, known, np.ones(shape, bool))
    ]
    patch = DeriveTargetsd(tasks, halo)(sample_of(*around, spacing))

    overlap = [(max(a, 0), min(a + step, length)) for a, step, length in zip(start, size, shape)]
    ours = tuple(slice(lo - a, hi - a) for (lo, hi), a in zip(overlap, start))
    theirs = tuple(slice(lo, hi) for lo, hi in overlap)
    for name in tasks:
        mask = patch[f"{name}_mask"]
        assert mask.shape == (1, *size)
        assert mask.sum() == mask[(slice(None), *ours)].sum(), f"{name} is valid outside the volume"
        assert (mask[(slice(None), *ours)] == whole[f"{name}_mask"][(slice(None), *theirs)]).all(), name
        valid = mask[(slice(None), *ours)]
        inside, expected = patch[name][(slice(None), *ours)], whole[name][(slice(None), *theirs)]
        np.testing.assert_allclose(inside * valid, expected * valid, atol=1e-6, err_msg=name)


def turned(array, order, flips):
    return np.flip(array.transpose(order), flips).copy()


def turned_vectors(vectors, order, flips):
    """Transform vectors (x, y[, z]) on a grid of which the axes were permuted, then flipped."""
    parts = vectors[::-1]
    moved = [turned(parts[axis], order, flips) for axis in order]
    return np.stack([-part if axis in flips else part for axis, part in enumerate(moved)])[::-1]


def turned_tensors(tensors, order, flips):
    ndim = len(order)
    pairs = [(i, j) for i in range(ndim) for j in range(i, ndim)]
    index = {pair: number for number, pair in enumerate(pairs)}
    moved = []
    for i, j in pairs:
        part = turned(tensors[index[tuple(sorted((order[i], order[j])))]], order, flips)
        moved.append(-part if (i in flips) != (j in flips) else part)
    return np.stack(moved)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_flips_rotations_and_transposes_commute_with_derivation(ndim, share):
    shape = (18, 22, 20)[:ndim]
    label = (blobs(shape, 3) > 0).astype(np.uint8)
    known = unknown_at(shape, 4, share)
    spacing = (2.0, 1.0, 1.5)[:ndim]
    transform = DeriveTargetsd(entries(SPEC_TASKS))
    plain = transform(sample_of(label, known, None, spacing))
    every_flip = [flips for count in range(ndim + 1) for flips in itertools.combinations(range(ndim), count)]
    for order, flips in itertools.product(itertools.permutations(range(ndim)), every_flip):
        arrays = [turned(array, order, flips) for array in (label, known)]
        result = transform(sample_of(*arrays, None, tuple(spacing[axis] for axis in order)))
        for name in SPEC_TASKS:
            valid = turned(plain[f"{name}_mask"][0], order, flips)
            assert (result[f"{name}_mask"][0] != valid).mean() < 1e-3, name
            both = valid & result[f"{name}_mask"][0]
            if name == "distance_transform":
                expected = turned(plain[name][0], order, flips)[None]
            elif name == "structure_tensor":
                expected = turned_tensors(plain[name], order, flips)
            else:
                expected = turned_vectors(plain[name], order, flips)
            if name == "inplane_direction":
                expected = expected * np.where((expected * result[name]).sum(axis=0) < 0, -1, 1)
            tolerance = 3e-3 if name == "inplane_direction" else 1e-4
            np.testing.assert_allclose(result[name] * both, expected * both, atol=tolerance, err_msg=name)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), ndim=st.sampled_from([2, 3]), share=st.sampled_from([0.0, 0.3]))
def test_directions_are_unit_where_valid_and_zero_elsewhere(seed, ndim, share):
    shape = (20, 21, 22)[:ndim]
    label = (blobs(shape, seed) > 0.02).astype(np.uint8)
    known = unknown_at(shape, seed, share)
    for name in ("surface_normals", "inplane_direction"):
        values, valid = derive_target(name, label[None], known=known[None])
        norm = np.linalg.norm(values, axis=0)
        np.testing.assert_allclose(norm[valid[0]], 1, atol=1e-5)
        assert (norm[~valid[0]] == 0).all()
        assert not (valid[0] & ~known).any()


def test_labels_at_the_edge_of_the_patch_make_no_false_surface():
    label = np.zeros((1, 16, 40), np.uint8)
    label[..., :20] = 1
    for name in SPEC_TASKS:
        values, valid = derive_target(name, label, reach=8)
        middle, middle_valid = values[:, 8], valid[:, 8]
        for row in (0, 1, 14, 15):
            assert (valid[:, row] == middle_valid).all(), name
            np.testing.assert_allclose(values[:, row], middle, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("value", [0, 1])
def test_patches_without_a_surface(value):
    sample = DeriveTargetsd(entries(SPEC_TASKS))({"label": np.full((1, 9, 9, 9), value, np.uint8)})
    assert sample["distance_transform_mask"].all()
    assert (sample["distance_transform"] == (-16 if value else 16)).all()
    for name in SPEC_TASKS[1:]:
        assert not sample[f"{name}_mask"].any()
        assert (sample[name] == 0).all()


@pytest.mark.parametrize("name", ALL_TASKS)
def test_patches_wholly_unknown_or_wholly_outside_have_no_valid_voxel(name):
    shape = (1, 30, 30, 30)
    nothing = np.zeros(shape, bool)
    for masks in ({"known": nothing}, {"known": nothing, "in_volume": nothing}):
        values, valid = derive_target(name, np.ones(shape, np.uint8), halo=4, **masks)
        assert values.shape[1:] == valid.shape[1:] == (22, 22, 22)
        assert not valid.any()
        assert np.isfinite(values).all()


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", ALL_TASKS)
def test_shapes_dtypes_and_channels_are_as_announced(name, ndim):
    label = instances((12, 14, 16)[:ndim], 1)
    values, valid = derive_target(name, label[None])
    assert values.shape == (task_out_channels(name, ndim), *label.shape)
    assert values.dtype == np.float32
    assert valid.shape == (1, *label.shape)
    assert valid.dtype == bool
    assert valid.any()
    assert task_kind(name) in {"distance", "vector", "axis", "tensor", "multilabel", "binary", "field"}


def test_an_irregular_volume_is_respected():
    label = (blobs((30, 32), 2) > 0).astype(np.uint8)
    y, x = np.meshgrid(np.arange(30) - 15, np.arange(32) - 16, indexing="ij")
    # The volume is a diamond, since an array that fills its bounding box would be cropped to it.
    in_volume = np.abs(y) + np.abs(x) < 15
    known = in_volume.copy()
    other = np.where(in_volume, label, 1 - label)
    for name in SPEC_TASKS:
        values, valid = derive_target(name, label[None], known=known[None], in_volume=in_volume[None])
        again, valid_again = derive_target(name, other[None], known=known[None], in_volume=in_volume[None])
        assert not valid[0][~in_volume].any()
        assert (valid == valid_again).all(), f"{name} depends on labels outside the volume"
        np.testing.assert_array_equal(values * valid, again * valid)
        # The border of the volume does not invalidate any voxel.
        assert valid[0][in_volume].mean() > 0.95


def test_one_distance_serves_all_tasks_of_a_source(monkeypatch):
    calls = []
    original = SourceFields.functions

    def counted(*args, **kwargs):
        calls.append(1)
        return original.signed_distance(*args, **kwargs)

    monkeypatch.setattr(SourceFields, "functions", original._replace(signed_distance=counted))
    tasks = entries(SPEC_TASKS) | {
        "near": {
            "type": "distance_transform",
            "source_target": "label",
            "reach": 4,
            "distance_type": "inside",
        }
    }
    sample = {"label": (blobs((20, 20), 0) > 0).astype(np.uint8)[None]}
    derived = DeriveTargetsd(tasks)(sample)
    assert len(calls) == 1
    assert derived["near"].max() <= 4


def test_a_shorter_reach_is_the_same_as_deriving_with_it_alone():
    label = (blobs((24, 24), 8) > 0.1).astype(np.uint8)
    known = unknown_at(label.shape, 8, 0.2)
    both = entries(["distance_transform"]) | {
        "short": {"type": "distance_transform", "source_target": "label", "reach": 3.0}
    }
    for mask in (np.ones_like(known), known):
        sample = DeriveTargetsd(both)(sample_of(label, mask, None, (1.0, 1.0)))
        alone, valid = derive_target("distance_transform", label[None], known=mask[None], reach=3.0)
        assert (sample["short_mask"] == valid).all()
        np.testing.assert_array_equal(sample["short"], alone)


def test_classes_of_a_label_and_channels_of_a_label_are_chosen_alike():
    label = np.zeros((20, 20), np.uint8)
    label[2:6, 2:18] = 1
    label[10:16, 4:9] = 2
    channels = np.stack([label == 1, label == 2]).astype(np.uint8)
    by_class, _ = derive_target("distance_transform", label[None], classes=[1, 2], out_channels=2)
    by_channel, _ = derive_target("distance_transform", channels, out_channels=2)
    np.testing.assert_array_equal(by_class, by_channel)
    from_the_first, _ = derive_target("distance_transform", label[None], out_channels=2)
    np.testing.assert_array_equal(by_class, from_the_first)
    union, _ = derive_target("distance_transform", label[None])
    np.testing.assert_array_equal(union, derive_target("distance_transform", channels)[0])
    only, _ = derive_target("distance_transform", label[None], classes=[2])
    np.testing.assert_array_equal(only[0], by_class[1])
    np.testing.assert_array_equal(only, derive_target("distance_transform", channels, classes=[1])[0])


def test_the_sample_keeps_its_other_entries_and_loses_the_shared_fields():
    sample = {"label": np.ones((1, 8, 8), np.uint8), "volume_name": "a"}
    derived = DeriveTargetsd(entries(["distance_transform"]), halo=(1, 2))(sample)
    assert set(derived) == {"label", "volume_name", "distance_transform", "distance_transform_mask"}
    assert derived["distance_transform"].shape == (1, 6, 4)
    assert set(sample) == {"label", "volume_name"}


def test_the_transform_can_be_sent_to_workers():
    transform = pickle.loads(pickle.dumps(DeriveTargetsd(entries(SPEC_TASKS), halo=2)))
    sample = {"label": (blobs((16, 16), 0) > 0).astype(np.uint8)[None]}
    np.testing.assert_array_equal(
        transform(sample)["surface_normals"],
        DeriveTargetsd(entries(SPEC_TASKS), halo=2)(sample)["surface_normals"],
    )


@pytest.mark.parametrize("spacing", [np.array([2.0, 1.0]), [2, 1], (2.0, 1.0)])
def test_arrays_of_any_kind_are_taken(spacing):
    label = (blobs((20, 24), 0) > 0)[None]
    expected, valid = derive_target("surface_normals", label.astype(np.uint8), spacing=(2.0, 1.0))
    for one in (label, label.astype(np.uint64), np.asfortranarray(label), torch.from_numpy(label)):
        sample = {"label": one, "label_mask": None, "in_volume": None, "spacing": spacing}
        derived = DeriveTargetsd(entries(["surface_normals"]))(sample)
        np.testing.assert_array_equal(derived["surface_normals"], expected)
        assert (derived["surface_normals_mask"] == valid).all()


def test_a_task_without_source_or_with_an_absent_one_is_refused():
    with pytest.raises(VolumenError, match=r"auxiliary_tasks\.a: no source_target"):
        DeriveTargetsd({"a": {"type": "distance_transform"}})
    with pytest.raises(KeyError, match="'label' is not in the sample"):
        DeriveTargetsd(entries(["distance_transform"]))({"image": np.zeros((1, 4, 4))})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": np.zeros((4, 4))}, r"labels need shape"),
        ({"labels": np.zeros((1, 4, 4)), "halo": 2}, "leaves nothing"),
        ({"labels": np.zeros((1, 4, 4)), "known": np.ones((1, 4, 5), bool)}, "known has shape"),
        ({"labels": np.zeros((1, 4, 4)), "spacing": (1, 1, 1)}, "2 positive numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SourceFields(**arguments)
