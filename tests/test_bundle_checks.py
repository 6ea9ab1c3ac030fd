"""The bundle passes what the model zoo's continuous integration checks, from any folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from data_folders import shells, write_tiff_folder
from meta_schema import SCHEMA
from monai.bundle import ConfigWorkflow
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties
from scripts.networks.multihead import ConcatenatedHeads, MultiHeadDynUNet
from scripts.sharing.metadata import REQUIRED_PACKAGES

BUNDLE = ROOT / "bundle"
CONFIGS = BUNDLE / "configs"
METADATA = json.loads((CONFIGS / "metadata.json").read_text())
HEADS = {
    "surface": 1,
    "distance_transform": 1,
    "surface_normals": 3,
    "structure_tensor": 6,
    "inplane_direction": 3,
}


def monai(*words: str, cwd) -> str:
    """Run `python -m monai.bundle` as a stranger would; return what it said."""
    environment = {**os.environ, "PYTHONPATH": str(BUNDLE), "OMP_NUM_THREADS": "1"}
    environment["MONAI_FAIL_ON_DUPLICATE_CONFIG"] = "1"
    command = [sys.executable, "-m", "monai.bundle", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint of the architecture that the metadata describe, but narrow, and its weights alone."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    heads = {name: {"out_channels": n, "separate_decoder": False} for name, n in HEADS.items()}
    network = MultiHeadDynUNet(3, 1, heads, [4, 4, 8, 8], [1, 2, 2, 2], n_blocks_per_stage=1)
    config = yaml.safe_load((CONFIGS / "recipes" / "demo.yaml").read_text())
    state = {
        "model": network.state_dict(),
        "model_config": network.final_config,
        "config": config,
        "epoch": 1,
    }
    torch.save(state, folder / "checkpoint.pth")
    torch.save(network.state_dict(), folder / "model.pt")
    return folder


def test_what_a_bundle_must_hold_is_there():
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/metadata.json",
                 "configs/inference.yaml", "configs/logging.conf"):  # fmt: skip
        assert (BUNDLE / name).is_file(), name
    assert METADATA["version"] in METADATA["changelog"]
    large = [path for path in BUNDLE.rglob("*") if path.is_file() and path.stat().st_size > 25e6]
    assert not large, "files over 25 MB belong into large_files.yml"


def test_the_model_card_has_the_zoo_s_sections_in_its_order():
    text = (BUNDLE / "docs" / "README.md").read_text()
    found = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert found == [
        "Data",
        "Training configuration",
        "Input",
        "Output",
        "Performance",
        "Speed",
        "MONAI bundle commands",
        "References",
        "License",
    ]


def test_the_metadata_are_valid(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    said = monai(
        "verify_metadata",
        "--meta_file",
        str(CONFIGS / "metadata.json"),
        "--filepath",
        str(schema),
        cwd=tmp_path,
    )
    assert "metadata is verified with no error" in said


def test_the_metadata_list_what_the_program_depends_on():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in project["dependencies"]}
    assert set(REQUIRED_PACKAGES) == needed - {"torch", "monai", "numpy"}
    assert set(METADATA["required_packages_version"]) == set(REQUIRED_PACKAGES)


def test_every_output_has_its_name_and_pred_joins_them():
    declared = METADATA["network_data_format"]["outputs"]
    assert {name: entry["num_channels"] for name, entry in declared.items() if name != "pred"} == HEADS
    assert declared["pred"]["num_channels"] == sum(HEADS.values())
    for entry in declared.values():
        assert list(entry["channel_def"]) == [str(n) for n in range(entry["num_channels"])]
    recipe = yaml.safe_load((CONFIGS / "recipes" / "demo.yaml").read_text())
    assert set(HEADS) == {*recipe["dataset_config"]["targets"], *recipe["auxiliary_tasks"]}


def test_the_network_takes_and_gives_what_the_metadata_say(released, tmp_path):
    said = monai(
        "verify_net_in_out", "network_def", "--device", "cpu",
        "--meta_file", str(CONFIGS / "metadata.json"),
        "--config_file", str(CONFIGS / "inference.yaml"),
        "--checkpoint", str(released / "checkpoint.pth"),
        "--bundle_root", str(BUNDLE), cwd=tmp_path,
    )  # fmt: skip
    assert "data shape of network is verified with no error" in said


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), [("ckpt_export", "model.ts"), ("onnx_export", "model.onnx")])
def test_monai_exports_the_network(released, tmp_path, command, name):
    if command == "onnx_export":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / name
    monai(
        command, "network_def", "--filepath", str(path),
        "--ckpt_file", str(released / "model.pt"),
        "--meta_file", str(CONFIGS / "metadata.json"),
        "--config_file", str(CONFIGS / "inference.yaml"),
        "--checkpoint", str(released / "checkpoint.pth"),
        "--input_shape", "[2, 1, 16, 16, 16]",
        "--bundle_root", str(BUNDLE), cwd=tmp_path,
    )  # fmt: skip
    state = torch.load(released / "checkpoint.pth", weights_only=True)
    network = ConcatenatedHeads.from_config(state["model_config"]).eval()
    network.load_state_dict(state["model"])
    images = torch.rand(2, 1, 16, 16, 16)
    with torch.inference_mode():
        expected = network(images)
    if command == "ckpt_export":
        from monai.data import load_net_with_metadata

        module, metadata, _ = load_net_with_metadata(str(path))
        assert metadata["network_data_format"] == METADATA["network_data_format"]
        found = module(images)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name
        found = torch.from_numpy(session.run(None, {entry: images.numpy()})[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiff_folder(
        tmp_path_factory.mktemp("checks") / "data", {"scroll": {"surface": shells((24, 24, 64))}}
    )


# Optional properties that this bundle has no use for: the datasets hold volumes, not lists of dictionaries;
# activations are part of prediction; the key metric is a validation metric.
TRAIN_WITHOUT = {
    "train_dataset_data",
    "train_postprocessing",
    "train_key_metric",
    "val_dataset_data",
    "val_postprocessing",
}
INFERENCE_WITHOUT = {"dataset_data", "handlers", "preprocessing", "postprocessing", "key_metric"}


def test_the_training_config_has_every_property(data, tmp_path):
    workflow = ConfigWorkflow(
        str(CONFIGS / "train.yaml"),
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(data),
        output_dir=str(tmp_path / "out"),
        device_name="cpu",
        **{
            "tr_config#patch_size": [16, 16, 16],
            "tr_config#num_dataloader_workers": 0,
            "model_config#features_per_stage": [4, 8],
        },
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    lacking = {n for n, p in {**TrainProperties, **MetaProperties}.items() if p["id"] not in workflow.parser}
    assert lacking == TRAIN_WITHOUT
    assert workflow.max_epochs == 1000
    assert workflow.val_interval == 1
    assert not (tmp_path / "out").exists()


def test_the_inference_config_has_every_property(data, released, tmp_path):
    workflow = ConfigWorkflow(
        str(CONFIGS / "inference.yaml"),
        workflow_type="inference",
        logging_file=False,
        dataset_dir=str(data),
        output_dir=str(tmp_path / "out"),
        checkpoint=str(released / "checkpoint.pth"),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    lacking = {n for n, p in {**InferProperties, **MetaProperties}.items() if p["id"] not in workflow.parser}
    assert lacking == INFERENCE_WITHOUT
    assert workflow.network_def(torch.rand(1, 1, 16, 16, 16)).shape[1] == sum(HEADS.values())
    assert len(workflow.dataset) == 1
