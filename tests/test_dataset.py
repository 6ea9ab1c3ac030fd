"""Samples are a pure function of seed, epoch and index, whatever reads them."""

from __future__ import annotations

import hashlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from monai.data import DataLoader, list_data_collate
from monai.data.utils import set_rnd
from monai.transforms import Compose, MapTransform, RandFlipd, RandGaussianNoised, Randomizable, Transform
from torch._utils import ExceptionWrapper

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.patches import find_valid_patches
from volumen.data.sampling.dataset import PatchDataset, SampleError
from volumen.data.sampling.sampler import PatchSampler
from volumen.utils.boxes import whole_box
from volumen.utils.errors import VolumenError

PATCH = (8, 8, 8)


class ReadStub(Transform):
    """Crops image and label at the location."""

    def __call__(self, sample):
        case, location = sample["case"], sample["location"]
        region = tuple(slice(s, s + n) for s, n in zip(location.start, location.size))
        image, label = case.image.read(region), case.labels["t"].read(region)
        return {"image": image.astype(np.float32), "t": label, "start": np.array(location.start)}


class FailAt(MapTransform):
    """Fails for one corner of the volume."""

    def __call__(self, sample):
        if sample["start"][0] >= 8:
            raise RuntimeError("chunk 7 is corrupt")
        return sample


def make_case(name="a", seed=0):
    rng = np.random.default_rng(seed)
    label = (rng.random((30, 24, 28)) < 0.3).astype(np.uint8)
    label[20:] = 0
    return SimpleNamespace(
        name=name,
        image=ArrayVolume(rng.random(label.shape).astype(np.float32), path=f"images/{name}.zarr"),
        labels={"t": ArrayVolume(label)},
        masks={},
    )


def make_dataset(transform=None, *, samples=24, seed=5, **options):
    cases = [make_case("a", 0), make_case("b", 1)]
    index = find_valid_patches(
        cases,
        {c.name: [whole_box(c.image.shape)] for c in cases},
        PATCH,
        targets=["t"],
        background=True,
        jitter=True,
        classes={"t": [1]},
        progress=False,
    )
    if transform is None:
        noise = RandGaussianNoised(keys=["image"], prob=0.5)
        transform = Compose([ReadStub(), RandFlipd(keys=["image", "t"], prob=0.5), noise])
    options = {"bg_to_fg_ratio": 0.5, "class_oversampling": 0.3, **options}
    return PatchDataset(cases, index, transform, seed=seed, samples_per_epoch=samples, **options)


def hash_epochs(dataset, epochs=2, **loader_options):
    """Return the hash of every batch of some epochs, as one process or several ranks would see them."""
    hashes = []
    sampler = PatchSampler(len(dataset), batch_size=3)
    loader = DataLoader(
        dataset, batch_size=3, sampler=sampler, collate_fn=list_data_collate, **loader_options
    )
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        for batch in loader:
            parts = [batch[key].numpy().tobytes() for key in ("image", "t", "start")]
            hashes.append(hashlib.sha256(b"".join(parts)).hexdigest())
    return hashes


def test_batches_are_the_same_for_any_number_of_workers():
    expected = hash_epochs(make_dataset())
    assert len(set(expected)) == len(expected) == 16
    assert hash_epochs(make_dataset(), num_workers=1) == expected
    assert hash_epochs(make_dataset(), num_workers=4, persistent_workers=True) == expected


def test_workers_do_not_look_into_the_volumes():
    dataset = make_dataset(samples=6)
    handle = SimpleNamespace()
    handle.parent = handle
    dataset.cases[0].image.handle = handle
    set_rnd(dataset, seed=3)
    assert hash_epochs(dataset, epochs=1) == hash_epochs(make_dataset(samples=6), epochs=1)


def test_a_resumed_epoch_repeats_itself():
    dataset = make_dataset()
    whole = hash_epochs(dataset, epochs=3)
    np.random.seed(123)
    torch.manual_seed(9)
    assert hash_epochs(make_dataset(), epochs=3)[16:] == whole[16:]


def test_batches_survive_pickling():
    dataset = pickle.loads(pickle.dumps(make_dataset(samples=6)))
    assert hash_epochs(dataset, epochs=1) == hash_epochs(make_dataset(samples=6), epochs=1)


@pytest.mark.slow
def test_batches_are_the_same_from_spawned_workers():
    expected = hash_epochs(make_dataset(samples=6), epochs=1)
    dataset = make_dataset(samples=6)
    assert hash_epochs(dataset, epochs=1, num_workers=1, multiprocessing_context="spawn") == expected


@pytest.fixture
def kept_bound():
    bound = BLOCKS.max_bytes
    yield
    BLOCKS.resize(bound)


def zarr_dataset(folder, **options):
    dataset = make_dataset(**options)
    for case in dataset.cases:
        path = folder / f"{case.name}.zarr"
        zarr.create_array(str(path), data=case.image.array, chunks=(8, 8, 8))
        case.image = open_volume(path, axes="zyx")
    return dataset


def test_samples_do_not_depend_on_the_chunks_that_are_kept(tmp_path, kept_bound):
    samples = {}
    for mib in (0, 1, None):
        dataset = zarr_dataset(tmp_path / str(mib), chunk_cache_mib=mib)
        samples[mib] = hash_epochs(dataset, num_workers=0)
        assert mib is None or BLOCKS.max_bytes == mib * 2**20
    assert samples[0] == samples[1] == samples[None] == hash_epochs(make_dataset())


class TellBound(Transform):
    def __call__(self, sample):
        return {"bound": BLOCKS.max_bytes}


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_every_worker_keeps_as_many_chunks_as_told(context):
    dataset = make_dataset(TellBound(), chunk_cache_mib=7, samples=4)
    loader = DataLoader(
        dataset, batch_size=1, num_workers=2, multiprocessing_context=context, collate_fn=list_data_collate
    )
    assert {int(batch["bound"][0]) for batch in loader} == {7 * 2**20}
    assert BLOCKS.max_bytes != 7 * 2**20


def test_ranks_share_the_epoch():
    dataset = make_dataset()
    alone = {tuple(dataset[key]["start"]) for key in PatchSampler(len(dataset))}
    shared = [
        tuple(dataset[key]["start"])
        for r in range(2)
        for key in PatchSampler(len(dataset), rank=r, world_size=2)
    ]
    assert set(shared) == alone
    assert len(shared) == len(dataset)


def test_order_of_access_does_not_matter():
    dataset, other = make_dataset(), make_dataset()
    forward = [dataset[(2, i)]["image"] for i in range(6)]
    backward = [other[(2, i)]["image"] for i in reversed(range(6))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward))
    assert np.array_equal(np.asarray(dataset[3]["image"]), np.asarray(dataset[(0, 3)]["image"]))


def test_seed_and_epoch_change_the_samples():
    starts = {
        tuple(tuple(make_dataset(seed=s).location(e, i).start) for i in range(24))
        for s in (1, 2)
        for e in (1, 2)
    }
    assert len(starts) == 4


class Drawn(Randomizable, Transform):
    """Gives a random number instead of a patch."""

    def __call__(self, sample):
        return float(self.R.random())


def test_augmentation_is_another_in_every_epoch():
    samples = {epoch: [make_dataset(Drawn(), samples=6)[(epoch, i)] for i in range(6)] for epoch in (0, 1)}
    assert samples[0] != samples[1]
    assert samples[0] == [make_dataset(Drawn(), samples=6)[(0, i)] for i in range(6)]


def test_training_draws_background_at_its_ratio():
    dataset = make_dataset(samples=30, class_oversampling=0)
    labelled = [dataset[(1, i)]["t"].any() for i in range(30)]
    assert sum(labelled) == 20


def check_failure(error):
    message = str(error)
    assert message.startswith("images/")
    assert ".zarr: the patch at (" in message
    assert message.endswith("of size (8, 8, 8) failed (RuntimeError: chunk 7 is corrupt)")
    assert isinstance(error, VolumenError)


def failing_loader(**options):
    dataset = make_dataset(Compose([ReadStub(), FailAt(keys=["image"])]))
    sampler = PatchSampler(len(dataset))
    return DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=list_data_collate, **options)


def test_a_failing_sample_names_volume_and_place():
    with pytest.raises(SampleError) as caught:
        list(failing_loader())
    check_failure(caught.value)
    # What a DataLoader does with the exception of a worker.
    wrapped = ExceptionWrapper((SampleError, caught.value, caught.value.__traceback__), where="in a worker")
    with pytest.raises(SampleError) as again:
        wrapped.reraise()
    check_failure(again.value)
    check_failure(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.slow
def test_a_failing_sample_in_a_worker_names_volume_and_place():
    with pytest.raises(SampleError) as caught:
        list(failing_loader(num_workers=1))
    check_failure(caught.value)


def test_sample_without_a_transform_is_case_and_location():
    dataset = PatchDataset(make_dataset().cases, make_dataset().index, None, seed=0)
    assert len(dataset) == len(dataset.index)
    assert set(dataset[0]) == {"case", "location"}


def test_bad_arguments():
    with pytest.raises(ValueError, match="samples_per_epoch must be positive, got 0"):
        make_dataset(samples=0)
    with pytest.raises(IndexError, match="sample 24 of 24"):
        make_dataset()[24]
