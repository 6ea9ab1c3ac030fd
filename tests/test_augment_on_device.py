"""Patches augmented for a batch on the device: equal to those that the workers augment, one by one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_cases import case_of, sample_of, smooth

from volumen.engines.batch import PrepareBatch
from volumen.transforms.decide import DecideLabelsd
from volumen.transforms.deferred import DeferredBatch, collate_patches
from volumen.transforms.derive import DeriveTargetsd
from volumen.transforms.derive_batch import DeriveBatch, PackSourcesd
from volumen.transforms.device.augment import AugmentBatch
from volumen.transforms.finalize import CropHalod, FinalizePatchd, RestrictToLabelledd
from volumen.transforms.instances import InstancesToTargetd
from volumen.transforms.intensity import (
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandLowResolutiond,
    RandNoised,
)
from volumen.transforms.labels import PrepareLabelsd
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd
from volumen.transforms.training import TrainingTransforms
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import DEFERRED

INTENSITY = [RandNoised, RandBlurd, RandBrightnessd, RandContrastd, RandLowResolutiond, RandGammad]
CLASSES = {"ink": None, "tissue": 3}
PARTS = {"cell": "foreground", "wall": "boundary", "core": "interior", "depth": "distance"}
TASKS = {
    "signed": {"type": "distance_transform", "source_target": "ink", "reach": 3.0},
    "normal": {"type": "surface_normals", "source_target": "tissue", "reach": 3.0},
    "affine": {"type": "affinities", "source_target": "cell"},
    # The device cannot derive this one.
    "shape": {"type": "local_shape_descriptors", "source_target": "ink", "sigma": 1.0},
}
HALO = 6


def intensity(prob: float) -> list:
    return [
        RandNoised(prob=prob),
        RandBlurd(prob=prob),
        RandBrightnessd(prob=prob),
        RandContrastd(prob=prob),
        RandLowResolutiond(prob=prob),
        RandGammad(prob=prob / 2, invert=True),
        RandGammad(prob=prob),
    ]


def pipelines(
    *,
    prob=0.5,
    scheme="none",
    ignore=None,
    labelled_only=False,
    on_device=True,
    size=None,
    spatial=None,
    properties=None,
):
    """Return the workers' transforms, those that only read, and the device's part."""
    targets = [*CLASSES, *PARTS]
    device_tasks = {name: task for name, task in TASKS.items() if name != "shape"}
    worker_tasks = {"shape": TASKS["shape"]}

    def transforms(tasks, sources):
        return [
            RandSpatialTransformd(prob_rotation=0.6, prob_scale=0.6) if spatial is None else spatial,
            ReadPatchd(
                targets,
                halo=HALO,
                normalization_scheme=scheme,
                ignore_labels=ignore,
                intensity_properties=properties,
            ),
            PrepareLabelsd(CLASSES),
            *intensity(prob),
            DeriveTargetsd(tasks, HALO, unit="voxel", instances=list(PARTS)),
            PackSourcesd(sources),
            InstancesToTargetd(PARTS, HALO),
            CropHalod(targets, HALO),
            *(
                [RestrictToLabelledd(targets, {name: task["source_target"] for name, task in tasks.items()})]
                if labelled_only
                else []
            ),
            FinalizePatchd(targets, list(tasks)),
        ]

    sources = sorted({task["source_target"] for task in device_tasks.values()})
    workers = TrainingTransforms(transforms(TASKS, []))
    readers = TrainingTransforms(
        transforms(worker_tasks, sources), on_device=on_device, worker_targets=["ink"]
    )
    prepare = PrepareBatch(
        derive=DeriveBatch(device_tasks, HALO, "voxel", list(PARTS), labelled_only),
        augment=AugmentBatch(CLASSES, PARTS, HALO, labelled_only, sources),
    )
    return workers, readers, prepare


def make_case(shape, rng, *, channels=1, dtype="float32", masked=True, spacing=None, ignore=False):
    image = np.stack([smooth(shape, int(rng.integers(1000))) for _ in range(channels)])
    if dtype != "float32":
        image = (image * np.iinfo(dtype).max).astype(dtype)
    blobs = [smooth(shape, int(rng.integers(1000)), 1.5) for _ in range(3)]
    ink = (blobs[0] > 0.5).astype(np.uint8)
    tissue = np.digitize(blobs[1], [0.4, 0.6]).astype(np.int16)
    if ignore:
        ink[blobs[2] > 0.7] = 255
    corners = np.indices(shape) // 5
    cell = (1 + sum(axis * 17**n for n, axis in enumerate(corners))) * (blobs[2] > 0.35)
    labels = {"ink": ink, "tissue": tissue, "cell": cell.astype(np.int64)}
    labels |= {"wall": cell.astype(np.uint16), "core": cell.astype(np.int32), "depth": cell.astype(np.uint32)}
    masks = {"ink": (blobs[1] > 0.3).astype(np.uint8), "wall": (blobs[0] > 0.3)} if masked else {}
    return case_of(image, labels, masks, channels=True, spacing=spacing)


def batches(case, places, size, seeds, bounds=None, **options):
    workers, readers, prepare = pipelines(**options)
    one, other = [], []
    for place, seed in zip(places, seeds):
        for pipeline, found in ((workers, one), (readers, other)):
            pipeline.set_random_state(seed=seed)
            found.append(pipeline(sample_of(case, place, size, bounds=bounds)))
    return PrepareBatch()(collate_patches(one)), prepare(collate_patches(other))


def check_equal(expected, found, tolerance=1e-4):
    (image, theirs), (ours_image, ours) = expected, found
    scale = max(1.0, float(image.abs().max()))
    torch.testing.assert_close(ours_image, image, atol=tolerance * scale, rtol=0)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert ours[key].shape == value.shape, key
        if value.dtype == torch.float32:
            close = torch.isclose(ours[key], value, atol=2e-3, rtol=1e-3)
            # A voxel between two others may fall on either side, and change what is derived around it.
            assert close.double().mean() > 0.995, (key, (ours[key] - value).abs().max())
        else:
            assert (ours[key] == value).double().mean() > 0.999, key


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(30, 34, 32), (9, 40, 40), (44, 40), (24, 24, 24)]),
    dtype=st.sampled_from(["float32", "uint8", "uint16", "int16"]),
    channels=st.sampled_from([1, 2]),
    labelled_only=st.booleans(),
    ignore=st.booleans(),
    masked=st.booleans(),
    anisotropic=st.booleans(),
)
def test_the_device_augments_like_the_workers(
    seed, shape, dtype, channels, labelled_only, ignore, masked, anisotropic
):
    rng = np.random.default_rng(seed)
    spacing = (4.0, *(1.0,) * (len(shape) - 1)) if anisotropic and len(shape) == 3 else None
    case = make_case(
        shape, rng, channels=channels, dtype=dtype, masked=masked, spacing=spacing, ignore=ignore
    )
    size = tuple(min(12, n) for n in shape)
    # Some patches reach beyond the volume, some beyond the part that may be read.
    places = [tuple(int(rng.integers(-4, n - 6)) for n in shape) for _ in range(3)]
    bounds = tuple((int(rng.integers(0, 4)), n - int(rng.integers(0, 4))) for n in shape)
    scheme = "unit" if dtype != "float32" else "none"
    expected, found = batches(
        case,
        places,
        size,
        rng.integers(2**31, size=3),
        bounds,
        scheme=scheme,
        labelled_only=labelled_only,
        ignore={"ink": 255} if ignore else None,
    )
    check_equal(expected, found)


@pytest.mark.parametrize("kind", [*INTENSITY, "inverted"])
@pytest.mark.parametrize("shape", [(20, 22, 24), (32, 30), (1, 16, 16), (6, 40, 40)])
def test_every_intensity_transform(kind, shape):
    transform = RandGammad(prob=1.0, invert=True) if kind == "inverted" else kind(prob=1.0)
    rng = np.random.default_rng(3)
    images = np.stack([smooth(shape, n) * 3 - 1 for n in range(3)])
    images[2] = 0.25  # a constant channel
    case = case_of(images, channels=True)
    read = ReadPatchd([], normalization_scheme="none")
    results = []
    for on_device in (False, True):
        pipeline = TrainingTransforms([read, transform, FinalizePatchd([])], on_device=on_device)
        samples = []
        for seed in (1, 2, 3):
            pipeline.set_random_state(seed=seed)
            samples.append(pipeline(sample_of(case, (0,) * len(shape), shape)))
        results.append(PrepareBatch(augment=AugmentBatch({}))(collate_patches(samples), "cpu")[0])
    assert not torch.equal(results[0][:, :2], torch.from_numpy(images[None, :2]).expand(3, -1, *shape))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    del rng


def test_crops_without_rotation_are_equal_bit_by_bit():
    rng = np.random.default_rng(0)
    case = make_case((30, 30, 30), rng, dtype="uint8")
    spatial = RandSpatialTransformd(prob_rotation=0, prob_scale=0)
    places = [(0, 5, 17), (-3, 8, 8), (20, 22, 24), (100, 0, 0)]
    expected, found = batches(case, places, (12,) * 3, range(4), prob=0.0, scheme="unit", spatial=spatial)
    assert torch.equal(expected[0], found[0])
    for key in ("ink", "tissue", "cell", "wall", "core", "ink_mask", "wall_mask", "core_mask", "signed"):
        assert torch.equal(expected[1][key], found[1][key]), key


def test_a_volume_without_a_label_and_one_of_another_type_share_a_batch():
    rng = np.random.default_rng(1)
    cases = [make_case((24,) * 3, rng), make_case((24,) * 3, rng, dtype="uint16")]
    del cases[0].labels["tissue"], cases[1].labels["wall"]
    workers, readers, prepare = pipelines()
    one, other = [], []
    for seed, case in enumerate(cases):
        for pipeline, found in ((workers, one), (readers, other)):
            pipeline.set_random_state(seed=seed)
            found.append(pipeline(sample_of(case, (4,) * 3, (12,) * 3)))
    check_equal(PrepareBatch()(collate_patches(one)), prepare(collate_patches(other)))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (8.0, 1.0, 1.0)])
def test_patches_of_several_voxel_sizes_share_a_batch(spacing):
    rng = np.random.default_rng(2)
    cases = [make_case((24,) * 3, rng, spacing=one) for one in ((1.0, 1.0, 1.0), spacing)]
    workers, readers, prepare = pipelines()
    one, other = [], []
    for seed, case in enumerate([*cases, cases[0]]):
        for pipeline, found in ((workers, one), (readers, other)):
            pipeline.set_random_state(seed=seed)
            found.append(pipeline(sample_of(case, (6,) * 3, (12,) * 3)))
    check_equal(PrepareBatch()(collate_patches(one)), prepare(collate_patches(other)))


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        ("tissue", 3, "expected classes 0 to 2, found 3"),
        ("tissue", -1, "expected classes 0 to 2, found -1"),
        ("depth", 2**40, None),
        ("core", -5, "expected 0 for background"),
        ("cell", -(2**40), "expected 0 for background"),
    ],
)
def test_wrong_labels_are_refused_while_they_are_read(target, value, message):
    case = make_case((20,) * 3, np.random.default_rng(0), masked=False)
    label = case.labels[target]
    label.data = label.data.astype(np.int64)
    label.dtype = label.data.dtype
    label.data[0, 9, 9, 9] = value
    readers = pipelines(spatial=RandSpatialTransformd(no_spatial=True))[1]
    sample = sample_of(case, (4,) * 3, (12,) * 3)
    if message is None:
        readers(sample)
        return
    with pytest.raises(RuntimeError) as error:
        readers(sample)
    cause = error.value.__cause__ or error.value
    assert isinstance(cause, VolumenError)
    assert message in str(cause)


def test_an_ignore_value_that_the_type_cannot_hold_ignores_nothing():
    case = make_case((20,) * 3, np.random.default_rng(0), masked=False)
    case.labels["ink"].data[...] = 255
    expected, found = batches(case, [(4,) * 3], (12,) * 3, [0], prob=0.0, ignore={"ink": -1})
    assert found[1]["ink"].all()
    assert found[1]["ink_mask"].any()
    check_equal(expected, found)


def test_raw_patches_pass_through_worker_processes():
    case = make_case((20,) * 3, np.random.default_rng(0))
    readers = pipelines(prob=1.0)[1]
    readers.set_random_state(seed=0)
    sample = readers(sample_of(case, (4,) * 3, (12,) * 3))
    assert "image" not in sample
    copied = pickle.loads(pickle.dumps(sample))
    batch = collate_patches([sample, copied])
    assert isinstance(batch[DEFERRED], DeferredBatch)
    assert len(batch[DEFERRED]) == 2
    image, _ = pipelines()[2](batch)
    assert torch.equal(image[0], image[1])


def test_a_transform_of_ones_own_keeps_the_work_in_the_workers(caplog):
    class Mine(DecideLabelsd):
        pass

    own = TrainingTransforms([ReadPatchd([]), Mine({})], on_device=True)
    assert not own.on_device
    assert "Mine needs augmented patches" in caplog.text
    assert TrainingTransforms([ReadPatchd([])], on_device=True).on_device
    assert not TrainingTransforms([ReadPatchd([], image_order=3)], on_device=True).on_device
