"""Losses of a label that read a field derived from it, which the network does not predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from data_folders import shells, write_tiff_folder
from scipy import ndimage

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.losses.field_weighted import FieldWeightedLoss
from volumen.losses.multitask import MultiTaskLoss
from volumen.losses.topology import SkeletonRecallLoss
from volumen.run import run_bundle
from volumen.utils.errors import VolumenError


def _batch(channels: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    pred = torch.randn(2, channels, 9, 10, 11, generator=rng, dtype=torch.float64)
    target = (torch.rand(2, 1, 9, 10, 11, generator=rng) > 0.4).double()
    mask = torch.rand(2, 1, 9, 10, 11, generator=rng) > 0.2
    field = (torch.rand(2, 1, 9, 10, 11, generator=rng) > 0.9).double()
    return pred, target, mask, field


@pytest.mark.parametrize("radius", [0, 1])
def test_skeleton_recall_of_a_field_is_that_of_the_formula(radius):
    pred, target, mask, field = _batch()
    loss = SkeletonRecallLoss(radius=radius, smooth=0.5, kind="binary")
    expected = []
    for p, t, m, k in zip(*(x.numpy()[:, 0] for x in (pred.sigmoid(), target, mask, field)), strict=True):
        tube = (k > 0) & m
        if radius:
            tube = ndimage.maximum_filter(tube, 3, mode="constant") & m
        tube = tube & (t > 0)
        expected.append(1 - (p[tube].sum() + 0.5) / (tube.sum() + 0.5))
    assert loss(pred, target, mask, field=field).item() == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_the_weighted_loss_is_the_weighted_mean(kind):
    pred, target, mask, field = _batch(3 if kind == "multiclass" else 1)
    if kind == "multiclass":
        values = F.cross_entropy(pred, target[:, 0].long(), reduction="none")[:, None]
    else:
        values = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    weights = (1 + 7 * field) * mask
    loss = FieldWeightedLoss(gain=7.0, kind=kind)
    expected = (weights * values).sum() / weights.sum()
    assert loss(pred, target, mask, field=field).item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss(pred, target, mask).item() == pytest.approx(values[mask].mean().item(), rel=1e-9)


def test_an_entry_gets_the_field_at_full_resolution_and_zero_where_it_is_invalid():
    pred, target, mask, field = _batch()
    entry = {"name": "FieldWeightedLoss", "kwargs": {"gain": 3.0}, "field": "crit"}
    loss = MultiTaskLoss({"ink": {"kind": "binary", "losses": [entry], "out_channels": 1}})
    valid = torch.rand(field.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    spoiled = torch.where(valid, field, torch.nan)
    batch = {"ink": target, "ink_mask": mask, "crit": spoiled, "crit_mask": valid}
    coarse = torch.zeros(2, 1, 5, 5, 6, dtype=torch.float64)
    found = loss({"ink": [pred, coarse]}, batch)
    expected = FieldWeightedLoss(3.0, kind="binary")(pred, target, mask, field=(field * valid).float())
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_field_that_cannot_be_read_is_refused():
    def build(name: str) -> MultiTaskLoss:
        entry = {"name": name, "field": "crit"}
        return MultiTaskLoss({"ink": {"kind": "binary", "losses": [entry], "out_channels": 1}})

    with pytest.raises(VolumenError, match=r"losses\[0\].field.*reads no field.*found crit"):
        build("BCEWithLogitsLoss")
    loss, outputs = build("FieldWeightedLoss"), {"ink": torch.zeros(1, 1, 4, 4, requires_grad=True)}
    with pytest.raises(VolumenError, match="holds no such field"):
        loss(outputs, {"ink": torch.zeros(1, 1, 4, 4)})


SECTIONS = {
    "tr_config": {
        "patch_size": [16, 16, 16],
        "max_epoch": 1,
        "max_steps_per_epoch": 3,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
        "amp": "off",
    },
    "model_config": {"features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1]},
    "dataset_config": {
        "targets": {
            "surface": {
                "losses": [
                    {"name": "FieldWeightedLoss", "field": "crit"},
                    {"name": "SkeletonRecallLoss", "field": "middle"},
                ]
            }
        }
    },
    "auxiliary_tasks": {
        "crit": {"type": "critical", "source_target": "surface", "head": False},
        "middle": {"type": "skeleton", "source_target": "surface", "head": False},
    },
}


def _configured(data: Path, output: Path, **changes) -> ConfigManager:
    sections = merge(merge(shipped_sections(), SECTIONS), changes)
    return ConfigManager(**sections, dataset_dir=str(data), output_dir=str(output), device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("field") / "data"
    return write_tiff_folder(folder, {"scroll": {"surface": shells((24, 24, 64))}})


def test_a_training_derives_the_fields_and_the_network_has_no_head_for_them(data, tmp_path):
    weights = {}
    # Not AdamW: it makes whole steps of the rounding of gradients that are 0 in theory (biases before normalisation).
    training = {"optimizer": "SGD", "initial_lr": 0.5}
    for where in (False, True):
        config = _configured(data, tmp_path / str(where), tr_config={**training, "derive_on_device": where})
        assert set(config.derived_tasks) == {"crit", "middle"}
        assert set(config.network_config["heads"]) == {"surface"}
        run_bundle("train.yaml", (), {"config": config})
        state = torch.load(config.run_dir / "model_1.pth", weights_only=True)
        weights[where] = state["model"]
    # Workers and device derive the same fields.
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, rtol=1e-3, atol=1e-4)
    snapshot = yaml.safe_load(next((tmp_path / "False").rglob("*_config.yaml")).read_text())
    assert snapshot["auxiliary_tasks"]["crit"]["head"] is False
    again = ConfigManager(**snapshot, dataset_dir=str(data), output_dir=str(tmp_path / "again"), device="cpu")
    assert again.derived_tasks == config.derived_tasks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auxiliary_tasks": {"more": {"type": "critical", "source_target": "surface", "head": False}}},
            r"auxiliary_tasks.more.*a loss of its source that reads it",
        ),
        (
            {
                "dataset_config": {
                    "targets": {"surface": {"losses": [{"name": "FieldWeightedLoss", "field": "crib"}]}}
                }
            },
            r"losses\[0\].field.*derived from surface: crit, middle.*found crib",
        ),
        (
            {
                "auxiliary_tasks": {
                    "crit": {**SECTIONS["auxiliary_tasks"]["crit"], "losses": [{"name": "SoftDiceLoss"}]}
                }
            },
            r"auxiliary_tasks.crit.losses.*head: false leaves nothing to train",
        ),
    ],
)
def test_fields_without_meaning_are_refused(data, tmp_path, changes, message):
    with pytest.raises(VolumenError, match=message):
        _ = _configured(data, tmp_path, **changes).targets
