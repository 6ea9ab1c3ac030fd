"""What is labelled in the cells of the benchmark of unlabelled voxels, and that every arm is a valid experiment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_folders import write_tiff_folder

from volumen.config.manager import ConfigManager
from volumen.config.unlabelled import find_unlabelled_patches


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("box", [((0, 96), (10, 170), (0, 160)), ((0, 584), (0, 565))])
def test_a_box_has_the_share_that_its_name_says(box, share):
    from unlabelled_gain import labelled_box

    (part,) = labelled_box(box, share, np.random.default_rng(0))
    assert all(low <= side.start < side.stop <= high for side, (low, high) in zip(part, box, strict=True))
    found = np.prod([side.stop - side.start for side in part]) / np.prod([high - low for low, high in box])
    assert found == pytest.approx(share, rel=0.1)
    assert labelled_box(box, share, np.random.default_rng(0)) == [part]


def test_whole_volumes_are_labelled_or_not():
    from unlabelled_gain import labelled_volumes

    def chosen(seed):
        parts = labelled_volumes(20, 0.1, seed)
        return [bool(parts(((0, 4), (0, 4)), 0.1, np.random.default_rng(9))) for _ in range(20)]

    assert sum(chosen(0)) == 2
    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert sum(bool(part) for part in [labelled_volumes(3, 0.02, 0)(((0, 4),), 0.02, None)]) <= 1


def test_every_arm_is_a_valid_experiment(tmp_path):
    from unlabelled_gain import ARMS, arm_settings

    label = (np.indices((24, 24, 24)).sum(axis=0) % 7 < 3).astype("uint8")
    mask = np.zeros_like(label)
    mask[:6] = 1
    folder = write_tiff_folder(tmp_path / "data", {"a": {"wall": label}}, masks={"a": {"wall": mask}})
    for arm in ARMS:
        settings = {"tr_config": {"patch_size": [16, 16, 16], **arm_settings(arm, 1).get("tr_config", {})}}
        config = ConfigManager(**settings, dataset_dir=str(folder), output_dir=str(tmp_path), device="cpu")
        assert bool(config.unlabelled_per_batch) == arm.startswith("teacher")
        assert (config.ema_decay is None) == (arm in ("alone", "rounds"))
        if config.unlabelled_per_batch:
            assert len(find_unlabelled_patches(config))
