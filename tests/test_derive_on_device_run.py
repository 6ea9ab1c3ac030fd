"""A training whose targets are derived on the device, compared with one whose workers derive them."""

from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from data_folders import shells, write_tiff_folder

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.run import run_bundle

TASKS = {
    "distance": {"type": "distance_transform", "losses": [{"name": "SignedDistanceLoss"}]},
    "normals": {"type": "surface_normals", "losses": [{"name": "CosineSimilarityLoss"}]},
    "shape": {"type": "local_shape_descriptors", "sigma": 1.0, "losses": [{"name": "MSELoss"}]},
}
SECTIONS = {
    "tr_config": {
        "patch_size": [16, 16, 16],
        "batch_size": 2,
        "max_epoch": 2,
        "max_steps_per_epoch": 2,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
        "amp": "off",
    },
    "model_config": {"features_per_stage": [4, 8]},
    "auxiliary_tasks": {name: {**task, "source_target": "surface"} for name, task in TASKS.items()},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device") / "data"
    return write_tiff_folder(folder, {"scroll": {"surface": shells((24, 24, 64))}})


def configured(data, output, **changes) -> ConfigManager:
    sections = merge(merge(shipped_sections(), SECTIONS), changes)
    return ConfigManager(**sections, dataset_dir=str(data), output_dir=str(output), device="cpu")


def train(data, output, **changes) -> Path:
    config = configured(data, output, **changes)
    run_bundle("train.yaml", (), {"config": config})
    return config.run_dir


def weights(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    return torch.load(run / f"model_{epoch}.pth", weights_only=True)["model"]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def check_both_ways(data: Path, folder: Path, key: str, **training) -> None:
    """Train in the workers and on the device, compare, and resume the second exactly.

    Args:
        data: the data folder.
        folder: an empty folder.
        key: key of `tr_config` that says where the work is done.
        training: other keys of `tr_config`, for the training on the device.
    """
    on = {"tr_config": {key: True, **training}}
    by_workers = train(data, folder / "workers", tr_config={key: False})
    on_device = train(data, folder / "device", **on)
    for ours, theirs in zip(rows(on_device), rows(by_workers), strict=True):
        for name in (name for name in theirs if name.startswith(("train", "val")) and theirs[name]):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=2e-3, abs=2e-4), name
    theirs = weights(by_workers, 2)
    for name, value in weights(on_device, 2).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=2e-3)

    stopped = folder / "stopped" / "model"
    shutil.copytree(on_device, stopped)
    (stopped / "model_2.pth").unlink()
    train(data, folder / "stopped", tr_setup={"resume": True}, **on)
    for name, value in weights(stopped, 2).items():
        assert torch.equal(value, weights(on_device, 2)[name]), name


def test_both_train_the_same_network_and_resume_exactly(data, tmp_path):
    check_both_ways(data, tmp_path, "derive_on_device")


@pytest.mark.parametrize(
    ("setting", "device"), list(itertools.product([True, False, "auto"], ["cpu", "cuda"]))
)
def test_what_is_derived_where(data, tmp_path, setting, device, monkeypatch):
    config = configured(data, tmp_path, tr_config={"derive_on_device": setting})
    monkeypatch.setattr("volumen.utils.device.choose_device", lambda _: torch.device(device))
    there = setting is True or (setting == "auto" and device == "cuda")
    assert set(config.device_tasks) == ({"distance", "normals"} if there else set())
    # Shape descriptors cannot be derived for a batch.
    assert set(config.worker_tasks) == (set(TASKS) - set(config.device_tasks))
    assert config.device_sources == (["surface"] if there else [])
