"""MONAI's federated learning clients run the bundle: several rounds, models, statistics of the data."""

from __future__ import annotations

import csv
import shutil
import warnings

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT
from data_folders import image_of, shells
from monai.fl.client import MonaiAlgo, MonaiAlgoStats
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType
from monai.fl.utils.exchange_object import ExchangeObject

CONFIG = "configs/train.yaml"
SETTINGS = {
    "device_name": "cpu",
    "tr_config#patch_size": [16, 16, 16],
    "tr_config#max_epoch": 4,
    "tr_config#max_steps_per_epoch": 2,
    "tr_config#max_val_steps_per_epoch": 2,
    "tr_config#num_dataloader_workers": 0,
    "tr_config#amp": "off",
    "model_config#features_per_stage": [4, 8],
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def bundle(tmp_path):
    """A copy of the configs where a federation would put them; the code is the installed one."""
    folder = tmp_path / "app" / "bundle"
    shutil.copytree(ROOT / "bundle" / "configs", folder / "configs")
    return folder


def nifti_folder(root, seeds):
    """Two images of known statistics: the foreground is 180 and the background 60, before noise."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for seed in seeds:
        label = shells((20, 24, 32))
        image = image_of(label, seed).astype(np.int16)
        for part, name, array in (("images", f"v{seed}", image), ("labels", f"v{seed}_sheet", label)):
            nibabel.save(
                nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), root / part / f"{name}.nii.gz"
            )
    return root


def client(bundle, data, out, **more) -> MonaiAlgo:
    given = {**SETTINGS, "dataset_dir": str(data), "output_dir": str(out)}
    algo = MonaiAlgo(
        bundle.name,
        config_train_filename=CONFIG,
        config_evaluate_filename=CONFIG,
        train_kwargs=dict(given),
        eval_kwargs=dict(given),
        best_model_filepath=str(out / "model" / "model_best.pth"),
        final_model_filepath=str(out / "model" / "model_final.pth"),
        send_weight_diff=False,
        **more,
    )
    algo.initialize({ExtraItems.CLIENT_NAME: out.name, ExtraItems.APP_ROOT: str(bundle.parent)})
    return algo


def averaged(updates):
    return {
        name: torch.stack(
            [torch.as_tensor(update.weights[name], dtype=torch.float32) for update in updates]
        ).mean(0)
        for name in updates[0].weights
    }


def test_two_clients_train_three_rounds_of_federated_averaging(bundle, tmp_path):
    clients = [
        client(bundle, nifti_folder(tmp_path / name, seeds), tmp_path / f"out_{name}")
        for name, seeds in (("a", (1, 2)), ("b", (3, 4)))
    ]
    # On a CPU the client hands out its own tensors.
    shared = {name: weight.clone() for name, weight in clients[0].get_weights().weights.items()}
    for number in (1, 2, 3):
        for one in clients:
            before = one.evaluate(ExchangeObject(weights=shared)).metrics
            assert "mean_dice" in before
            one.train(ExchangeObject(weights=shared))
            assert one.trainer.state.epoch == number
        updates = [one.get_weights() for one in clients]
        assert all(update.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == 2 for update in updates)
        assert any(not torch.equal(updates[0].weights[name], shared[name]) for name in shared)
        shared = averaged(updates)
    for one in clients:
        with (tmp_path / one.client_name / "model" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        # The rate falls over the four epochs of tr_config, not anew in every round.
        assert len({row["learning_rate"] for row in rows}) == 3
        final = one.get_weights({ExtraItems.MODEL_TYPE: ModelType.FINAL_MODEL}).weights
        own = one.get_weights().weights
        assert final.keys() == own.keys()
        assert all(torch.equal(final[name], own[name]) for name in own)
        best = one.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
        assert best.keys() == own.keys()
        one.finalize()


def test_each_round_starts_from_the_weights_of_the_server(bundle, tmp_path):
    """With a learning rate of 0 a round returns what it got."""
    algo = client(bundle, nifti_folder(tmp_path / "a", (1, 2)), tmp_path / "out")
    for group in algo.trainer.optimizer.param_groups:
        group["lr"] = 0.0
    algo.train_workflow.parser.get_parsed_content("scheduler").base_lrs = [0.0] * len(
        algo.trainer.optimizer.param_groups
    )
    own = {name: weight.clone() for name, weight in algo.get_weights().weights.items()}
    for value in (0.1, 0.2):
        server = {name: torch.full_like(weight, value) for name, weight in own.items()}
        algo.train(ExchangeObject(weights=server))
        found = algo.get_weights().weights
        assert all(torch.equal(found[name], server[name]) for name in server)
    algo.finalize()


def test_the_statistics_of_the_data_are_those_of_the_images(bundle, tmp_path):
    data = nifti_folder(tmp_path / "a", (1, 2))
    from monai.bundle import ConfigWorkflow

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workflow = ConfigWorkflow(
            str(bundle / CONFIG), meta_file=str(bundle / "configs" / "metadata.json"), logging_file=False,
            workflow_type="train", dataset_dir=str(data), output_dir=str(tmp_path / "out"), **SETTINGS,
        )  # fmt: skip
    workflow.initialize()
    listed = [*workflow.train_dataset_data, *workflow.val_dataset_data]
    assert sorted(item["image"] for item in listed) == [str(data / "images" / f"v{n}.nii.gz") for n in (1, 2)]
    assert sorted(item["label"] for item in listed) == [
        str(data / "labels" / f"v{n}_sheet.nii.gz") for n in (1, 2)
    ]

    stats = MonaiAlgoStats(bundle.name, workflow=workflow)
    stats.initialize({ExtraItems.CLIENT_NAME: "a", ExtraItems.APP_ROOT: str(bundle.parent)})
    found = stats.get_data_stats({FlStatistics.HIST_BINS: 10, FlStatistics.HIST_RANGE: [0, 300]}).statistics
    assert found["train"][FlStatistics.DATA_COUNT] == found["eval"][FlStatistics.DATA_COUNT] == 1
    assert found["train"][FlStatistics.FAIL_COUNT] == found["eval"][FlStatistics.FAIL_COUNT] == 0
    (case,) = workflow.train_dataset_data
    image = np.asarray(nibabel.load(case["image"]).dataobj)
    summary = found["train"][FlStatistics.DATA_STATS]["image_stats"]
    assert summary["intensity"]["mean"] == pytest.approx(image.mean(), abs=0.01)
    assert summary["shape"]["mean"] == [pytest.approx(size) for size in image.shape]
