"""The bundle's inference and evaluation configs run as MONAI runs them."""

from __future__ import annotations

import json
import os
import subprocess
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


def test_several_processes_score_what_one_does(tmp_path):
    """Three cases over two processes that talk by gloo: an uneven share, united on the first."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        truth = rng.integers(0, 2, (6, 10, 12), dtype=np.uint8)
        guess = np.where(rng.random(truth.shape) < 0.2, 1 - truth, truth).astype(np.uint8)
        for folder, values in (("data/labels", truth), ("found", guess)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(tmp_path / folder / f"{name}_ink.tif", values, metadata={"axes": "ZYX"})
    given = {"dataset_dir": str(tmp_path / "data"), "predictions": str(tmp_path / "found")}
    run("evaluate.yaml", **given, output_dir=str(tmp_path / "one"))

    configs = [str(CONFIGS / name) for name in ("evaluate.yaml", "multi_gpu_evaluate.yaml")]
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "monai.bundle", "run", "--config_file", str(configs), *words, "--output_dir", str(tmp_path / "two")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert set(one["cases"]) == {"a", "b", "c"}
    assert one == two
    assert (tmp_path / "one" / "metrics.csv").read_text() == (tmp_path / "two" / "metrics.csv").read_text()
    assert done.stderr.count("report.html") <= 1
