"""The bundle passes what the model zoo's continuous integration checks, from any folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
import zarr
from conftest import ROOT
from data_folders import shells, write_tiff_folder
from jsonschema.validators import validator_for
from meta_schema import PUBLISHED, SCHEMA, altered
from monai.bundle import ConfigWorkflow
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties

from volumen.networks.multihead import ConcatenatedHeads, MultiHeadDynUNet
from volumen.sharing.metadata import REQUIRED_PACKAGES

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
    """By MONAI's own command, which takes a schema that lies there for the fetched one: that of `meta_schema.py`."""
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


@pytest.mark.slow
def test_the_metadata_are_valid_by_the_published_schema(tmp_path):
    """As the model zoo does it: the schema is fetched from the address that the metadata name."""
    import urllib.error
    import urllib.request

    schema = tmp_path / "schema.json"
    try:
        with urllib.request.urlopen(METADATA["schema"], timeout=20) as answer:
            schema.write_bytes(answer.read())
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"the published schema cannot be fetched here: {error}")
    words = ["--meta_file", str(CONFIGS / "metadata.json"), "--filepath", str(schema)]
    assert "metadata is verified with no error" in monai("verify_metadata", *words, cwd=tmp_path)
    assert_equal_verdicts(json.loads(schema.read_text()), PUBLISHED)


def assert_equal_verdicts(first: dict, second: dict) -> None:
    """Two schemas judge alike whatever part of the metadata is left out or has another type."""
    judges = [validator_for(schema)(schema) for schema in (first, second)]
    for changed in altered(metadata_with_every_part()):
        verdicts = [judge.is_valid(changed) for judge in judges]
        assert verdicts[0] == verdicts[1], changed


def metadata_with_every_part() -> dict:
    """The metadata with fewer targets, and with what the schema knows and they lack."""
    formats = {
        part: {name: tensor for name, tensor in tensors.items() if name in ("image", "pred", "surface")}
        for part, tensors in METADATA["network_data_format"].items()
    }
    formats["post_processed_outputs"] = {"surface": METADATA["targets"]["surface"]}
    scores = {"eval_metrics": {"surface/dice": 0.9}}
    return {**METADATA, **scores, "network_data_format": formats, "other_data_format": formats}


def test_the_stricter_schema_accepts_nothing_that_the_published_one_refuses():
    published, stricter = (validator_for(schema)(schema) for schema in (PUBLISHED, SCHEMA))
    refused = [part for part in altered(metadata_with_every_part()) if not published.is_valid(part)]
    assert len(refused) > 500
    assert not any(stricter.is_valid(changed) for changed in refused)


def test_a_fresh_clone_predicts_and_scores_its_sample(tmp_path):
    """As the model card says, from the repository: without any argument but the config."""

    def unversioned(folder, names):
        made = {"predictions", "evaluation"} if Path(folder).name == "bundle" else set()
        return (made | {"__pycache__"}) & set(names)

    shutil.copytree(BUNDLE, tmp_path / "bundle", ignore=unversioned)
    assert (tmp_path / "bundle" / "models" / "model.pt").stat().st_size < 5e6
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for config in ("inference", "evaluate"):
        command = [
            sys.executable,
            "-m",
            "monai.bundle",
            "run",
            "--config_file",
            f"bundle/configs/{config}.yaml",
        ]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    root = zarr.open_group(tmp_path / "bundle" / "predictions" / "roll.zarr", mode="r")
    assert {name: root[f"{name}/0"].shape[-3:] for name in HEADS} == dict.fromkeys(HEADS, (48, 80, 80))
    scores = json.loads((tmp_path / "bundle" / "evaluation" / "metrics.json").read_text())["mean"]
    assert scores["surface/dice"] == pytest.approx(0.87, abs=0.01)


def test_the_metadata_list_what_the_program_depends_on():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in project["dependencies"]}
    assert set(REQUIRED_PACKAGES) == needed - {"torch", "monai", "numpy"}
    assert set(METADATA["required_packages_version"]) == set(REQUIRED_PACKAGES)


def test_every_output_has_its_name_and_pred_joins_them():
    declared, joined = METADATA["targets"], METADATA["network_data_format"]["outputs"]
    assert {name: entry["num_channels"] for name, entry in declared.items()} == HEADS
    assert list(joined) == ["pred"]
    assert joined["pred"]["num_channels"] == sum(HEADS.values())
    for entry in (*declared.values(), *joined.values()):
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


def all_properties(workflow, *tables) -> dict[str, object]:
    """Return every property of MONAI's tables, required and optional, as the workflow gives it; print the list."""
    table = {name: entry for part in tables for name, entry in part.items()}
    found = {name: getattr(workflow, name) for name in table}
    for name, value in found.items():
        sys.stdout.write(f"{name} ({table[name]['id']}): {type(value).__name__}\n")
    assert {name for name, entry in table.items() if entry["id"] not in workflow.parser} == set()
    assert {name for name, value in found.items() if value is None} == set()
    return found


def test_the_training_config_has_every_property_and_uses_it(data, tmp_path, capsys):
    workflow = ConfigWorkflow(
        str(CONFIGS / "train.yaml"),
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(data),
        output_dir=str(tmp_path / "out"),
        device_name="cpu",
        **{
            "tr_config#patch_size": [16, 16, 16],
            "tr_config#max_epoch": 1,
            "tr_config#max_steps_per_epoch": 2,
            "tr_config#max_val_steps_per_epoch": 1,
            "tr_config#num_dataloader_workers": 0,
            "model_config#features_per_stage": [4, 8],
        },
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    found = all_properties(workflow, TrainProperties, MetaProperties)
    assert "train_postprocessing (train::postprocessing): DecideLabelsd" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

    trainer, evaluator = found["trainer"], found["evaluator"]
    # Exactly these objects carry the run: seen from the engines.
    assert trainer.network is workflow.parser.get_parsed_content("network")
    assert trainer.network is found["network_def"]
    assert trainer.inferer is found["train_inferer"]
    assert trainer.data_loader.dataset is found["train_dataset"]
    listed = [{part: case[part] for part in ("image", "label")} for case in found["train_dataset_data"]]
    assert listed == [
        {"image": case.image.path, "label": case.labels["surface"].path}
        for case in found["train_dataset"].cases
    ]
    assert found["train_dataset"].transform is found["train_preprocessing"]
    assert found["max_epochs"] == trainer.state.max_epochs == 1
    assert trainer.state.key_metric_name in found["train_key_metric"]
    assert evaluator.network is trainer.network
    assert evaluator.inferer is found["val_inferer"]
    assert evaluator.data_loader.dataset is found["val_dataset"]
    assert list(found["val_dataset_data"]) == listed  # the one volume is divided
    assert found["val_dataset"].transform is found["val_preprocessing"]
    assert evaluator.state.key_metric_name in found["val_key_metric"]

    calls: list[str] = []
    for part in ("train_postprocessing", "val_postprocessing"):
        watch(found[part], "decisions", part, calls)
    for part in ("train_key_metric", "val_key_metric"):
        (metric,) = found[part].values()
        watch(metric, "update", part, calls)
    workflow.run()
    assert calls.count("train_postprocessing") == calls.count("train_key_metric") == 2
    assert calls.count("val_postprocessing") == calls.count("val_key_metric") >= 1
    assert 0 <= trainer.state.metrics["train/mean_dice"] <= 1
    assert 0 <= trainer.state.metrics["val/mean_dice"] <= 1
    workflow.finalize()


@pytest.mark.slow
def test_the_configs_for_several_processes_train_and_score(data, tmp_path):
    """By torchrun and MONAI's runner, on processors: two processes, one run and one report."""

    def launch(configs: list[str], *words: str) -> None:
        paths = str([str(CONFIGS / name) for name in configs])
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "monai.bundle",
            "run",
        ]
        environment = {**os.environ, "PYTHONPATH": str(BUNDLE), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command, *words, "--config_file", paths, "--dataset_dir", str(data)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    launch(
        ["train.yaml", "multi_gpu_train.yaml"], "training", "--output_dir", "out", "--device_name", "cpu",
        "--tr_config#patch_size", "[16, 16, 16]", "--tr_config#max_epoch", "1",
        "--tr_config#max_steps_per_epoch", "2", "--tr_config#num_dataloader_workers", "0",
        "--model_config#features_per_stage", "[4, 8]",
    )  # fmt: skip
    run = tmp_path / "out" / "model"
    assert len((run / "metrics.csv").read_text().splitlines()) == 2
    words = ["--checkpoint", str(run / "model_1.pth"), "--dataset_dir", str(data), "--output_dir", "found"]
    monai("run", "--config_file", str(CONFIGS / "inference.yaml"), *words, cwd=tmp_path)
    launch(
        ["evaluate.yaml", "multi_gpu_evaluate.yaml"], "--predictions", "found", "--output_dir", "report"
    )  # fmt: skip
    assert set(json.loads((tmp_path / "report" / "metrics.json").read_text())["cases"]) == {"scroll"}


def watch(item: object, method: str, name: str, calls: list[str]) -> None:
    """Note the calls of an object's method."""
    original = getattr(item, method)

    def noted(*words, **named):
        calls.append(name)
        return original(*words, **named)

    setattr(item, method, noted)


def test_the_inference_config_has_every_property_and_uses_it(data, released, tmp_path, capsys):
    workflow = ConfigWorkflow(
        str(CONFIGS / "inference.yaml"),
        workflow_type="inference",
        logging_file=False,
        dataset_dir=str(data),
        output_dir=str(tmp_path / "out"),
        checkpoint=str(released / "checkpoint.pth"),
        device="cpu",
        **{"inference_config#patch_size": [16, 16, 16], "inference_config#output_targets": ["surface"]},
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    found = all_properties(workflow, InferProperties, MetaProperties)
    assert "postprocessing (postprocessing): Compose" in capsys.readouterr().out
    (store,) = found["postprocessing"].transforms
    assert found["network_def"](torch.rand(1, 1, 16, 16, 16)).shape[1] == sum(HEADS.values())

    evaluator = found["evaluator"]
    assert evaluator.data_loader.dataset is found["dataset"]
    assert evaluator.inferer is found["inferer"]
    assert {id(p) for p in evaluator.network.parameters()} == {
        id(p) for p in found["network_def"].parameters()
    }
    assert found["dataset"].data == found["dataset_data"] == [{"image": str(data / "images" / "scroll.tif")}]
    assert found["dataset"].transform is found["preprocessing"]
    image = found["dataset"][0]["image"]
    assert image.shape == (24, 24, 64)
    assert image.read((slice(0, 4),) * 3).dtype.name == "float32"

    calls: list[str] = []
    watch(found["preprocessing"], "__call__", "preprocessing", calls)
    watch(store, "_stored", "postprocessing", calls)
    (metric,) = found["key_metric"].values()
    watch(metric, "update", "key_metric", calls)
    store.fields["dtype"] = "labels"  # what the property says is what is stored
    found["inferer"].overlap = 0.25
    workflow.run()
    root = zarr.open_group(tmp_path / "out" / "scroll.zarr", mode="r")
    assert root["labels/surface/0"].shape == (24, 24, 64)
    recipe = root.attrs["volumen"]["recipe"]
    assert recipe["dtype"] == "labels"
    assert recipe["windows"]["overlap"] == 0.25
    assert calls.count("key_metric") == 1
    assert 0 <= evaluator.state.metrics["mean_dice"] <= 1
