"""A training whose patches the device augments, compared with one whose workers augment them."""

from __future__ import annotations

import pytest
import torch
from test_derive_on_device_run import check_both_ways, configured, data  # noqa: F401

from volumen.utils.errors import VolumenError

CHOSEN = {"tr_config": {"augment_on_device": True}}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_both_train_the_same_network_and_resume_exactly(data, tmp_path, workers):  # noqa: F811
    check_both_ways(data, tmp_path, "augment_on_device", num_dataloader_workers=workers)


@pytest.mark.parametrize(
    ("setting", "device", "there"),
    [("auto", "cpu", False), ("auto", "cuda", True), (True, "cpu", True), (False, "cuda", False)],
)
def test_where_patches_are_augmented(data, tmp_path, setting, device, there, monkeypatch):  # noqa: F811
    config = configured(data, tmp_path, tr_config={"augment_on_device": setting})
    monkeypatch.setattr("volumen.utils.device.choose_device", lambda _: torch.device(device))
    assert config.augments_on_device == there
    # What is augmented on the device is derived there too, unless a setting says otherwise.
    assert set(config.device_tasks) == ({"distance", "normals"} if there or device == "cuda" else set())


def test_a_device_without_float64_is_refused(data, tmp_path, monkeypatch):  # noqa: F811
    config = configured(data, tmp_path, **CHOSEN)
    monkeypatch.setattr("volumen.utils.device.choose_device", lambda _: torch.device("mps"))
    with pytest.raises(VolumenError, match="float64"):
        _ = config.augments_on_device
