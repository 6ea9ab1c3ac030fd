"""Distances of partly known labels: bounds that always hold the truth, and exact validity as it was."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_cases import case_of, sample_of
from scipy import ndimage

from volumen.derived import registry
from volumen.derived.arrays.fields import nearest_squared
from volumen.derived.distance_window import distance_window
from volumen.derived.registry import DerivedTask, get_task, task_types, validate_task
from volumen.transforms.derive import DeriveTargetsd, derive_halo
from volumen.transforms.derive_batch import DeriveBatch, PackSourcesd
from volumen.transforms.finalize import FinalizePatchd, RestrictToLabelledd
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import check_names

# What main derived before validity existed: type, SHA-256 and sum of magnitudes of values and of the mask.
EXACT = [
    (2, "affinities", "ddedc08a519aeb24", 1572.0, "cbf7ce0f793d91bf", 1836),
    (2, "boundary", "a69426c69a0e83de", 1334.0, "319ce7363dd6bb48", 1831),
    (2, "distance_transform", "6599e5ba9f6fb5ad", 2992.517, "969cddc1d5e278d4", 1782),
    (2, "inplane_direction", "97729a29eb00e65b", 967.013, "4ea4214891a72301", 853),
    (2, "local_shape_descriptors", "edc22323a5f0f543", 2661.258, "1fbee9e534242420", 1055),
    (2, "nearest_component", "aa25f213ca50db31", 1067.255, "0be0579b6b6e5cd1", 643),
    (2, "skeleton", "8d8da31b681892b7", 397.0, "6c50b77d7f91d554", 1282),
    (2, "structure_tensor", "49b2de1bc7ce0504", 260.836, "4ea4214891a72301", 853),
    (2, "surface_normals", "1973c65380a2c84f", 634.47, "0424f91d60c42219", 561),
    (3, "affinities", "10a26bf2b9fad7f2", 42097.0, "df837adaa21148d2", 42636),
    (3, "boundary", "9c72701fa3c0a2fe", 38475.0, "df837adaa21148d2", 42636),
    (3, "distance_transform", "34c3f71727812ecc", 33884.404, "45126c3459dd527a", 41344),
    (3, "inplane_direction", "a8f306fe2f1c73c6", 24562.472, "e4357da68eaeebd0", 21248),
    (3, "local_shape_descriptors", "070d4f4d4aed048a", 75715.549, "870218c6cbe1618d", 21412),
    (3, "nearest_component", "cf7b57ae88bbf86e", 26732.53, "13e5b1c72b6efd6a", 17636),
    (3, "skeleton", "898aaf21336216f3", 14351.0, "a80e3ce16b6155fc", 33074),
    (3, "structure_tensor", "25f194a63d79085f", 2910.131, "439ab53e6bc500f8", 21290),
    (3, "surface_normals", "b6fcf748f06c2607", 8865.867, "ab0d5a69835e80d9", 7149),
]
BIT_BY_BIT = {"affinities", "boundary", "distance_transform", "nearest_component"}


def striped(shape):
    """Labels 0, 1 and 2, unknown at one end, with a layer outside the volume."""
    grid = np.meshgrid(*[np.arange(size) for size in shape], indexing="ij")
    wave = sum(((3 + 2 * k) * g * g + 7 * k * g) % 23 for k, g in enumerate(grid))
    label = ((wave // 9) % 2).astype(np.int32) * 2
    label[tuple(slice(4, size // 2) for size in shape)] = 1
    known, inside = np.ones((2, *shape), bool)
    known[..., 3 * shape[-1] // 4 :] = False
    known[shape[0] // 2, ..., :2] = False
    inside[:1] = False
    return {
        "label": label[None],
        "label_mask": (known & inside)[None],
        "in_volume": inside[None],
        "spacing": (2.0, 1.0, 1.0)[: len(shape)],
    }


@pytest.mark.parametrize("validity", [None, "exact"])
@pytest.mark.parametrize(("ndim", "name", "digest", "total", "mask_digest", "count"), EXACT)
def test_exact_validity_is_what_it_was_bit_by_bit(ndim, name, digest, total, mask_digest, count, validity):
    task = {"type": name, "source_target": "label", "validity": validity}
    for key, value in (("reach", 6.0), ("sigma", 1.0)):
        if key in get_task(name).defaults:
            task[key] = value
    out = DeriveTargetsd({"t": task}, halo=3)(striped((60, 50) if ndim == 2 else (40, 44, 48)))
    assert set(out) == {"label", "label_mask", "in_volume", "spacing", "t", "t_mask"}
    assert int(out["t_mask"].sum()) == count
    assert np.abs(out["t"].astype(np.float64)).sum() == pytest.approx(total, rel=1e-5, abs=1e-2)
    if name in BIT_BY_BIT:  # the others use exponentials, which differ between machines in the last bit
        assert hashlib.sha256(np.ascontiguousarray(out["t"]).tobytes()).hexdigest()[:16] == digest
        assert hashlib.sha256(out["t_mask"].tobytes()).hexdigest()[:16] == mask_digest


def test_the_table_has_every_type():
    built_in = {name for name in task_types() if type(get_task(name)).__module__.startswith("volumen.")}
    assert {name for _, name, *_ in EXACT} == built_in - {"critical"}


def blobs(shape, rng, sigma):
    return ndimage.gaussian_filter(rng.normal(size=shape), [min(sigma, size / 4) for size in shape])


def partly_known(shape, rng, kind):
    """Return masks such as people have: blobs, slabs, single slices, orthogonal planes, boxes, single voxels."""
    known = np.zeros(shape, bool)
    axis = int(rng.integers(len(shape)))
    if kind == "blobs":
        return blobs(shape, rng, 2.0) > 0
    if kind == "voxels":
        return rng.random(shape) > 0.9
    if kind == "planes":
        for one in range(len(shape)):
            np.moveaxis(known, one, 0)[shape[one] // 2] = True
    elif kind == "box":
        known[tuple(slice(size // 4, size // 4 + max(1, size // 2)) for size in shape)] = True
    else:
        thickness = 5 if kind == "slabs" else 1
        for start in range(int(rng.integers(4)), shape[axis], 8 + thickness):
            np.moveaxis(known, axis, 0)[start : start + thickness] = True
    return known


def tasks_of(reach, **params):
    kinds = ("signed", "inside", "outside")
    base = {"type": "distance_transform", "source_target": "label", "reach": reach, **params}
    return {kind: {**base, "distance_type": kind} for kind in kinds}


def informed(tasks):
    return {name: {**task, "validity": "informed"} for name, task in tasks.items()}


MASKS = ("blobs", "voxels", "planes", "box", "slabs", "slices")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(24, 30), (1, 20), (16, 18, 20), (1, 15, 17), (14, 1, 13)]),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 3.0, 1.5), (45.0, 4.6, 4.6)]),
    reach=st.sampled_from([1.5, 4.0, 16.0]),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 10**6),
    labels=st.sampled_from(["binary", "classes", "channels", "instances"]),
    outside=st.booleans(),
)
def test_the_truth_of_the_whole_volume_lies_between_the_bounds(
    shape, spacing, reach, mask, seed, labels, outside
):
    rng = np.random.default_rng(seed)
    count = 2 if labels == "channels" else 1
    label = (np.stack([blobs(shape, rng, 1.5) for _ in range(count)]) > 0).astype(np.int32)
    if labels in ("classes", "instances"):
        label *= rng.integers(1, 4, label.shape)
    params = {"classes": [1, 2], "out_channels": 2} if labels == "classes" else {}
    tasks = tasks_of(reach, **params)
    instances = ["label"] if labels == "instances" else []
    inside = np.ones((1, *shape), bool)
    if outside:
        inside[..., -2:] = False
        inside[0, 0, 0] = False
    known = partly_known(shape, rng, mask)[None] & inside
    sample = {"label": label, "in_volume": inside, "spacing": spacing[: len(shape)]}
    whole = DeriveTargetsd(tasks, unit="voxel", instances=instances)({**sample, "label_mask": inside})
    exact = DeriveTargetsd(tasks, unit="voxel", instances=instances)({**sample, "label_mask": known})
    found = DeriveTargetsd(informed(tasks), unit="voxel", instances=instances)(
        {**sample, "label_mask": known}
    )
    for name in tasks:
        lower, upper = found[name], found[f"{name}_upper"]
        counts = np.broadcast_to(found[f"{name}_confidence"] > 0, lower.shape)
        # Every known voxel teaches; no truth is contradicted, not even by a rounding error.
        np.testing.assert_array_equal(found[f"{name}_confidence"], known.astype(np.float32))
        assert (lower <= whole[name])[counts].all()
        assert (whole[name] <= upper)[counts].all()
        # Where the truth is known exactly both ends are the exact value.
        certain = np.broadcast_to(exact[f"{name}_mask"], lower.shape)
        assert (found[f"{name}_mask"] | ~exact[f"{name}_mask"]).all()
        np.testing.assert_array_equal(lower[certain], exact[name][certain])
        np.testing.assert_array_equal(upper[certain], exact[name][certain])
    check_device(informed(tasks), sample | {"label_mask": known}, found, instances)


def check_device(tasks, sample, found, instances=(), halo=0):
    """The batch on the device has the same values, bit by bit."""
    derive = DeriveBatch(tasks, halo, unit="voxel", instances=instances)
    packed = PackSourcesd(derive.sources)(sample)
    batch = {k: torch.as_tensor(v)[None] for k, v in packed.items() if k.startswith("wide/")}
    theirs = derive(batch, derive.host_facts(batch))
    for name in tasks:
        for key in (name, f"{name}_mask", f"{name}_confidence", f"{name}_upper"):
            np.testing.assert_array_equal(theirs[key][0].numpy(), found[key], err_msg=key)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), mask=st.sampled_from(MASKS), ndim=st.sampled_from([2, 3]))
def test_the_truth_lies_between_the_bounds_of_augmented_patches(seed, mask, ndim):
    rng = np.random.default_rng(seed)
    shape, size, spacing = (40, 44, 48)[:ndim], (14,) * ndim, (1.5, 1.0, 1.0)[:ndim]
    label = (blobs(shape, rng, 3.0) > 0).astype(np.uint8)
    known = partly_known(shape, rng, mask).astype(np.uint8)
    tasks = tasks_of(5.0)
    halo = derive_halo(tasks, spacing)
    start = tuple(int(rng.integers(-2, whole - edge + 2)) for whole, edge in zip(shape, size))
    draw = RandSpatialTransformd(prob_rotation=1.0, prob_scale=1.0)
    draw.set_random_state(seed)
    spatial = draw({"location": _Place(size), "case": case_of(label, spacing=spacing)})["spatial"]

    def read(masks):
        case = case_of(label, {"label": label}, masks, spacing=spacing)
        return ReadPatchd(["label"], halo=halo)(sample_of(case, start, size, spatial=spatial))

    whole = DeriveTargetsd(tasks, halo, unit="voxel")(read({}))
    found = DeriveTargetsd(informed(tasks), halo, unit="voxel")(read({"label": known}))
    for name in tasks:
        # The truth of a voxel near the border of the volume is that of the part that the patch's halo holds.
        counts = (found[f"{name}_confidence"] > 0) & whole[f"{name}_mask"]
        assert (found[name] <= whole[name])[counts].all()
        assert (whole[name] <= found[f"{name}_upper"])[counts].all()


class _Place:
    def __init__(self, size):
        self.size = size


def test_a_patch_with_its_halo_has_the_bounds_of_the_whole_volume():
    rng = np.random.default_rng(5)
    shape = (40, 36, 44)
    label, known = (
        (blobs(shape, rng, 2.0) > 0).astype(np.int32)[None],
        partly_known(shape, rng, "slabs")[None],
    )
    tasks = informed(tasks_of(6.0))
    halo = derive_halo(tasks, (1.0, 1.0, 1.0))
    whole = DeriveTargetsd(tasks)({"label": label, "label_mask": known})
    part = tuple(slice(10 - edge, 24 + edge) for edge in halo)
    cropped = {"label": label[(0, *part)][None], "label_mask": known[(0, *part)][None]}
    patch = DeriveTargetsd(tasks, halo)(cropped)
    for key in ("signed", "signed_upper", "signed_confidence", "signed_mask", "outside_upper"):
        np.testing.assert_array_equal(patch[key], whole[key][(slice(None), *[slice(10, 24)] * 3)])


def test_bounds_are_the_nearest_known_opposite_and_the_nearest_unknown():
    """Brute force over all voxels of a small array."""
    rng = np.random.default_rng(2)
    shape = (9, 11)
    label, known = rng.random(shape) > 0.5, rng.random(shape) > 0.4
    tasks = informed({"d": {"type": "distance_transform", "source_target": "label", "reach": 30.0}})
    found = DeriveTargetsd(tasks)({"label": label[None].astype(int), "label_mask": known[None]})
    places = np.argwhere(np.ones(shape, bool))
    for at in map(tuple, np.argwhere(known)):
        away = np.linalg.norm(places - at, axis=1).reshape(shape) - 0.5
        other = away[known & (label != label[at])].min(initial=30.0)
        near = min(other, away[~known].min(initial=30.0))
        low, high = (-other, -near) if label[at] else (near, other)
        assert found["d"][(0, *at)] == pytest.approx(low, abs=1e-5)
        assert found["d_upper"][(0, *at)] == pytest.approx(high, abs=1e-5)


def test_slabs_of_labels_teach_every_labelled_voxel_where_exact_validity_teaches_few():
    z, y, x = np.meshgrid(*[np.arange(48)] * 3, indexing="ij")
    label = (((x + 0.5 * z + 0.2 * y) % 16) < 4).astype(np.int32)[None]
    known = (z % 16 < 5)[None]
    task = {"type": "distance_transform", "source_target": "label"}
    sample = {"label": label, "label_mask": known}
    exact = DeriveTargetsd({"d": task})(sample)
    found = DeriveTargetsd(informed({"d": task}))(sample)
    assert exact["d_mask"].sum() < 0.4 * known.sum()
    assert (found["d_confidence"] > 0).sum() == known.sum()


def test_the_last_steps_of_a_sample_keep_what_is_known():
    tasks = informed({"d": {"type": "distance_transform", "source_target": "label"}})
    sample = striped((24, 24))
    sample |= {"image": np.zeros((1, 24, 24), np.float32), "volume_name": "a", "start": (0, 0)}
    derived = DeriveTargetsd(tasks)(sample)
    restricted = RestrictToLabelledd(["label"], {"d": "label"})(derived)
    final = FinalizePatchd(["label"], ["d"])(restricted)
    assert {key for key in final if key.startswith("d")} == {"d", "d_mask", "d_confidence", "d_upper"}
    expected = sample["label_mask"] & (sample["label"] > 0)
    np.testing.assert_array_equal(final["d_confidence"].numpy() > 0, expected)
    assert final["d_upper"].dtype == final["d_confidence"].dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "message"),
    [("completed", "not available"), ("informd", "informed"), (True, "exact or informed")],
)
def test_another_validity_is_refused(value, message):
    with pytest.raises(VolumenError, match=message) as caught:
        validate_task("d", {"type": "distance_transform", "validity": value})
    assert "auxiliary_tasks.d.validity" in str(caught.value)


def test_a_target_cannot_have_the_name_of_what_is_known_of_another():
    for ending in ("upper", "confidence", "free"):
        with pytest.raises(VolumenError, match="rename"):
            check_names(["d", f"d_{ending}"], "my.yaml")


class _Plain(DerivedTask):
    type_name = "plain_of_test"

    def derive(self, source, params):
        known = source.known()
        return known[None].astype(np.float32), known[None]


def test_a_type_that_cannot_say_what_is_known_has_exact_validity(monkeypatch):
    monkeypatch.setitem(registry._TASKS, "plain_of_test", _Plain())
    assert not get_task("plain_of_test").informs
    out = DeriveTargetsd({"p": {"type": "plain_of_test", "source_target": "label", "validity": "informed"}})(
        striped((20, 20))
    )
    np.testing.assert_array_equal(out["p_confidence"], out["p_mask"].astype(np.float32))


def test_a_subclass_that_overrides_the_derivation_alone_does_not_inherit_the_bounds():
    own = type("Own", (type(get_task("distance_transform")),), {"type_name": "own", "derive": _Plain.derive})
    assert get_task("distance_transform").informs
    assert get_task("distance_transform").informs_on_device
    assert not own().informs
    assert not own().informs_on_device


@pytest.mark.parametrize("shape", [(30, 34), (14, 17, 19)])
@pytest.mark.parametrize("share", [0.002, 0.05, 0.6])
def test_distances_where_they_are_needed_are_those_of_the_whole(shape, share):
    rng = np.random.default_rng(7)
    feature = rng.random(shape) < share
    region = tuple(slice(2, size - 3) for size in shape)
    window = distance_window(shape, (1.0,) * len(shape), 6.0, region)
    inner = feature[window.around]
    whole = nearest_squared(inner, window.costs, window.part)
    for needed in (rng.random(whole.shape) < 0.1, np.zeros(whole.shape, bool), np.ones(whole.shape, bool)):
        found = nearest_squared(inner, window.costs, window.part, needed)
        np.testing.assert_array_equal(found[needed], whole[needed])
        assert (found >= whole).all()
    if inner.any():
        exact = ndimage.distance_transform_edt(~inner)[window.part]
        near = exact - 0.5 < 6.0
        np.testing.assert_allclose(np.sqrt(whole)[near], exact[near], rtol=1e-5)
