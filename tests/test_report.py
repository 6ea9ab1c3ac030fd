"""What a run tells of itself before it begins."""

from __future__ import annotations

import pytest
import torch
from data_folders import shells, write_tiff_folder

from volumen.config.log import log_experiment, without_effect
from volumen.config.manager import ConfigManager
from volumen.run import finish_run, start_run
from volumen.time_budget.candidates import candidates
from volumen.time_budget.measure import measure

LATE = {"targets": {"ink": {"losses": [{"name": "SoftDiceLoss", "start_epoch": 9}]}}}


@pytest.mark.parametrize(("sections", "told"), [
    ({}, []),
    ({"tr_setup": {"tr_val_split": 1.0}}, []),
    (
        {"tr_setup": {"tr_val_split": 1.0}, "tr_config": {"early_stopping_patience": 3}},
        ["tr_config.early_stopping_patience: has no effect without validation (tr_val_split 1)"],
    ),
    (
        {"dataset_config": {"class_oversampling": 0.5}},
        ["dataset_config.class_oversampling: has no effect, as there is one class and every valid patch holds it"],
    ),
    (
        {"dataset_config": {"bg_sampling_enabled": True, "skip_patch_validation": True}},
        ["dataset_config.bg_sampling_enabled: has no effect with skip_patch_validation, which reads no labels"],
    ),
    (
        {"model_config": {"features_per_stage": [2, 2, 2, 2]}},
        ["model_config: 2 of 4 stages pool nothing, as a patch of 8x8x8 is too small for them; 2 stages are enough"],
    ),
    ({"model_config": {"dropout_p": 0.5}}, ["model_config.dropout_p: has no effect without dropout_op"]),
    (
        {"dataset_config": {"targets": {"ink": {"weight": 0}}}},
        ["target ink: is never trained, as its weight is 0"],
    ),
    (
        {"tr_config": {"max_epoch": 9}, "dataset_config": LATE},
        ["target ink: is never trained, as no loss of it begins or has a weight"],
    ),
    ({"tr_config": {"max_epoch": 10}, "dataset_config": LATE}, []),
])  # fmt: skip
def test_what_has_no_effect_is_told(tmp_path, sections, told):
    write_tiff_folder(tmp_path, {"a": {"ink": shells((24, 24, 24))}})
    sections = {**sections, "tr_config": {"patch_size": [8, 8, 8], **sections.get("tr_config", {})}}
    config = ConfigManager(**sections, dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert without_effect(config) == told


def test_the_device_and_the_length_of_a_run_are_told(tmp_path, caplog):
    write_tiff_folder(tmp_path, {"a": {"ink": shells((24, 24, 24))}})
    losses = [{"name": "SoftDiceLoss"}, {"name": "BCEWithLogitsLoss", "weight": 0.5}]
    config = ConfigManager(
        tr_config={"patch_size": [8, 8, 8], "amp": "off", "max_epoch": 1, "max_steps_per_epoch": 4},
        dataset_config={"targets": {"ink": {"losses": losses}}},
        dataset_dir=str(tmp_path),
        device="cpu",
    )
    with caplog.at_level("INFO"):
        log_experiment(config)
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        line.startswith("device: cpu (") and line.endswith("float32; 1 epoch of 4 steps, batch 2")
        for line in lines
    )
    assert any(line.endswith("weight 1, SoftDiceLoss + 0.5 x BCEWithLogitsLoss") for line in lines)


@pytest.mark.parametrize("deterministic", [True, False])
def test_convolutions_are_set_up_as_asked_before_a_run_and_before_its_budget_is_measured(
    tmp_path, monkeypatch, deterministic
):
    asked = []
    monkeypatch.setattr("volumen.utils.device.time_convolutions", lambda *given: asked.append(given))
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda wanted: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which a run may set
    monkeypatch.setattr("volumen.time_budget.measure._measure", lambda config, enough: None)
    write_tiff_folder(tmp_path, {"a": {"ink": shells((24, 24, 24))}})
    config = ConfigManager(
        tr_setup={"deterministic": deterministic},
        tr_config={"patch_size": [8, 8, 8]},
        dataset_dir=str(tmp_path),
        device="cpu",
    )
    try:
        start_run(config)
    finally:
        finish_run(config)
    assert asked == [(torch.device("cpu"), deterministic)]
    measure(config, candidates(config)[0])
    assert asked[1:] == asked[:1]
