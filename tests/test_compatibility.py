"""Files that an earlier version wrote still work: settings, split, checkpoint.

What a version promises from 0.1.0 on: its experiments, resolved settings, splits and checkpoints work with every later
version of the same major number; what changes its meaning is refused by name, never read as something else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.main import main
from volumen.version import __version__

PLACE = Path(__file__).parent / "compatibility"
sys.path.insert(0, str(PLACE))

from make import STORED, predict, write_data  # noqa: E402

VERSIONS = sorted(path.name for path in PLACE.iterdir() if path.is_dir() and path.name[0].isdigit())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data folder of the stored runs."""
    folder = tmp_path_factory.mktemp("compatibility") / "data"
    write_data(folder)
    return folder


def train(data: Path, out: Path, *words: object) -> Path:
    """Train briefly; return the run's folder."""
    arguments = ["train", "-i", data, "-o", out, "--device", "cpu", "--quiet", *words]
    assert main([str(word) for word in arguments]) == 0
    return out / "model"


def test_this_version_has_stored_files():
    """A release adds a folder, by tests/compatibility/make.py."""
    assert __version__ in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_predicts_what_it_did(version, data, tmp_path):
    found = predict(data / "images" / "v0.tif", PLACE / version / "model_2.pth", tmp_path / "found")
    with np.load(PLACE / version / "prediction.npz") as stored:
        assert set(found) == set(stored)
        for name, volume in found.items():
            np.testing.assert_allclose(volume[STORED], stored[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("settings", ["experiment.yaml", "model_config.yaml"])
def test_settings_train_the_same_experiment(version, settings, data, tmp_path):
    run = train(data, tmp_path, "--config-path", PLACE / version / settings)
    then = load_checkpoint(PLACE / version / "model_2.pth")["model"]
    now = load_checkpoint(run / "model_2.pth")["model"]
    assert {name: value.shape for name, value in now.items()} == {name: v.shape for name, v in then.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_goes_on(version, data, tmp_path):
    words = ("--config-path", PLACE / version / "model_config.yaml", "--max-epochs", 3)
    run = train(data, tmp_path, *words, "--resume", PLACE / version / "model_2.pth")
    assert load_checkpoint(run / "model_3.pth")["iteration"] == 6


@pytest.mark.parametrize("version", VERSIONS)
def test_a_split_divides_as_it_did(version, data, tmp_path):
    split = PLACE / version / "model_split.json"
    words = ("--config-path", PLACE / version / "experiment.yaml", "--max-epochs", 1, "--seed", 7)
    run = train(data, tmp_path, *words, "--split", split)
    parts = json.loads((run / "model_split.json").read_text())
    stored = json.loads(split.read_text())
    assert {part: parts[part] for part in ("train", "val")} == {
        part: stored[part] for part in ("train", "val")
    }
