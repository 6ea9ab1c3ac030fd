"""Fields of partly known labels: exact where they can be, else estimates whose confidence states their error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volumen.derived.arrays.completion import continue_numbers, continue_surfaces
from volumen.derived.arrays.fields import distance_bounds
from volumen.derived.arrays.planes import free_direction
from volumen.derived.confidence import LEAST, NORMAL
from volumen.derived.registry import get_task, task_types
from volumen.transforms.derive import DeriveTargetsd, derive_halo
from volumen.transforms.derive_batch import DeriveBatch, PackSourcesd

ESTIMATED = [name for name in task_types() if hasattr(get_task(name), "calibration")]
TOLERANCE = {"inplane_direction": 2e-3}


def blobs(shape, rng, sigma):
    return ndimage.gaussian_filter(rng.normal(size=shape), [min(sigma, size / 4) for size in shape])


def partly_known(shape, rng, kind):
    known = np.zeros(shape, bool)
    axis = int(rng.integers(len(shape)))
    if kind == "blobs":
        return blobs(shape, rng, 2.5) > 0
    if kind == "slices":
        np.moveaxis(known, axis, 0)[2::6] = True
    elif kind == "slabs":
        for start in range(0, shape[axis], 12):
            np.moveaxis(known, axis, 0)[start : start + 7] = True
    else:
        known[tuple(slice(size // 4, size - size // 6) for size in shape)] = True
    return known


def tasks_of(names, **params):
    tasks = {}
    for name in names:
        tasks[name] = {"type": name, "source_target": "label", **params}
        for key, value in (("reach", 5.0), ("sigma", 1.5), ("grad_sigma", 0.7), ("tensor_sigma", 0.7)):
            if key in get_task(name).defaults:
                tasks[name][key] = value
    return tasks


def informed(tasks):
    return {name: {**task, "validity": "informed"} for name, task in tasks.items()}


def sample_of(shape, seed, mask, outside, labels="binary", spacing=None):
    rng = np.random.default_rng(seed)
    label = (blobs(shape, rng, 2.0) > 0.02).astype(np.int32)
    if labels == "instances":
        label *= np.broadcast_to(1 + np.arange(shape[-1]) // 7, shape).astype(np.int32)
    inside = np.ones((1, *shape), bool)
    if outside:
        inside[..., -2:] = False
        inside[(0,) * len(inside.shape)] = False
    return {
        "label": label[None],
        "label_mask": partly_known(shape, rng, mask)[None] & inside,
        "in_volume": inside if outside else None,
        "spacing": (spacing or (1.0, 1.0, 1.0))[: len(shape)],
    }


CASES = {
    "shape": st.sampled_from([(40, 44), (26, 28, 30), (1, 26, 28)]),
    "seed": st.integers(0, 10**6),
    "mask": st.sampled_from(["blobs", "slabs", "box", "slices"]),
    "outside": st.booleans(),
    "labels": st.sampled_from(["binary", "instances"]),
    "spacing": st.sampled_from([(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 1.0, 1.5)]),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**CASES)
def test_values_are_the_exact_ones_where_these_are_valid(shape, seed, mask, outside, labels, spacing):
    sample = sample_of(shape, seed, mask, outside, labels, spacing)
    tasks = tasks_of(ESTIMATED)
    tasks["binary"] = {"type": "structure_tensor", "source_target": "label", "compute_from": "binary"}
    instances = ["label"] if labels == "instances" else []
    halo = tuple(min(2, (size - 1) // 2) for size in shape)
    exact = DeriveTargetsd(tasks, halo, instances=instances)(sample)
    found = DeriveTargetsd(informed(tasks), halo, instances=instances)(sample)
    for name in tasks:
        valid, confidence = exact[f"{name}_mask"], found[f"{name}_confidence"]
        np.testing.assert_array_equal(found[f"{name}_mask"], valid, err_msg=name)
        np.testing.assert_allclose(found[name] * valid, exact[name] * valid, atol=1e-5, err_msg=name)
        assert (confidence[valid] == 1).all()
        assert (confidence[~valid] < 1).all()
        assert ((confidence == 0) | (confidence >= LEAST * 0.3)).all()
        # An unknown voxel teaches nothing.
        core = tuple(slice(edge, size - edge) for edge, size in zip(halo, shape))
        assert not confidence[0][~sample["label_mask"][(0, *core)]].any()
        assert np.isfinite(found[name]).all()
        assert confidence.dtype == np.float32


@settings(max_examples=15, deadline=None, derandomize=True)
@given(**CASES)
def test_a_batch_on_the_device_has_the_estimates_of_the_workers(shape, seed, mask, outside, labels, spacing):
    sample = sample_of(shape, seed, mask, outside, labels, spacing)
    tasks = informed(tasks_of([name for name in ESTIMATED if get_task(name).informs_on_device]))
    halo = tuple(min(2, (size - 1) // 2) for size in shape)
    instances = ["label"] if labels == "instances" else []
    expected = DeriveTargetsd(tasks, halo, unit="voxel", instances=instances)(sample)
    derive = DeriveBatch(tasks, halo, unit="voxel", instances=instances)
    packed = PackSourcesd(derive.sources)(sample)
    batch = {k: torch.as_tensor(v)[None] for k, v in packed.items() if k.startswith("wide/")}
    found = derive(batch, derive.host_facts(batch))
    for name in tasks:
        ends = [end for end in ("", "_mask", "_confidence", "_free") if name + end in expected]
        assert {key for key in found if key.startswith(name)} == {name + end for end in ends}
        ours, theirs = ({end: one[name + end] for end in ends} for one in (expected, found))
        theirs = {end: value[0].numpy() for end, value in theirs.items()}
        assert (ours["_mask"] != theirs["_mask"]).sum() <= 2
        wrong = abs(ours["_confidence"] - theirs["_confidence"]) > 1e-3
        # A voxel at a threshold may differ by rounding.
        assert wrong.sum() <= 2 + 2e-3 * wrong.size, name
        both = (ours["_confidence"] > 0) & (theirs["_confidence"] > 0)
        if "_free" in ends:
            np.testing.assert_allclose(ours["_free"] * both, theirs["_free"] * both, atol=1e-4)
        values = theirs[""] * np.where((ours[""] * theirs[""]).sum(axis=0) < 0, -1, 1)
        values = values if name == "inplane_direction" else theirs[""]
        far = (abs(ours[""] - values) > TOLERANCE.get(name, 1e-4)) & both
        assert far.sum() <= 3 + 2e-3 * far.size, name


def known_voxels(shape, mask, rng):
    known = np.zeros(shape, bool)
    if mask == "random":
        known = rng.random(shape) > 0.6
    elif mask == "box":
        known[1:4, 2:6, 3:7] = True
    else:
        known[[1, 2, 6] if mask == "slabs" else [3]] = True
    return known


@pytest.mark.parametrize("mask", ["random", "slabs", "slice", "box"])
@pytest.mark.parametrize("seed", [4, 5])
def test_surfaces_go_on_as_the_definition_says(mask, seed):
    """Nested loops over all voxels of a small array."""
    rng = np.random.default_rng(seed)
    shape, spacing = (8, 9, 8), (2.0, 1.0, 1.5)
    label, known = blobs(shape, rng, 1.5) > 0, known_voxels(shape, mask, rng)
    lower, upper, *_ = distance_bounds(label, known=known, spacing=spacing)
    distance = np.where(label, lower, upper)
    found = continue_surfaces(
        label, known, distance, tuple(slice(0, n) for n in shape), spacing=spacing, reach=30.0
    )
    np.testing.assert_array_equal(found[known], label[known])
    places = list(itertools.product(*map(range, shape)))
    for at in places:
        if known[at]:
            continue
        away = {p: sum(((a - b) * s) ** 2 for a, b, s in zip(p, at, spacing)) for p in places if known[p]}
        first = min(away, key=lambda p: (away[p], p))
        value = distance[first]
        for axis in range(3):
            slopes = []
            for side in (-1, 1):
                other = tuple(p + side * (i == axis) for i, p in enumerate(first))
                if 0 <= other[axis] < shape[axis] and known[other]:
                    slopes.append(side * (distance[other] - distance[first]))
            value += (np.mean(slopes) if slopes else 0) * (at[axis] - first[axis])
        if abs(value) > 1e-4:
            assert found[at] == (value < 0), at


def test_numbers_go_on_from_the_nearest_known_voxel():
    rng = np.random.default_rng(5)
    numbers, known = rng.integers(0, 9, (2, 12, 14)), rng.random((12, 14)) > 0.7
    found = continue_numbers(numbers, known, spacing=(1.0, 1.0), reach=3.0)
    near, index = ndimage.distance_transform_edt(~known, return_indices=True)
    ties = ndimage.distance_transform_edt(~known)
    places = np.argwhere(known)
    for at in np.argwhere(~known):
        away = np.linalg.norm(places - at, axis=1)
        nearest = places[away == away.min()]
        allowed = {tuple(numbers[:, *one]) for one in nearest} if ties[tuple(at)] <= 3 else {(0, 0)}
        assert tuple(found[:, *at]) in allowed
    np.testing.assert_array_equal(found[:, known], numbers[:, known])
    assert near.shape == index.shape[1:]


def plane_label(normal, size=56, thickness=5.0, period=18.0):
    grid = np.meshgrid(*[np.arange(size) - size / 2] * 3, indexing="ij")
    depth = sum(n * g for n, g in zip(normal, grid))
    return np.mod(depth, period) < thickness


@pytest.mark.parametrize("tilt", [0.0, 20.0, 40.0])
@pytest.mark.parametrize("thick", [5, 8])
def test_normals_of_tilted_sheets_are_found_in_slabs(tilt, thick):
    angle = np.radians(tilt)
    normal = np.array([np.sin(angle), np.cos(angle) * 0.8, np.cos(angle) * 0.6])
    label = plane_label(normal)
    known = np.broadcast_to((np.arange(56) % 16 < thick)[:, None, None], label.shape)
    task = {"n": {"type": "surface_normals", "source_target": "label", "validity": "informed"}}
    found = DeriveTargetsd(task)({"label": label[None].astype(int), "label_mask": known[None]})
    inner = (slice(12, -12),) * 3
    teaches = (found["n_confidence"][0] > 0)[inner]
    assert teaches.sum() > 0.8 * known[inner].sum()
    # Where a normal is defined; between two sheets it turns round.
    depth = abs(np.einsum("i,i...->...", normal[::-1], found["n"]))[inner][teaches]
    angles = np.degrees(np.arccos(np.clip(depth, 0, 1)))
    assert np.median(angles) < 12
    assert angles.mean() < 18


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_single_slices_leave_the_direction_across_them_free(axis):
    known = np.zeros((40, 40, 40), bool)
    np.moveaxis(known, axis, 0)[3::8] = True
    direction, flat = free_direction(known, (2.0, 1.0, 1.0), None, (slice(5, 35),) * 3)
    np.testing.assert_array_equal(flat, known[5:35, 5:35, 5:35])
    expected = np.zeros(3)
    expected[2 - axis] = 1
    np.testing.assert_allclose(abs(direction[:, flat].T @ expected), 1, atol=1e-6)
    assert not direction[:, ~flat].any()


def test_a_turned_slice_is_found_and_a_slab_is_none():
    grid = np.stack(np.meshgrid(*[np.arange(40) - 20.0] * 3, indexing="ij"))
    normal = np.array([0.8, 0.5, 0.33]) / np.linalg.norm([0.8, 0.5, 0.33])
    depth = np.einsum("i,i...->...", normal, grid)
    region = (slice(6, 34),) * 3
    direction, flat = free_direction(abs(depth) <= 0.5, (1.0, 1.0, 1.0), None, region)
    assert (flat == (abs(depth) <= 0.5)[region]).all()
    found = direction[:, flat]
    assert (np.linalg.norm(found, axis=0) > 0.99).mean() > 0.95
    angle = np.degrees(np.arccos(np.clip(abs(normal[::-1] @ found), 0, 1)))
    assert np.median(angle) < 5
    assert free_direction(abs(depth) <= 2.0, (1.0, 1.0, 1.0), None, region)[1] is None
    every = np.ones((40, 40, 40), bool)
    assert free_direction(every, (1.0, 1.0, 1.0), None, region)[1] is None


def test_within_a_slice_the_normal_is_that_of_the_section():
    label = plane_label((0.5, 0.7, 0.51))
    known = np.zeros(label.shape, bool)
    known[4::8] = True
    tasks = informed(
        {n: {"type": n, "source_target": "label"} for n in ("surface_normals", "structure_tensor")}
    )
    tasks["axis"] = {"type": "inplane_direction", "source_target": "label", "validity": "informed"}
    found = DeriveTargetsd(tasks)({"label": label[None].astype(int), "label_mask": known[None]})
    weight = found["surface_normals_confidence"][0]
    inner = np.zeros(label.shape, bool)
    inner[10:-10, 10:-10, 10:-10] = True
    teaches = inner & (weight > 0)
    assert teaches.sum() > 0.7 * (inner & known).sum()
    assert not weight[~known].any()
    section = np.array([0.51, 0.7, 0.0]) / np.hypot(0.51, 0.7)
    cosine = abs(section @ found["surface_normals"][:, teaches])
    assert np.median(np.degrees(np.arccos(np.clip(cosine, 0, 1)))) < 5
    np.testing.assert_allclose(found["surface_normals"][2][teaches], 0, atol=1e-6)
    np.testing.assert_allclose(found["surface_normals_free"][2][teaches], 1, atol=1e-6)
    tensor = found["structure_tensor"][:, teaches]
    np.testing.assert_allclose(tensor[:3], 0, atol=1e-5)
    assert not found["axis_confidence"].any()
    assert "axis_free" not in found


def test_a_confidence_states_the_error_that_is_found():
    """On labels that took no part in the calibration, smoother than those that did: they err less than is stated."""
    rng = np.random.default_rng(11)
    size = 72
    label = blobs((size,) * 3, rng, 5.0) > 0
    task = {"n": {"type": "surface_normals", "source_target": "label"}}
    truth = DeriveTargetsd(task)({"label": label[None].astype(int)})
    rows = []
    for axis, thick in itertools.product(range(3), (5, 9)):
        known = np.zeros(label.shape, bool)
        np.moveaxis(known, axis, 0)[np.arange(size) % 16 < thick] = True
        found = DeriveTargetsd(informed(task))({"label": label[None].astype(int), "label_mask": known[None]})
        chosen = (found["n_confidence"] > 0) & ~found["n_mask"] & truth["n_mask"]
        chosen[:, [0, -1]] = False
        cosine = (found["n"] * truth["n"]).sum(axis=0)[chosen[0]]
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        rows.append(np.stack([found["n_confidence"][chosen], angle]))
    confidence, angle = np.concatenate(rows, axis=1)
    for low, high in ((0.1, 0.3), (0.3, 0.6), (0.6, 0.85), (0.85, 0.97)):
        chosen = (confidence >= low) & (confidence < high)
        assert chosen.sum() > 300
        stated = np.sqrt(np.mean([NORMAL.stated_error(c) ** 2 for c in confidence[chosen]]))
        found_error = np.sqrt((angle[chosen] ** 2).mean())
        assert 0.3 < found_error / stated < 1.5, (low, stated, found_error)


def test_most_labelled_voxels_teach_where_exact_validity_teaches_none():
    label = plane_label((0.3, 0.76, 0.57), size=72, period=14.0)
    known = np.broadcast_to((np.arange(72) % 16 < 5)[:, None, None], label.shape)
    names = ("surface_normals", "structure_tensor", "skeleton", "distance_transform")
    tasks = {name: {"type": name, "source_target": "label"} for name in names}
    sample = {"label": label[None].astype(int), "label_mask": known[None]}
    exact, found = DeriveTargetsd(tasks)(sample), DeriveTargetsd(informed(tasks))(sample)
    for name in names:
        share = (found[f"{name}_confidence"] > 0).sum() / known.sum()
        assert share >= 0.9, name
    assert exact["surface_normals_mask"].sum() == 0
    assert exact["structure_tensor_mask"].sum() == 0


@pytest.mark.parametrize("known", [0.0, 1.0])
@pytest.mark.parametrize("value", [0, 1])
def test_patches_without_a_surface_or_without_any_label(value, known):
    shape = (1, 30, 30, 30)
    sample = {"label": np.full(shape, value), "label_mask": np.full(shape, bool(known))}
    tasks = informed(tasks_of(ESTIMATED))
    halo = derive_halo({"a": {"type": "skeleton", "reach": 5.0}}, (1.0, 1.0, 1.0))
    out = DeriveTargetsd(tasks, halo)(sample)
    for name in tasks:
        assert np.isfinite(out[name]).all()
        if not known:
            assert not out[f"{name}_confidence"].any()
    outside = DeriveTargetsd(tasks, halo)({**sample, "in_volume": np.zeros(shape, bool)})
    keys = {key: value.shape for key, value in out.items() if key not in sample}
    assert {key: value.shape for key, value in outside.items() if key in keys} == keys
