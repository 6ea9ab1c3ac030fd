"""A head without valid voxels in validation has no scores and no loss, and one warning names the cause."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import tifffile
import yaml

from volumen.cli.main import main
from volumen.cli.train import shipped_sections
from volumen.config.experiment_file import merge, read_experiment
from volumen.config.manager import ConfigManager
from volumen.data.sampling.split import Split
from volumen.handlers.records.logs import validation_line
from volumen.phantom.volume import write_phantom
from volumen.time_budget.measure import training_objects
from volumen.utils.boxes import whole_box
from volumen.utils.bundle_root import configs_dir

LOSS = [{"name": "SmoothL1Loss"}]


def write(folder, labels, masks):
    """Write two volumes with two targets; return the folder."""
    rng = np.random.default_rng(0)
    for number in range(2):
        image = rng.integers(0, 255, (16, 32, 32), dtype=np.uint8)
        for part, name, values in (
            ("images", f"v{number}", image),
            ("labels", f"v{number}_ink", labels[number]),
            ("labels", f"v{number}_pen", (image > 100).astype(np.uint8)),
            ("masks", f"v{number}_ink", masks[number]),
        ):
            (folder / part).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(folder / part / f"{name}.tif", values, metadata={"axes": "ZYX"})
    return folder


def train(data, out, tasks=()):
    """Train two epochs; return the rows of metrics.csv."""
    settings = {
        "tr_config": {"max_epoch": 2, "max_steps_per_epoch": 2, "patch_size": [16, 16, 16], "amp": "off"},
        "model_config": {"features_per_stage": [4, 8]},
        "auxiliary_tasks": dict(tasks),
    }
    out.mkdir()
    (out / "e.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", "-i", str(data), "-o", str(out), "--config-path", str(out / "e.yaml"), "--quiet"]
    assert main([*command, "--workers", "0", "--device", "cpu"]) == 0
    return list(csv.DictReader((out / "model" / "metrics.csv").open()))


@pytest.mark.parametrize("on_device", [True, False])
def test_a_head_without_a_valid_voxel_is_empty_and_warned_of_once(tmp_path, caplog, on_device):
    ones = np.ones((16, 32, 32), np.uint8)
    data = write(tmp_path / "data", [ones, ones], [ones, 0 * ones])
    settings = {
        "tr_config": {
            "max_epoch": 2,
            "max_steps_per_epoch": 2,
            "patch_size": [16, 16, 16],
            "num_dataloader_workers": 0,
            "derive_on_device": on_device,
        },
        "model_config": {"features_per_stage": [4, 8]},
        "auxiliary_tasks": {"depth": {"type": "distance_transform", "source_target": "ink", "losses": LOSS}},
    }
    sections = merge(shipped_sections(), settings)
    places = {"dataset_dir": str(data), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    config = ConfigManager(**sections, **places)
    box = [whole_box(ones.shape)]
    config = config.variant(split=Split({"v0": box}, {"v1": box}, 0.5, 0))
    training_objects(config).get_parsed_content("train#trainer").run()
    rows = list(csv.DictReader((tmp_path / "out" / "model" / "metrics.csv").open()))
    assert len(rows) == 2
    for row in rows:
        measured = {name for name, value in row.items() if name.startswith("val/") and value}
        assert not [name for name in measured if "ink" in name or "depth" in name]
        assert {"val/pen/dice", "val/mean_dice", "val/loss/pen", "val/loss"} <= measured
        assert row["val/mean_dice"] == row["val/pen/dice"]
        assert float(row["loss/ink"]) > 0
    warnings = [text for text in caplog.messages if "has no valid voxel" in text]
    assert sorted(text.split(" has")[0] for text in warnings) == ["validation: depth", "validation: ink"]
    assert any("no voxel of it is known in 1 block, all of the validation part" in text for text in warnings)
    assert any("no voxel of ink, which it is derived from, is known" in text for text in warnings)


@pytest.mark.parametrize(
    ("validity", "why"),
    [("exact", "it is derived from ink"), ("informed", "near unknown voxels of ink it learns from bounds")],
)
def test_the_warning_names_the_cause(tmp_path, capsys, validity, why):
    """Ink is known in one plane of each volume, which is too thin for exact derived targets."""
    label = np.zeros((16, 32, 32), np.uint8)
    label[:, :16] = 1
    mask = np.zeros_like(label)
    mask[8] = 1
    data = write(tmp_path / "data", [label, label], [mask, mask])
    tasks = {
        "normals": {
            "type": "surface_normals",
            "source_target": "ink",
            "validity": validity,
            "losses": [{"name": "CosineSimilarityLoss"}],
        }
    }
    rows = train(data, tmp_path / "out", tasks)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "has no valid voxel" in line]
    assert len(warnings) == 1
    assert f"validation: normals has no valid voxel, so it has no scores: {why}" in warnings[0]
    for row in rows:
        measured = {name for name, value in row.items() if "normals" in name and value}
        assert not [name for name in measured if name.startswith("val/") and "/loss/" not in name]
        assert bool(measured) == (validity == "informed")
        assert float(row["val/ink/dice"]) >= 0
    assert "normals" not in validation_line({"val/loss": 1.0})


@pytest.mark.parametrize("size", [96, pytest.param(160, marks=pytest.mark.slow)])
def test_every_head_of_the_demo_is_validated(tmp_path, size):
    write_phantom(tmp_path / "data", (size,) * 3)
    sections = merge(shipped_sections(), read_experiment(str(configs_dir() / "recipes" / "demo.yaml")))
    config = ConfigManager(**sections, dataset_dir=str(tmp_path / "data"), device="cpu")
    blocks = training_objects(config).get_parsed_content("validate#dataset")
    valid = dict.fromkeys(config.targets, 0)
    for number in range(len(blocks)):
        sample = blocks[number]
        for name in valid:
            valid[name] += int(sample[f"{name}_mask"].sum())
    assert min(valid.values()) > 0
