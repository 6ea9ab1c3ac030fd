"""Patches without labels: where they are, how they are drawn, and that they change nothing else."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tifffile
import torch
from data_folders import image_of, shells, write_tiff_folder
from ignite.engine import Events

from volumen.checkpoints.file import load_checkpoint
from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.config.unlabelled import find_unlabelled_patches, warn_of_unlike
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.index.patch_index import PatchLocation
from volumen.data.layout import OpenCase
from volumen.data.sampling.loader import PatchLoader
from volumen.data.sampling.sampler import PatchSampler
from volumen.data.sampling.split import Split
from volumen.data.sampling.unlabelled import JoinedBatches, UnlabelledKey
from volumen.data.unlabelled import BLOCK, UnlabelledVolume, block_deviations
from volumen.engines.batch import PrepareBatch
from volumen.handlers.epochs import remaining_batches
from volumen.run import train_on_folder
from volumen.time_budget.measure import training_objects
from volumen.transforms.deferred import collate_patches
from volumen.transforms.intensity import RandGammad, RandNoised
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd
from volumen.transforms.unlabelled import WeakAndStrongd
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import STRONG, WEAK

PATCH = (16, 16, 16)


def settings(**unlabelled) -> dict:
    return {
        "tr_config": {
            "patch_size": list(PATCH), "batch_size": 2, "max_epoch": 2, "max_steps_per_epoch": 3,
            "max_val_steps_per_epoch": 1, "num_dataloader_workers": 0, "amp": "off",
            "unlabelled": {"ratio": 1.0, **unlabelled},
        },
        "model_config": {"features_per_stage": [4, 8]},
    }  # fmt: skip


def configured(folder, tmp_path, more=None, split=None, **unlabelled) -> ConfigManager:
    sections = merge(merge(shipped_sections(), settings(**unlabelled)), more or {})
    return ConfigManager(
        **sections, dataset_dir=str(folder), output_dir=str(tmp_path / "out"), device="cpu", split=split
    )


@pytest.fixture
def folder(tmp_path):
    """A volume that is labelled in a slab alone, half of the rest empty, and one without any label."""
    label = shells((24, 24, 96))
    mask = np.zeros_like(label)
    mask[:, :, :40] = 1
    image = image_of(label)
    image[:, :, 64:] = 7
    root = write_tiff_folder(
        tmp_path / "data", {"scroll": {"surface": label}}, images={"scroll": image},
        masks={"scroll": {"surface": mask}},
    )  # fmt: skip
    tifffile.imwrite(root / "images" / "bare.tif", image_of(shells((24, 32, 32)), 1))
    return root


def case_of(image, labels=None, masks=None) -> OpenCase:
    axes = "zyx"[-(image.ndim) :]
    return OpenCase(
        "one",
        ArrayVolume(image, axes=axes),
        {name: ArrayVolume(array, axes=axes) for name, array in (labels or {}).items()},
        {name: ArrayVolume(array, axes=axes) for name, array in (masks or {}).items()},
        (1.0,) * image.ndim,
    )


def empty_blocks(image: np.ndarray, limit: float) -> np.ndarray:
    """Whether each voxel lies in a block that is empty, by nested loops."""
    empty = np.zeros(image.shape, bool)
    for corner in np.ndindex(*(-(-size // BLOCK) for size in image.shape)):
        where = tuple(slice(i * BLOCK, (i + 1) * BLOCK) for i in corner)
        block = image[where].astype(float)
        padded = np.pad(block, [(0, BLOCK - size) for size in block.shape], mode="edge")
        empty[where] = padded.std() <= limit
    return empty


@pytest.mark.parametrize("shape", [(20, 33, 17), (3, 40, 24), (50, 29)])
def test_the_view_is_unknown_and_not_empty_by_nested_loops(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, shape).astype(np.uint8)
    image[..., : shape[-1] // 2] = 9
    first, second = (rng.integers(0, 3, shape).astype(np.uint8) for _ in range(2))
    mask = (rng.random(shape) < 0.5).astype(np.uint8)
    case = case_of(image, {"a": first, "b": second}, {"a": mask})
    view = UnlabelledVolume(
        case, ("a", "b"), ignore_labels={"b": 2}, min_contrast=0.5, deviation=lambda _: np.array([100.0])
    )
    expected = ((mask == 0) | (second == 2)) & ~empty_blocks(image, 50.0)
    whole = tuple(slice(0, size) for size in shape)
    assert expected.any()
    assert not expected.all()
    assert np.array_equal(view.read(whole)[0], expected)
    for _ in range(20):
        spans = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in shape]
        region = tuple(
            slice(a, max(a + 1, b)) if a < n else slice(n - 1, n) for (a, b), n in zip(spans, shape)
        )
        assert np.array_equal(view.read(region)[0], expected[region])


def test_labels_of_0_are_unlabelled_where_only_labelled_voxels_count():
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 16)).astype(np.uint8)
    label = shells(image.shape)
    whole = (slice(0, 16),) * 3
    for labelled_only, expected in ((False, np.zeros_like(label)), (True, label == 0)):
        view = UnlabelledVolume(
            case_of(image, {"a": label}), ("a",), labelled_only=labelled_only,
            deviation=lambda _: np.array([1.0]),
        )  # fmt: skip
        assert np.array_equal(view.read(whole)[0], expected)


def test_block_deviations_survive_large_offsets_and_numbers_that_are_not_finite():
    image = np.full((1, 16, 16), 1e6, np.float32)
    image[0, :8, :8] += np.arange(64).reshape(8, 8)
    found = block_deviations(image)
    assert found[0, 0, 0] == pytest.approx(np.arange(64).std(), rel=1e-2)
    assert (found[0].ravel()[1:] == 0).all()
    image[0, 12, 12] = np.nan
    assert np.isfinite(block_deviations(image)).all()


def test_patches_are_unlabelled_not_empty_and_outside_of_the_validation_part(folder, tmp_path):
    config = configured(folder, tmp_path, min_unlabelled=0.5)
    index = find_unlabelled_patches(config)
    held_out = config.split.val["scroll"][0]
    unlabelled = np.ones((24, 24, 96), bool)
    unlabelled[:, :, :40] = False
    unlabelled[:, :, 64:] = False
    rng, names = np.random.default_rng(0), set()
    for row in range(len(index)):
        for _ in range(8):
            place = index.random_location(row, rng)
            name = config.cases[place.case].name
            names.add(name)
            assert all(
                low <= s and s + p <= high for s, p, (low, high) in zip(place.start, PATCH, place.bounds)
            )
            if name == "scroll":
                apart = [s + p <= low or s >= high for s, p, (low, high) in zip(place.start, PATCH, held_out)]
                assert any(apart)
                inside = unlabelled[tuple(slice(s, s + p) for s, p in zip(place.start, PATCH))]
                assert inside.mean() >= 0.5
    assert names == {"scroll", "bare"}
    assert "bare" not in config.split.val


def test_the_index_is_cached_until_a_mask_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    first = find_unlabelled_patches(configured(folder, tmp_path))
    monkeypatch.setattr(UnlabelledVolume, "read", lambda *_: pytest.fail("read again"))
    again = find_unlabelled_patches(configured(folder, tmp_path))
    assert np.array_equal(first.foreground.start, again.foreground.start)
    assert np.array_equal(first.foreground.shifts, again.foreground.shifts)
    monkeypatch.undo()
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    mask = folder / "masks" / "scroll_surface.tif"
    tifffile.imwrite(mask, np.ones((24, 24, 96), np.uint8))
    labelled = find_unlabelled_patches(configured(folder, tmp_path))
    assert len(labelled) < len(first)
    (folder / "images" / "bare.tif").unlink()
    with pytest.raises(
        VolumenError, match=r"tr_config.unlabelled: expected patches .* not empty in 25%, found none"
    ):
        find_unlabelled_patches(configured(folder, tmp_path))


def test_settings_are_checked(folder, tmp_path):
    with pytest.raises(VolumenError, match=r"unlabelled.ratios: unknown key.*did you mean ratio"):
        configured(folder, tmp_path, ratios=2)
    with pytest.raises(VolumenError, match=r"unlabelled.ratio: expected a number above 0"):
        configured(folder, tmp_path, ratio=0)
    assert configured(folder, tmp_path, ratio=0.1).unlabelled_per_batch == 1
    plain = configured(folder, tmp_path, {"tr_config": {"unlabelled": None}})
    assert (plain.unlabelled_per_batch, plain.ema_decay) == (0, None)


def loader_of(config, workers=0, epoch=0, rank=0, world=1) -> PatchLoader:
    parser = training_objects(config)
    loader = parser.get_parsed_content("train#dataloader")
    sampler = PatchSampler(12, batch_size=2, rank=rank, world_size=world)
    sampler.set_epoch(epoch)
    return PatchLoader(
        loader.dataset,
        batch_sampler=JoinedBatches(sampler, 2, 2),
        collate_fn=collate_patches,
        num_workers=workers,
    )


def test_batches_are_a_pure_function_of_seed_epoch_and_index(folder, tmp_path):
    config = configured(folder, tmp_path, {"tr_config": {"max_steps_per_epoch": 6}})
    first = list(loader_of(config))
    for other in (loader_of(config), loader_of(config, workers=2)):
        for one, two in zip(first, other, strict=True):
            assert set(one) == set(two)
            for key in (WEAK, STRONG, "image", "surface"):
                assert torch.equal(one[key], two[key])
    later = remaining_batches(loader_of(config), 4)
    assert torch.equal(next(iter(later))[STRONG], first[4][STRONG])
    assert not torch.equal(next(iter(loader_of(config, epoch=1)))[STRONG], first[0][STRONG])
    halves = [list(loader_of(config, rank=rank, world=2)) for rank in (0, 1)]
    assert torch.equal(halves[1][0][WEAK], first[1][WEAK])
    assert torch.equal(halves[0][1][WEAK], first[2][WEAK])


def test_labelled_patches_are_those_of_a_run_without_unlabelled_ones(folder, tmp_path):
    plain = {"tr_config": {"unlabelled": None}, "dataset_config": {"allow_unlabeled_data": True}}
    with_them, without = configured(folder, tmp_path), configured(folder, tmp_path, plain)
    both = [training_objects(one).get_parsed_content("train#dataloader") for one in (with_them, without)]
    for one, two in zip(*both, strict=True):
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["surface"], two["surface"])
        assert WEAK not in two


def test_keys_of_a_last_incomplete_batch():
    sampler = PatchSampler(5, batch_size=2)
    batches = list(JoinedBatches(sampler, 2, 3))
    assert [len(batch) for batch in batches] == [5, 5, 4]
    assert [key.number for batch in batches for key in batch if isinstance(key, UnlabelledKey)] == list(
        range(9)
    )
    assert len(JoinedBatches(sampler, 2, 3)) == sampler.steps == 3


def views(on_device, intensity, seed=3, ndim=3):
    shape = (20, 24, 28)[-ndim:]
    image = np.random.default_rng(1).integers(0, 255, shape).astype(np.uint8)
    place = PatchLocation(0, (2,) * ndim, (16,) * ndim, tuple((0, n) for n in shape))
    transform = WeakAndStrongd(
        ReadPatchd([]),
        intensity,
        RandSpatialTransformd(prob_rotation=1.0, prob_scale=1.0),
        on_device=on_device,
    )
    transform.set_random_state(seed)
    return transform({"case": case_of(image), "location": place})


@pytest.mark.parametrize("ndim", [2, 3])
def test_both_views_lie_on_one_grid(ndim):
    same = views(False, [], ndim=ndim)
    assert torch.equal(same[WEAK], same[STRONG])
    changed = views(False, [RandGammad(prob=1.0), RandNoised(prob=1.0)], ndim=ndim)
    assert torch.equal(changed[WEAK], same[WEAK])
    assert not torch.equal(changed[STRONG], same[STRONG])


def test_views_made_on_the_device_are_those_of_a_worker():
    changes = [RandNoised(prob=1.0), RandGammad(prob=1.0)]
    here = views(False, changes)
    batch = collate_patches([{"image": torch.zeros(1, 4, 4, 4)}, views(True, changes)])
    _, targets = PrepareBatch()(batch, "cpu")
    for key in (WEAK, STRONG):
        assert torch.allclose(targets[key][0], here[key], atol=2e-5), key


def test_another_contrast_is_warned_of(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_unlike(configured(folder, tmp_path))
    assert "little can be learned" not in caplog.text
    tifffile.imwrite(folder / "images" / "bare.tif", image_of(shells((24, 32, 32))) // 8)
    with caplog.at_level(logging.WARNING):
        warn_of_unlike(configured(folder, tmp_path, {"dataset_config": {"normalize_per_volume": False}}))
    assert "bare.tif" in caplog.text
    assert "little can be learned" in caplog.text


def test_a_target_of_that_name_is_refused(tmp_path):
    label = shells((24, 24, 24))
    mask = np.zeros_like(label)
    mask[:12] = 1
    root = write_tiff_folder(
        tmp_path / "data", {"a": {"unlabelled": label}}, masks={"a": {"unlabelled": mask}}
    )
    with pytest.raises(VolumenError, match="rename it"):
        train_on_folder(root, tmp_path / "out", settings())


class CrashAt:
    """Raises after an iteration, like a killed process."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine) -> None:
        if engine.state.iteration == self.iteration:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_resumed_run_equals_the_uninterrupted_one(folder, tmp_path, ratio):
    chosen = settings(ratio=ratio, uncertainty=True, mix=1.0, ramp_up=0.1)
    whole = train_on_folder(folder, tmp_path / "whole", chosen, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_on_folder(folder, tmp_path / "resumed", chosen, device="cpu", handlers=[CrashAt(5)])
    again = merge(chosen, {"tr_setup": {"resume": True}})
    resumed = train_on_folder(folder, tmp_path / "resumed", again, device="cpu")
    one, two = (load_checkpoint(run / "model_final.pth") for run in (whole, resumed))
    assert "teacher" in one["step"]
    for part in (lambda c: c["model"], lambda c: c["handlers"]["weight_average"]["weights"]):
        assert all(torch.equal(part(one)[name], part(two)[name]) for name in part(one))
    assert one["step"] == two["step"]
    assert (whole / "metrics.csv").read_text() == (resumed / "metrics.csv").read_text()


def test_a_given_split_keeps_unlabelled_patches_out_of_what_it_does_not_name(folder, tmp_path):
    split = Split({"scroll": [((0, 24), (0, 24), (0, 64))]}, {}, 1.0, 0)
    config = configured(folder, tmp_path, split=split)
    index = find_unlabelled_patches(config)
    cases = {config.cases[index.grid_location(row).case].name for row in range(len(index))}
    assert cases == {"scroll"}
