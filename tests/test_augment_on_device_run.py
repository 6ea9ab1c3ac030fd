"""A training whose patches the device augments, compared with one whose workers augment them."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_derive_on_device_run import configured, data, rows, train, weights  # noqa: F401

from volumen.utils.errors import VolumenError

CHOSEN = {"tr_config": {"augment_on_device": True}}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_both_train_the_same_network_and_resume_exactly(data, tmp_path, workers):  # noqa: F811
    chosen = {"tr_config": {"augment_on_device": True, "num_dataloader_workers": workers}}
    by_workers = train(data, tmp_path / "workers", tr_config={"augment_on_device": False})
    on_device = train(data, tmp_path / "device", **chosen)
    for ours, theirs in zip(rows(on_device), rows(by_workers), strict=True):
        for key in (key for key in theirs if key.startswith(("train", "val")) and theirs[key]):
            assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=2e-3, abs=2e-4), key
    theirs = weights(by_workers, 2)
    for name, value in weights(on_device, 2).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=2e-3)

    stopped = tmp_path / "stopped" / "model"
    shutil.copytree(on_device, stopped)
    (stopped / "model_2.pth").unlink()
    train(data, tmp_path / "stopped", tr_setup={"resume": True}, **chosen)
    for name, value in weights(stopped, 2).items():
        assert torch.equal(value, weights(on_device, 2)[name]), name


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
