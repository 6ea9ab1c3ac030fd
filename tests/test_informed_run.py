"""Trainings with few labelled slices: their default validity, what they learn from, and what `inspect` says of it."""

from __future__ import annotations

import csv
import logging

import numpy as np
import pytest
import yaml
from data_folders import shells, write_tiff_folder

from volumen.cli.main import main
from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.derived import registry
from volumen.derived.registry import DerivedTask
from volumen.run import run_bundle
from volumen.utils.errors import VolumenError

TASKS = {
    "distance": {"type": "distance_transform", "losses": [{"name": "SignedDistanceLoss"}]},
    "normals": {"type": "surface_normals", "losses": [{"name": "CosineSimilarityLoss"}]},
    "shape": {"type": "local_shape_descriptors", "sigma": 1.0, "losses": [{"name": "MSELoss"}]},
    "middle": {"type": "skeleton", "losses": [{"name": "BCEWithLogitsLoss"}]},
}
SECTIONS = {
    "tr_config": {
        "patch_size": [16, 16, 16],
        "batch_size": 2,
        "max_epoch": 1,
        "max_steps_per_epoch": 3,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
        "amp": "off",
    },
    "model_config": {"features_per_stage": [4, 8], "separate_decoders": False},
    "dataset_config": {"min_labeled_ratio": 0.01},
    "auxiliary_tasks": {name: {**task, "source_target": "surface"} for name, task in TASKS.items()},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same labels, whole and in slabs of 4 slices in 12."""
    root = tmp_path_factory.mktemp("informed")
    label = shells((36, 32, 64))
    mask = np.zeros_like(label)
    mask[np.arange(36) % 12 < 4] = 1
    return {
        "whole": write_tiff_folder(root / "whole", {"scroll": {"surface": label}}),
        "slabs": write_tiff_folder(
            root / "slabs", {"scroll": {"surface": label * mask}}, masks={"scroll": {"surface": mask}}
        ),
    }


def configured(data, output, **changes):
    sections = merge(merge(shipped_sections(), SECTIONS), changes)
    return ConfigManager(**sections, dataset_dir=str(data), output_dir=str(output), device="cpu")


def tasks_with(name, **changes):
    tasks = SECTIONS["auxiliary_tasks"]
    return {"auxiliary_tasks": {**tasks, name: {**tasks.get(name, {"source_target": "surface"}), **changes}}}


def test_masked_labels_are_informed_by_default_and_whole_ones_exact(folders, tmp_path):
    assert set(configured(folders["whole"], tmp_path).validity.values()) == {"exact"}
    assert set(configured(folders["slabs"], tmp_path).validity.values()) == {"informed"}
    ignoring = {"dataset_config": {"targets": {"surface": {"ignore_label": 2}}}}
    assert set(configured(folders["whole"], tmp_path, **ignoring).validity.values()) == {"informed"}
    exact = configured(folders["slabs"], tmp_path, tr_config={"validity": "exact"})
    assert set(exact.validity.values()) == {"exact"}
    one = configured(folders["slabs"], tmp_path, **tasks_with("normals", validity="exact"))
    assert one.validity == {
        "distance": "informed",
        "normals": "exact",
        "shape": "informed",
        "middle": "informed",
    }
    assert one.derived_tasks["normals"]["validity"] == "exact"
    assert one.targets["normals"].snapshot()["validity"] == "exact"
    assert one.loss_sections["surface"]["validity"] is None


@pytest.mark.parametrize(
    "changes",
    [{"tr_config": {"validity": "completed"}}, tasks_with("normals", validity="completed")],
)
def test_completed_is_refused_clearly(folders, tmp_path, changes):
    with pytest.raises(VolumenError, match="not available in this version"):
        _ = configured(folders["slabs"], tmp_path, **changes).derived_tasks


class Plain(DerivedTask):
    type_name = "plain_of_test"

    def derive(self, source, params):
        known = source.known()
        return known[None].astype(np.float32), known[None]


def test_a_type_of_a_user_that_knows_no_bounds_is_exact_and_that_is_said_once(
    folders, tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(registry._TASKS, "plain_of_test", Plain())
    changes = tasks_with("own", type="plain_of_test", losses=[{"name": "L1Loss"}])
    config = configured(folders["slabs"], tmp_path, **changes)
    with caplog.at_level(logging.INFO):
        assert [config.validity["own"], config.derived_tasks["own"]["validity"]] == ["exact", "exact"]
        _ = config.loss_sections, config.worker_tasks
    assert len([r for r in caplog.records if "plain_of_test" in r.getMessage()]) == 1


@pytest.mark.parametrize("on_device", [False, True])
def test_every_head_learns_in_slabs_in_which_exact_values_are_few(folders, tmp_path, on_device, caplog):
    changes = {"tr_config": {"derive_on_device": on_device}}
    with caplog.at_level(logging.WARNING):
        found = losses_of(folders["slabs"], tmp_path / "informed", **changes)
    assert not [r for r in caplog.records if "its head learned nothing" in r.getMessage()]
    assert all(found[name] > 0 for name in TASKS)
    exact = merge(changes, {"tr_config": {"validity": "exact"}})
    with caplog.at_level(logging.WARNING):
        losses_of(folders["slabs"], tmp_path / "exact", **exact)
    nothing = [r.getMessage() for r in caplog.records if "its head learned nothing" in r.getMessage()]
    assert any("target normals" in line for line in nothing)


def losses_of(data, output, **changes):
    config = configured(data, output, **changes)
    run_bundle("train.yaml", (), {"config": config})
    with (config.run_dir / "metrics.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    return {
        name: float(row[key]) for name in TASKS for key in row if key.endswith(f"loss/{name}") and row[key]
    }


def test_inspect_says_how_many_labelled_voxels_teach_each_head(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(SECTIONS))
    for validity in ("auto", "exact"):
        words = ["inspect", str(folders["slabs"]), "--config-path", str(tmp_path / "my.yaml")]
        assert main([*words, "--set", f"tr_config.validity={validity}"]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if "surface_normals" in line]
        assert len(rows) == 1
        assert ("informed" if validity == "auto" else "exact") in rows[0]
        numbers = [int(word[:-1]) for word in rows[0].split() if word.endswith("%")]
        assert numbers[1] < 5
        assert numbers[0] >= 60 if validity == "auto" else numbers[0] == numbers[1]
