"""Derived targets of a batch in torch: equal to those that the workers derive, one patch at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from volumen.derived.registry import DerivedTask, get_task, task_types
from volumen.transforms.derive import DeriveTargetsd, derive_halo
from volumen.transforms.derive_batch import DeriveBatch, PackSourcesd
from volumen.utils.errors import VolumenError

DEVICE_TASKS = [name for name in task_types() if get_task(name).on_device]
# A direction is as accurate as the gap between the two smallest eigenvalues allows: 0.1 % in the worst case.
TOLERANCE = {"inplane_direction": 2e-3}


def blobs(shape, rng, smoothness=1.5):
    noise = rng.normal(size=shape)
    return ndimage.gaussian_filter(noise, [min(smoothness, size / 4) for size in shape])


def sample_of(shape, rng, *, classes=2, channels=1, unknown=0.0, outside=False, spacing=None):
    """Return a sample with labels in blobs, some of them unknown, some of the patch outside a rotated volume."""
    label = np.stack([(blobs(shape, rng) > 0) * rng.integers(1, classes, shape) for _ in range(channels)])
    known = ndimage.binary_erosion(rng.random(shape) >= unknown / 30, border_value=1) if unknown else None
    in_volume = None
    if outside:
        axes = np.meshgrid(*[np.arange(size) - size / 2 for size in shape], indexing="ij")
        tilt = rng.normal(size=len(shape))
        in_volume = sum(slope * axis for slope, axis in zip(tilt, axes)) < 0.3 * np.abs(tilt).sum() * min(
            shape
        )
        known = in_volume if known is None else known & in_volume
    return {
        "label": label.astype(np.int32),
        "label_mask": np.ones((1, *shape), bool) if known is None else known[None],
        "in_volume": None if in_volume is None else in_volume[None],
        "spacing": spacing or (1.0,) * len(shape),
    }


def on_device(tasks, samples, halo, device="cpu", **options):
    """Run the workers' part, the collation, the transfer and the device's part."""
    derive = DeriveBatch(tasks, halo, **options)
    packed = [PackSourcesd(derive.sources)(sample) for sample in samples]
    batch = {
        key: torch.stack([torch.as_tensor(sample[key]) for sample in packed])
        for key in packed[0]
        if key.startswith("wide/")
    }
    return derive({key: value.to(device) for key, value in batch.items()}, derive.host_facts(batch))


def check_equal(tasks, samples, halo, unit="voxel", **options):
    found = on_device(tasks, samples, halo, unit=unit, **options)
    assert set(found) == {name + end for name in tasks for end in ("", "_mask")}
    expected = [DeriveTargetsd(tasks, halo, unit=unit, **options)(sample) for sample in samples]
    for name, task in tasks.items():
        values, valid = found[name], found[f"{name}_mask"]
        assert values.dtype == torch.float32
        assert valid.dtype == torch.bool
        theirs = np.stack([sample[name] for sample in expected])
        their_valid = np.stack([sample[f"{name}_mask"] for sample in expected])
        assert values.shape == theirs.shape
        assert valid.shape == their_valid.shape
        assert not values[~valid.expand_as(values)].any(), name
        # Only a value at a threshold may differ, by rounding.
        assert (valid.numpy() != their_valid).sum() <= 2 + 2e-4 * their_valid.size, name
        both = valid.numpy() & their_valid
        ours = values.numpy()
        if task["type"] == "inplane_direction":
            ours = ours * np.where((ours * theirs).sum(axis=1, keepdims=True) < 0, -1, 1)
        if task["type"] == "skeleton":
            assert (ours != theirs)[both].sum() <= 2 + 2e-4 * both.size
            continue
        np.testing.assert_allclose(
            ours * both, theirs * both, atol=TOLERANCE.get(task["type"], 1e-4), err_msg=name
        )


def tasks_of(names, reach=None, **params):
    tasks = {}
    for name in names:
        tasks[name] = {"type": name, "source_target": "label", **params}
        if reach is not None and "reach" in get_task(name).defaults:
            tasks[name]["reach"] = reach
    return tasks


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    core=st.sampled_from([(9, 12), (6, 7, 8), (1, 9, 8), (7, 1, 9), (10, 1)]),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 3.0, 1.5), (45.0, 4.6, 4.6)]),
    seed=st.integers(0, 10**6),
    unknown=st.sampled_from([0.0, 0.1]),
    outside=st.booleans(),
    enough=st.booleans(),
)
def test_every_task_equals_the_workers(core, spacing, seed, unknown, outside, enough):
    rng = np.random.default_rng(seed)
    spacing = spacing[-len(core) :]
    tasks = tasks_of(DEVICE_TASKS, reach=4.5)
    halo = derive_halo(tasks, tuple(size / min(spacing) for size in spacing)) if enough else (2,) * len(core)
    shape = [size + 2 * edge for size, edge in zip(core, halo)]
    # The batch has one sample that is complete and known, and one that is not.
    samples = [
        sample_of(shape, rng, unknown=unknown, outside=outside, spacing=spacing),
        sample_of(shape, rng, spacing=spacing),
    ]
    check_equal(tasks, samples, halo)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    core=st.sampled_from([(9, 12), (6, 7, 8), (1, 9, 8)]),
    seed=st.integers(0, 10**6),
    unknown=st.sampled_from([0.0, 0.1]),
    outside=st.booleans(),
)
def test_touching_instances_are_separated_as_by_the_workers(core, seed, unknown, outside):
    rng = np.random.default_rng(seed)
    tasks = tasks_of(DEVICE_TASKS, reach=4.0)
    shape = [size + 12 for size in core]
    spacing = (2.0, 1.0, 1.0)[: len(core)]
    sample = sample_of(shape, rng, unknown=unknown, outside=outside, spacing=spacing)
    coarse = np.kron(rng.integers(0, 5, [-(-size // 4) for size in shape]), np.ones((4,) * len(core), int))
    sample["label"] = (coarse[tuple(slice(0, size) for size in shape)] * 2**40)[None]
    check_equal(tasks, [sample], 6, instances=["label"])


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("known", [0.0, 1.0])
def test_patches_without_a_surface_or_without_any_label(value, known):
    tasks = tasks_of(DEVICE_TASKS)
    sample = sample_of((20, 20, 20), np.random.default_rng(0))
    sample["label"][:] = value
    sample["label_mask"][:] = known
    check_equal(tasks, [sample, sample], 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_classes_and_channels_are_chosen_as_the_workers_choose_them(channels):
    rng = np.random.default_rng(2)
    tasks = tasks_of(DEVICE_TASKS, reach=4.0, classes=[1, 2] if channels == 1 else [0, 2])
    tasks["each"] = {**tasks["distance_transform"], "out_channels": 2, "distance_type": "inside"}
    tasks["union"] = {"type": "distance_transform", "source_target": "label", "distance_type": "outside"}
    tasks["ids"] = {"type": "affinities", "source_target": "label", "offsets": [[0, 3], [-2, 5]]}
    tasks["inner"] = {"type": "boundary", "source_target": "label", "side": "inner"}
    tasks["outer"] = {"type": "boundary", "source_target": "label", "side": "outer"}
    for name in ("structure_tensor", "inplane_direction"):
        tasks[f"binary_{name}"] = {"type": name, "source_target": "label", "compute_from": "binary"}
    samples = [sample_of((40, 44), rng, classes=4, channels=channels, unknown=0.1) for _ in range(2)]
    check_equal(tasks, samples, 8)


def test_samples_of_different_spacings_share_a_batch():
    rng = np.random.default_rng(3)
    tasks = tasks_of(("surface_normals", "distance_transform"), reach=5.0)
    spacings = [(4.0, 1.0), (1.0, 1.0), (8.0, 2.0), (1.0, 1.0)]
    samples = [sample_of((30, 32), rng, spacing=spacing) for spacing in spacings]
    check_equal(tasks, samples, 6)
    check_equal(tasks, samples, 6, unit="physical")


def test_reduced_precision_of_the_training_does_not_reach_the_targets():
    tasks = tasks_of(("surface_normals", "structure_tensor"), reach=5.0)
    samples = [sample_of((30, 32), np.random.default_rng(4))]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_equal(tasks, samples, 6)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_loss_on_labels_only_keeps_to_the_labelled():
    tasks = tasks_of(("distance_transform",))
    sample = sample_of((24, 24), np.random.default_rng(5))
    found = on_device(tasks, [sample], 4, labelled_only=True)
    labelled = torch.from_numpy(sample["label"][None, :, 4:-4, 4:-4] > 0)
    assert torch.equal(found["distance_transform_mask"], labelled)


@pytest.mark.parametrize("unknown", [0.0, 0.2])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("instances", [(), ("label",)])
def test_nothing_is_read_back_from_the_device(unknown, outside, instances):
    """The meta device holds no values: code that runs there neither waits for a GPU nor mixes devices."""
    tasks = tasks_of(DEVICE_TASKS, reach=3.0)
    sample = sample_of((16, 16, 16), np.random.default_rng(6), unknown=unknown, outside=outside)
    found = on_device(tasks, [sample, sample], 3, "meta", unit="voxel", instances=instances)
    assert {value.device.type for value in found.values()} == {"meta"}
    assert found["inplane_direction"].shape == (2, 3, 10, 10, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("outside", [False, True])
def test_a_gpu_gives_the_cpu_s_targets(outside):
    tasks = tasks_of(DEVICE_TASKS)
    rng = np.random.default_rng(7)
    samples = [sample_of((60, 60, 60), rng, unknown=0.1, outside=outside) for _ in range(2)]
    here, there = (on_device(tasks, samples, 8, device, unit="voxel") for device in ("cpu", "cuda"))
    for name in tasks:
        valid = here[f"{name}_mask"] & there[f"{name}_mask"].cpu()
        assert (here[f"{name}_mask"] != there[f"{name}_mask"].cpu()).float().mean() < 1e-3
        gap = ((here[name] - there[name].cpu()).abs() * valid).amax()
        assert gap < (2e-3 if name == "inplane_direction" else 1e-4 if name != "skeleton" else 2), name


def test_a_task_without_a_batch_form_is_refused_and_an_inherited_one_does_not_count():
    with pytest.raises(VolumenError, match=r"auxiliary_tasks\.a: local_shape_descriptors cannot be derived"):
        DeriveBatch({"a": {"type": "local_shape_descriptors", "source_target": "label"}})
    normals = type(get_task("surface_normals"))
    assert type("Renamed", (normals,), {})().on_device
    assert not type("Changed", (normals,), {"derive": normals.derive})().on_device
    assert not DerivedTask().on_device
