"""The command line and MONAI's own runner carry out the same experiment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from data_folders import shells, write_tiff_folder

from volumen.cli.main import main

TRAIN = ROOT / "bundle" / "configs" / "train.yaml"
SETTINGS = {
    "tr_config": {
        "patch_size": [16, 16, 16],
        "batch_size": 2,
        "max_epoch": 1,
        "max_steps_per_epoch": 2,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
        "amp": "off",
    },
    "model_config": {"features_per_stage": [4, 8]},
    "auxiliary_tasks": {
        "distance": {
            "type": "distance_transform",
            "source_target": "surface",
            "losses": [{"name": "SignedDistanceLoss"}],
        }
    },
}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "bundle"), "OMP_NUM_THREADS": "1", **more}


def monai_run(cwd: Path, *words: str, config: str = str(TRAIN)) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", config, *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiff_folder(
        tmp_path_factory.mktemp("bundle") / "data", {"scroll": {"surface": shells((24, 24, 64))}}
    )


def overrides() -> list[str]:
    words = []
    for section, values in SETTINGS.items():
        for key, value in values.items():
            words += [f"--{section}#{key}", str(value)]
    return words


def test_both_ways_leave_equal_snapshots_and_equal_weights(data, tmp_path, monkeypatch):
    here, there = tmp_path / "cli", tmp_path / "monai"
    here.mkdir()
    there.mkdir()
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.chdir(here)
    assert (
        main(["train", "-i", str(data), "-o", "out", "--device", "cpu", "--config-path", str(experiment)])
        == 0
    )

    done = monai_run(
        there, "--dataset_dir", str(data), "--output_dir", "out", "--device_name", "cpu", *overrides(),
        "--meta_file", str(ROOT / "bundle/configs/metadata.json"),
        "--logging_file", str(ROOT / "bundle/configs/logging.conf"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]

    first, second = (folder / "out" / "model" for folder in (here, there))
    assert (first / "model_config.yaml").read_text() == (second / "model_config.yaml").read_text()
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    weights = [torch.load(run / "model_1.pth", weights_only=True)["model"] for run in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_snapshot_trains_the_same_model_again(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(SETTINGS))
    assert (
        main(["train", "-i", str(data), "-o", "one", "--device", "cpu", "--config-path", str(experiment)])
        == 0
    )
    snapshot = tmp_path / "one" / "model" / "model_config.yaml"
    assert main(["train", "-o", "two", "--device", "cpu", "--config-path", str(snapshot)]) == 0
    first, second = (
        torch.load(f"{out}/model/model_1.pth", weights_only=True)["model"] for out in ("one", "two")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_mistyped_override_of_a_section_is_refused(data, tmp_path):
    done = monai_run(
        tmp_path, "--dataset_dir", str(data), "--output_dir", "out", "--tr_config#batchsize", "4"
    )
    assert done.returncode != 0
    assert "did you mean batch_size?" in done.stderr
    assert not (tmp_path / "out").exists()


# The two excerpts of the reference documentation, as they stand.
EXCERPTS = {
    "structure_tensor": """
auxiliary_tasks:
  structure_tensor:
    type: structure_tensor
    source_target: surface
    # Compute from: 'sdt' (signed distance transform) or 'binary' mask
    compute_from: sdt
    grad_sigma: 1.0       # pre-gradient smoothing
    tensor_sigma: 1.5     # post-tensor smoothing
    loss_weight: 0.1
    losses:
      - name: "MaskedMSELoss"
        weight: 1.0
        kwargs:
          ignore_index: -100
""",
    "inplane_direction": """
auxiliary_tasks:
  inplane_direction:
    type: inplane_direction
    source_target: surface
    compute_from: sdt    # or 'binary'
    grad_sigma: 1.0
    tensor_sigma: 1.5
    loss_weight: 0.1
    losses:
      - name: "MaskedMSELoss"
        weight: 1.0
        kwargs:
          ignore_index: -100
""",
}


@pytest.mark.parametrize("task", EXCERPTS)
def test_an_excerpt_of_the_documentation_trains_as_it_stands(data, tmp_path, task):
    path = tmp_path / "excerpt.yaml"
    path.write_text(EXCERPTS[task])
    code = main(
        ["train", "-i", str(data), "-o", str(tmp_path / "out"), "--config-path", str(path), "--device", "cpu",
         "--patch-size", "16,16,16", "--batch-size", "1", "--max-epochs", "1", "--steps-per-epoch", "2",
         "--val-steps", "1", "--workers", "0", "--amp", "off", "--set", "model_config.features_per_stage=[4, 8]"]
    )  # fmt: skip
    assert code == 0
    header, row = (tmp_path / "out" / "model" / "metrics.csv").read_text().splitlines()
    losses = dict(zip(header.split(","), row.split(",")))
    assert float(losses[f"loss/{task}/MaskedMSELoss"]) > 0
