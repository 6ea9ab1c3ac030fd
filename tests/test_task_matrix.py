"""Every derived target in every situation, and the device's result compared with the workers'."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy import ndimage
from test_derive_batch import check_equal

from volumen.derived import registry as task_registry
from volumen.derived.derivation import derive_target
from volumen.derived.registry import get_task, task_out_channels, task_types
from volumen.losses.registry import build_loss
from volumen.transforms.derive import DeriveTargetsd

SITUATIONS = {
    "2d": {"shape": (18, 20)},
    "3d": {"shape": (12, 13, 14)},
    "anisotropic": {"shape": (8, 16, 15), "spacing": (4.0, 1.0, 1.5)},
    "channels": {"shape": (16, 17), "channels": 3},
    "classes": {"shape": (16, 17), "classes": 4},
    "empty": {"shape": (10, 11, 12), "value": 0},
    "full": {"shape": (10, 11, 12), "value": 1},
    "ignored": {"shape": (10, 11, 12), "known": False},
    "one voxel": {"shape": (1, 14, 15)},
    "one voxel each": {"shape": (14, 1)},
}


def sample_in(shape, spacing=None, channels=1, classes=2, value=None, known=True):
    rng = np.random.default_rng(sum(shape) + channels + classes)
    noise = [
        ndimage.gaussian_filter(rng.normal(size=shape), [min(1.5, n / 4) for n in shape])
        for _ in range(channels)
    ]
    label = (np.stack(noise) > 0.02) * rng.integers(
        1, classes, (1, *[1] * len(shape)) if classes == 2 else shape
    )
    if value is not None:
        label = np.full((1, *shape), value)
    return {
        "label": label.astype(np.int32),
        "label_mask": np.full((1, *shape), known),
        "in_volume": None,
        "spacing": spacing or (1.0,) * len(shape),
    }


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", task_types())
def test_every_task_in_every_situation(name, situation):
    sample = sample_in(**SITUATIONS[situation])
    tasks = {name: {"type": name, "source_target": "label"}}
    if "reach" in get_task(name).defaults:
        tasks[name]["reach"] = 5.0
    found = DeriveTargetsd(tasks, unit="voxel")(sample)
    values, valid = found[name], found[f"{name}_mask"]
    shape = sample["label"].shape[1:]
    assert values.shape == (task_out_channels(name, len(shape)), *shape)
    assert valid.shape == (1, *shape)
    assert np.isfinite(values).all()
    assert not valid[~sample["label_mask"]].any()
    assert (values[:, ~valid[0]] == 0).all()
    if situation == "ignored":
        assert not valid.any()
    if situation in ("2d", "3d", "anisotropic", "channels", "classes"):
        assert valid.any()
    if situation in ("empty", "full") and get_task(name).kind in ("vector", "axis", "tensor"):
        assert not valid.any()
    if get_task(name).on_device:
        check_equal(tasks, [sample, sample], 0)


@pytest.mark.parametrize("name", [name for name in task_types() if "reach" in get_task(name).defaults])
def test_channels_count_as_their_union_and_classes_as_theirs(name):
    """Types that follow from the distance depend only on the foreground, however it is represented."""
    by_class = sample_in(shape=(22, 24), classes=4)["label"]
    by_channel = np.concatenate([by_class == number for number in (1, 2, 3)]).astype(np.int32)
    for first, second in (
        (derive_target(name, by_class, reach=5.0), derive_target(name, by_channel, reach=5.0)),
        (
            derive_target(name, by_class, reach=5.0, classes=[1, 3]),
            derive_target(name, by_channel, reach=5.0, classes=[0, 2]),
        ),
    ):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


def python_block(page: str, word: str) -> str:
    """Return the first Python block of a page that contains a word."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    return next(text for text in found if word in text)


def install(folder, name: str, group: str, entry: str, code: str) -> None:
    """Write a package with an entry point in the way pip would install it."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    (folder / name / entry.split(":")[0].split(".")[1]).with_suffix(".py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{entry.split(':')[1]} = {entry}\n")


def test_the_documented_task_works_as_an_installed_package(tmp_path, monkeypatch):
    task_types()
    monkeypatch.setattr(task_registry, "_TASKS", dict(task_registry._TASKS))
    monkeypatch.setattr(task_registry, "_loaded_entry_points", False)
    code = python_block("targets.md", "class Thickness").replace("Thickness", "Installed")
    code = code.replace('"thickness"', '"installed_thickness"').split("\nassert")[0]
    code = code.replace("@register_task\n", "")
    install(tmp_path, "their_tasks", "volumen.tasks", "their_tasks.tasks:Installed", code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    label = np.zeros((1, 12, 40), np.uint8)
    label[..., 18:22] = 1
    values, valid = derive_target("installed_thickness", label)
    assert values.max() == 3
    assert valid.all()


def test_the_documented_loss_works_as_an_installed_package(tmp_path, monkeypatch):
    import torch

    code = python_block("losses.md", "class LogCoshLoss").replace("LogCoshLoss", "InstalledLoss")
    code = code.split("\nloss = ")[0].replace('@register_loss("InstalledLoss")\n', "")
    install(tmp_path, "their_losses", "volumen.losses", "their_losses.losses:InstalledLoss", code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    loss = build_loss("InstalledLoss", {"width": 2.0}, kind="distance")
    zero = torch.zeros(1, 1, 4, 4)
    assert loss(zero, zero) == 0
    assert loss(zero, zero + 3) > 0
