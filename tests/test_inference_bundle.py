"""The bundle's inference and evaluation configs run as MONAI runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from monai.bundle import ConfigWorkflow
from prediction import save_checkpoint

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"


@pytest.fixture
def dataset(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 14), dtype=np.uint8)
    for folder, name, values in (("images", "a", image), ("labels", "a_ink", image // 128)):
        (tmp_path / "data" / folder).mkdir(parents=True)
        tifffile.imwrite(tmp_path / "data" / folder / f"{name}.tif", values, metadata={"axes": "ZYX"})
    save_checkpoint(tmp_path / "m.pth")
    return tmp_path


def run(config: str, **overrides):
    workflow = ConfigWorkflow(
        str(CONFIGS / config),
        workflow_type="inference",
        logging_file=False,
        meta_file=str(CONFIGS / "metadata.json"),
        bundle_root=str(CONFIGS.parent),
        **overrides,
    )
    path = list(sys.path)
    workflow.initialize()
    try:
        return workflow, workflow.run()
    finally:
        sys.path[:] = path


def test_a_folder_is_predicted_and_scored_by_the_configs(dataset):
    workflow, _ = run(
        "inference.yaml",
        dataset_dir=str(dataset / "data"),
        output_dir=str(dataset / "found"),
        checkpoint=str(dataset / "m.pth"),
        **{"inference_config#overlap": 0.25, "inference_config#output_targets": ["ink"]},
    )
    root = zarr.open_group(dataset / "found" / "a.zarr", mode="r")
    assert root["ink/0"].shape == (9, 12, 14)
    assert root.attrs["volumen"]["recipe"]["windows"]["overlap"] == 0.25
    assert not workflow.check_properties()
    run(
        "evaluate.yaml",
        dataset_dir=str(dataset / "data"),
        predictions=str(dataset / "found"),
        output_dir=str(dataset / "report"),
    )
    assert 0 <= json.loads((dataset / "report" / "metrics.json").read_text())["mean"]["ink/dice"] <= 1
