"""A fusion in a training, in its checkpoints, in predictions, and by `volumen tune --fuse`."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from data_folders import shells, write_tiff_folder
from scipy import ndimage

from volumen.cli.main import main
from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.fusions import fusible_heads
from volumen.config.manager import ConfigManager
from volumen.data.formats.opening import open_volume
from volumen.derived.derivation import derive_target
from volumen.handlers.fusion import FitFusion
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.predict import predict
from volumen.inference.predictor import load_predictor, predict_array
from volumen.inference.request import PredictRequest
from volumen.run import run_bundle
from volumen.utils.errors import VolumenError

SECTIONS = {
    "tr_config": {
        "patch_size": [16, 16, 16],
        "max_epoch": 2,
        "max_steps_per_epoch": 8,
        "num_dataloader_workers": 0,
        "amp": "off",
        "initial_lr": 0.01,
    },
    "model_config": {"features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1], "separate_decoders": False},
    "dataset_config": {"targets": {"surface": {"fuse": ["distance"]}}},
    "auxiliary_tasks": {
        "distance": {
            "type": "distance_transform",
            "source_target": "surface",
            "losses": [{"name": "SignedDistanceLoss"}],
        },
        "normals": {
            "type": "surface_normals",
            "source_target": "surface",
            "losses": [{"name": "MaskedMSELoss"}],
        },
    },
}


def configured(data: Path, output: Path, **changes) -> ConfigManager:
    sections = merge(merge(shipped_sections(), SECTIONS), changes)
    return ConfigManager(**sections, dataset_dir=str(data), output_dir=str(output), device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fusion")
    data = write_tiff_folder(folder / "data", {"scroll": {"surface": shells((24, 24, 64))}})
    config = configured(data, folder / "out")
    run_bundle("train.yaml", (), {"config": config})
    return data, config.run_dir


def test_a_checkpoint_holds_the_rule_and_predictions_follow_it(trained, tmp_path):
    data, run = trained
    state = torch.load(run / "model_2.pth", weights_only=True)
    rule = state["model_config"]["fusion"]["surface"]
    (own,), (distance,) = rule["weights"]["surface"], rule["weights"]["distance"]
    assert own >= 0
    assert distance <= 0  # a distance is negative inside
    assert own - distance > 0
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert all(0 <= float(row["val/surface/fused_dice"]) <= 1 for row in rows)
    image = tifffile.imread(next((data / "images").glob("*.tif")))[None, :16, :20, :24]
    fused = load_predictor(run / "model_2.pth")
    assert fused.fused == {"surface": ("surface", "distance")}
    found, alone = predict_array(fused, image), predict_array(fused.unfused(), image)
    p = alone["surface"].astype(np.float64)
    logit = rule["bias"] + own * np.log(p / (1 - p)) + distance * alone["distance"]
    np.testing.assert_allclose(found["surface"], 1 / (1 + np.exp(-logit)), atol=1e-4)
    tifffile.imwrite(tmp_path / "image.tif", image[0], metadata={"axes": "ZYX"})
    for fuse, expected in ((True, found), (False, alone)):
        output = tmp_path / f"{fuse}.zarr"
        predict(
            PredictRequest(
                str(tmp_path / "image.tif"),
                str(run / "model_2.pth"),
                str(output),
                targets=("surface",),
                dtype="float32",
                amp="off",
                fuse=fuse,
            )
        )
        np.testing.assert_allclose(_read(output, "surface"), expected["surface"], atol=1e-4)


def _read(output: Path, target: str) -> np.ndarray:
    volume = open_volume(str(find_target(output, target)))
    return volume.read(tuple(slice(0, n) for n in volume.shape))


def test_a_resumed_run_takes_its_checkpoint_with_a_rule(trained, tmp_path):
    data, run = trained
    config = configured(
        data, run.parent, tr_setup={"resume": True}, tr_config={"max_epoch": 3, "scheduler": "constant"}
    )
    run_bundle("train.yaml", (), {"config": config})
    state = torch.load(run / "model_3.pth", weights_only=True)
    assert state["model_config"]["fusion"]["surface"]["weights"].keys() == {"surface", "distance"}


def test_a_metric_of_a_fusion_may_choose_the_best_epoch(trained, tmp_path):
    data, _ = trained
    config = configured(data, tmp_path, tr_config={"key_metric": "val/surface/fused_dice"})
    assert {"surface/fused_dice", "surface/fused_gain"} <= set(config.validation_names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_config": {"targets": {"surface": {"fuse": ["normals"]}}}},
            r"surface.fuse.*heads that speak for surface: distance.*found normals",
        ),
        ({"dataset_config": {"targets": {"surface": {"fuse": ["nose"]}}}}, r"nose, which is no derived head"),
        ({"tr_setup": {"tr_val_split": 1.0}}, r"surface.fuse.*a validation part.*tr_val_split 1"),
    ],
)
def test_a_fusion_without_meaning_is_refused(trained, tmp_path, changes, message):
    config = configured(trained[0], tmp_path, **changes)
    with pytest.raises(VolumenError, match=message):
        _ = config.always_fused


DISTANCE = {"type": "distance_transform", "source_target": "ink"}


@pytest.mark.parametrize(
    ("task", "signs"),
    [
        (DISTANCE, (-1,)),
        ({**DISTANCE, "distance_type": "inside"}, (1,)),
        ({**DISTANCE, "distance_type": "outside"}, (-1,)),
        ({"type": "affinities", "source_target": "ink", "offsets": [[-1, 0], [0, -9]]}, (1, 1)),
        ({"type": "skeleton", "source_target": "ink"}, (1,)),
        ({"type": "boundary", "source_target": "ink", "side": "inner"}, (1,)),
        ({"type": "boundary", "source_target": "ink", "side": "outer"}, (-1,)),
        ({"type": "boundary", "source_target": "ink"}, None),
        ({"type": "surface_normals", "source_target": "ink"}, None),
        ({**DISTANCE, "source_target": "cells"}, None),
        ({**DISTANCE, "classes": [2]}, None),
    ],
)
def test_signs_follow_from_the_definitions_of_the_tasks(task, signs):
    heads = fusible_heads(
        "ink", "auto", kind="binary", instances=None, tasks={"t": task}, ndim=2, where="fuse"
    )
    assert heads == {"ink": (1,)} | ({} if signs is None else {"t": signs})


def test_every_evidence_is_larger_inside_the_label():
    blob = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 40)), 3)[None] > 0.02
    for task in (
        DISTANCE,
        {**DISTANCE, "distance_type": "inside"},
        {**DISTANCE, "distance_type": "outside"},
        {"type": "affinities", "source_target": "ink"},
        {"type": "skeleton", "source_target": "ink"},
        {"type": "boundary", "source_target": "ink", "side": "inner"},
        {"type": "boundary", "source_target": "ink", "side": "outer"},
    ):
        heads = fusible_heads(
            "ink", "auto", kind="binary", instances=None, tasks={"t": task}, ndim=2, where="fuse"
        )
        params = {key: value for key, value in task.items() if key not in ("type", "source_target")}
        values, valid = derive_target(task["type"], blob.astype(np.uint8), **params)
        for sign, channel in zip(heads["t"], values, strict=True):
            inside, outside = blob[0] & valid[0], ~blob[0] & valid[0]
            assert sign * channel[inside].mean() > sign * channel[outside].mean(), task


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "distance"])
def test_other_kinds_than_binary_are_refused(kind):
    with pytest.raises(VolumenError, match="only a binary target"):
        fusible_heads("ink", "auto", kind=kind, instances=None, tasks={}, ndim=3, where="fuse")


def _engine(blocks: int, side: int = 32, known: float = 1.0) -> tuple[SimpleNamespace, list]:
    """An evaluator's state, and outputs of two heads of which the second knows more."""
    rng = np.random.default_rng(0)
    outputs = []
    for number in range(blocks):
        truth = rng.random((1, 1, side, side, side)) < 0.3
        sign = np.where(truth, 1.0, -1.0)
        pred = {
            "ink": torch.from_numpy(sign + 2 * rng.normal(size=sign.shape)).float(),
            "dist": torch.from_numpy(-sign + 1.5 * rng.normal(size=sign.shape)).float(),
        }
        mask = torch.from_numpy(rng.random(truth.shape) < known)
        label = {"ink": torch.from_numpy(truth).float(), "ink_mask": mask}
        batch = {
            "volume_name": ["a"],
            "start": torch.tensor([[number * side, 0, 0]]),
            "block_weight": torch.tensor([1.0], dtype=torch.float64),
        }
        outputs.append((batch, {"pred": pred, "label": label}))
    return SimpleNamespace(state=SimpleNamespace(metrics={}, epoch=4)), outputs


@pytest.mark.parametrize("blocks", [1, 4])
def test_the_handler_fits_on_known_voxels_in_two_halves(blocks):
    handler = FitFusion({"ink": {"ink": (1,), "dist": (-1,)}})
    engine, outputs = _engine(blocks, known=0.5)
    handler._clear(engine)
    handler._half = {("a", (32 * n, 0, 0)): int(2 * n >= blocks) for n in range(blocks)} if blocks > 1 else {}
    for engine.state.batch, engine.state.output in outputs:
        handler._add(engine)
    counts = [len(rows) for rows in handler._samples["ink"].rows]
    total = sum(int(output["label"]["ink_mask"].sum()) for _, output in outputs)
    assert sum(counts) == total
    assert min(counts) > 0.45 * total
    handler._fit(engine)
    rule = handler.rules(4)["ink"]
    # Log odds of Gaussians: 2 m / s^2.
    assert rule["weights"]["ink"][0] == pytest.approx(2 / 4, rel=0.15)
    assert rule["weights"]["dist"][0] == pytest.approx(-2 / 2.25, rel=0.15)
    assert engine.state.metrics["ink/fused_gain"] > 0.01
    assert handler.rules(5) == {}


def test_too_few_voxels_fit_nothing_and_the_log_names_their_number(caplog):
    handler = FitFusion({"ink": {"ink": (1,), "dist": (-1,)}}, always=["ink"])
    engine, outputs = _engine(1, known=0.01)
    handler._clear(engine)
    for engine.state.batch, engine.state.output in outputs:
        handler._add(engine)
    with caplog.at_level(logging.WARNING):
        handler._fit(engine)
    assert handler.rules(4) == {}
    assert "at least 1000 known voxels of the foreground of half" in caplog.text


def test_tune_fits_and_stores_a_rule_with_the_crossed_score(trained, tmp_path, capsys):
    data, run = trained
    line = ["tune", "-m", str(run / "model_2.pth"), "-i", str(data), "--score", "dice", "-o", str(tmp_path)]
    assert main([*line, "--fuse", "distance"]) == 0
    scores = {
        row["label"]: float(row["surface/dice"])
        for row in csv.DictReader((tmp_path / "model_tuning.csv").open())
    }
    state = torch.load(tmp_path / "model_tuned.pth", weights_only=True)
    assert state["tuning"]["value"] == pytest.approx(scores["fused"])
    rule = state["model_config"]["fusion"]["surface"]
    # Both halves by their own rule: nearly the crossed score, and the own head's score is that of its prediction.
    part = json.loads(next(run.glob("*_split.json")).read_text())["val"]["scroll"]
    region = tuple(slice(*span) for span in part[0])
    truth = tifffile.imread(next((data / "labels").glob("*.tif")))[region] > 0
    image = str(next((data / "images").glob("*.tif")))
    dice = {}
    for model, fuse in ((run / "model_2.pth", False), (tmp_path / "model_tuned.pth", True)):
        output = tmp_path / f"{fuse}.zarr"
        box = tuple(tuple(span) for span in part[0])
        settings = {"targets": ("surface",), "region": box, "dtype": "float32", "fuse": fuse}
        predict(PredictRequest(image, str(model), str(output), **settings))
        decided = _read(output, "surface")[0] >= 0.5
        dice[fuse] = 2 * (decided & truth).sum() / (decided.sum() + truth.sum())
    assert scores["own head alone"] == pytest.approx(dice[False], abs=1e-4)
    assert scores["fused"] == pytest.approx(dice[True], abs=0.1)
    assert rule["weights"].keys() == {"surface", "distance"}
    assert main([*line, "--fuse"]) != 0  # the results exist already


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fuse", "normals"], "heads that speak for surface: distance"),
        (["--fuse", "distance", "--thresholds", "0.5"], "--thresholds: does not go with --fuse"),
    ],
)
def test_tune_refuses_what_has_no_meaning(trained, tmp_path, flags, message, capsys):
    data, run = trained
    line = ["tune", "-m", str(run / "model_2.pth"), "-i", str(data), "--score", "dice", "-o", str(tmp_path)]
    assert main([*line, *flags]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
