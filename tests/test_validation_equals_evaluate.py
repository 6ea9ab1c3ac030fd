"""What validation says of a prediction is what `volumen evaluate` says of it, background and all."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
import zarr

from volumen.checkpoints.file import load_checkpoint
from volumen.cli.main import main
from volumen.config.manager import ConfigManager
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.handlers.final_scores import read_scores
from volumen.handlers.scores import TargetScores
from volumen.inference.predictor import read_heads
from volumen.inference.record.provenance import plain
from volumen.inference.windows.heads import Head

TINY = {
    "tr_config": {
        "max_epoch": 1,
        "max_steps_per_epoch": 2,
        "max_val_steps_per_epoch": None,
        "num_dataloader_workers": 0,
        "amp": "off",
        "augment": False,
    },
    "model_config": {"features_per_stage": [4, 8], "n_blocks_per_stage": [1, 1], "separate_decoders": False},
}


class Recorder:
    """Keeps the outputs of the evaluator's last run, by volume and head, with their places."""

    def __init__(self, monkeypatch) -> None:
        self.blocks: dict[str, list] = defaultdict(list)
        reset, add = TargetScores.reset, TargetScores.iteration_completed

        def begin(scores):
            self.blocks.clear()
            reset(scores)

        def keep(scores, engine, *rest):
            for i, name in enumerate(engine.state.batch["volume_name"]):
                found = {head: values[i].cpu() for head, values in engine.state.output["pred"].items()}
                self.blocks[name].append((engine.state.batch["start"][i].tolist(), found))
            add(scores, engine, *rest)

        monkeypatch.setattr(TargetScores, "reset", begin)
        monkeypatch.setattr(TargetScores, "iteration_completed", keep)

    def write(self, folder: Path, run: Path, data: Path) -> None:
        """Write what the heads gave as predictions with the record that `volumen predict` leaves."""
        folder.mkdir()
        split = json.loads(next(run.glob("*_split.json")).read_text())
        config = load_checkpoint(next(run.glob("*_1.pth")))["config"]
        for name, blocks in self.blocks.items():
            (region,) = split["val"][name]
            heads = {head: _head(head, values, config) for head, values in blocks[0][1].items()}
            for head in heads.values():
                whole = torch.full((head.channels, *(b - a for a, b in region)), float("nan"))
                for start, found in blocks:
                    part = tuple(
                        slice(s - a, s - a + n)
                        for s, (a, _), n in zip(start, region, found[head.name].shape[1:], strict=True)
                    )
                    whole[(slice(None), *part)] = found[head.name]
                assert not whole.isnan().any()
                values = torch.sigmoid(whole) if head.activation == "sigmoid" else whole
                values = torch.softmax(whole, 0) if head.activation == "softmax" else values
                _write_ome(folder / f"{name}_{head.name}.zarr", values.numpy())
            image = next(path for path in (data / "images").iterdir() if path.name.startswith(f"{name}."))
            shape = json.loads((run / "shapes.json").read_text())[name]
            recipe = {
                "input": {"path": str(image), "shape": shape},
                "targets": {
                    head.name: {"channels": head.channels, "kind": head.kind, "dtype": "float32"}
                    for head in heads.values()
                },
                "region": region,
                "dtype": "float32",
                "threshold": None,
                "instances": None,
                "made_of": plain(config),
            }
            record = {"recipe": recipe, "files": [f"{name}_{head}.zarr" for head in heads]}
            (folder / f"{name}.volumen.json").write_text(json.dumps(record))


def _head(name: str, values: np.ndarray, config) -> Head:
    return read_heads({name: {"out_channels": len(values)}}, config, values.ndim - 1)[name]


def _write_ome(path: Path, values: np.ndarray) -> None:
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space"} for axis in "zyx"[-(values.ndim - 1) :]]
    scale = [{"type": "scale", "scale": [1.0] * values.ndim}]
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}],
    }
    group.create_array("0", data=values, chunks=values.shape, dimension_names=[axis["name"] for axis in axes])


def train(data: Path, out: Path, settings) -> Path:
    """Train for an epoch; return the run's folder."""
    merged = {**TINY, **settings, "tr_config": {**TINY["tr_config"], **settings.get("tr_config", {})}}
    experiment = out / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(merged))
    command = ["train", "-i", str(data), "-o", str(out), "--config-path", str(experiment), "--quiet"]
    assert main([*command, "--device", "cpu"]) == 0
    run = out / "model"
    sections = yaml.safe_load((run / "model_config.yaml").read_text())
    config = ConfigManager(**sections, dataset_dir=str(data))
    (run / "shapes.json").write_text(json.dumps({case.name: case.image.shape for case in config.cases}))
    return run


def validated(run: Path) -> dict[str, float]:
    """The scores of a run's only epoch, without losses."""
    (row,) = csv.DictReader((run / "metrics.csv").open())
    return {
        name.removeprefix("val/"): float(value)
        for name, value in row.items()
        if name.startswith("val/") and not name.startswith("val/loss") and value
    }


def agree(data: Path, out: Path, settings, monkeypatch) -> dict[str, float]:
    """Check that both say the same of one prediction; return the scores."""
    recorder = Recorder(monkeypatch)
    run = train(data, out, settings)
    recorder.write(out / "found", run, data)
    derived = ("angular_error", "mae") if "auxiliary_tasks" in settings else ()
    metrics = ("dice", "iou", *derived)
    scored = evaluate(EvaluateRequest(str(out / "found"), str(data), str(out / "report"), metrics=metrics))
    mine = validated(run)
    theirs = {name: value for name, value in scored.mean.items() if not math.isnan(value)}
    assert mine.keys() == theirs.keys()
    assert mine == pytest.approx(theirs, abs=1e-6)
    return mine


def volume(shape, seed, label_to):
    """A label in a corner, and its likes elsewhere in the image, which nobody labelled."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[..., 4:12, 6:14] = 1
    image = 150 * label + rng.integers(0, 60, shape).astype(np.uint8)
    image[..., -12:-4, -14:-6] += 150
    return image.astype(np.uint8), label * label_to


def write(data: Path, name: str, image, labels, mask=None) -> None:
    for folder, suffix, values in (
        ("images", "", image),
        *(("labels", f"_{target}", label) for target, label in labels.items()),
        *([("masks", "_mask", mask)] if mask is not None else []),
    ):
        (data / folder).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(
            data / folder / f"{name}{suffix}.tif", values, metadata={"axes": "ZYX"[-image.ndim :]}
        )


LOSSES = {
    "surface_normals": "CosineSimilarityLoss",
    "skeleton": "BCEWithLogitsLoss",
    "affinities": "BCEWithLogitsLoss",
}


def task(kind: str, source: str, **settings) -> dict:
    """Return a derived target with a suitable loss."""
    losses = [{"name": LOSSES.get(kind, "SmoothL1Loss")}]
    return {"type": kind, "source_target": source, "losses": losses, **settings}


TASKS = {
    "distance": task("distance_transform", "ink", reach=4),
    "normals": task("surface_normals", "ink", reach=4),
    "middle": task("skeleton", "ink"),
}


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("how", ["plain", "ignore", "mask", "labelled only"])
def test_validation_equals_evaluate(tmp_path, monkeypatch, ndim, how):
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    shape = (20, 40, 44)[-ndim:]
    for number in range(3 if ndim == 2 else 1):
        image, ink = volume(shape, number, 1)
        tissue = 1 + (np.arange(shape[-1]) // 12 % 3).astype(np.uint8) * np.ones(shape, np.uint8)
        tissue = tissue.astype(np.int16)
        mask = None
        if how == "ignore":
            ink = ink.astype(np.int16)
            ink[..., 20:, :9] = -1
            tissue[..., :5, :] = -7
        if how == "mask":
            mask = np.full(shape, -1, np.int16)
            mask[..., :26, :30] = 3
        write(data, f"a{number}", image, {"ink": ink, "tissue": tissue}, mask)
    ignored = {"ink": {"ignore_label": -1}, "tissue": {"ignore_label": -7}} if how == "ignore" else {}
    settings = {
        "tr_setup": {"compute_loss_on_labeled_only": how == "labelled only", "tr_val_split": 0.5},
        "tr_config": {"patch_size": [8, 16, 16][-ndim:]},
        "dataset_config": {"targets": ignored or {"ink": {}, "tissue": {}}, "min_labeled_ratio": 0.0},
        "auxiliary_tasks": TASKS,
    }
    found = agree(data, out, settings, monkeypatch)
    assert {"ink/dice", "tissue/dice/3", "distance/mae", "normals/angular_error"} <= found.keys()
    # The mean is of the labelled targets alone.
    assert found["mean_dice"] == pytest.approx((found["ink/dice"] + found["tissue/dice"]) / 2)


def test_a_tie_is_decided_alike(tmp_path, monkeypatch):
    image, ink = volume((20, 40, 44), 0, 1)
    write(tmp_path / "data", "a", image, {"ink": ink})
    monkeypatch.setattr(
        "volumen.inference.windows.sliding.SlidingWindow.__call__",
        lambda self, inputs, network: {"ink": torch.zeros((1, 1, *inputs.shape[2:]))},
    )
    (tmp_path / "out").mkdir()
    settings = {"tr_config": {"patch_size": [8, 16, 16]}, "dataset_config": {"min_labeled_ratio": 0.0}}
    agree(tmp_path / "data", tmp_path / "out", settings, monkeypatch)


def test_look_alikes_that_nobody_labelled_are_false_alarms(tmp_path, monkeypatch):
    """A network that finds them all gets the Dice of `volumen evaluate`, of a draw of the blocks about as much."""
    rng = np.random.default_rng(0)
    ink = np.zeros((32, 64, 64), np.uint8)
    ink[:, 4:12, 6:14] = 1
    bright = ink.copy()
    bright[:, 16::8, ::2] = 1
    image = (150 * bright + rng.integers(0, 60, ink.shape)).astype(np.uint8)
    write(tmp_path / "data", "a", image, {"ink": ink})
    monkeypatch.setattr(
        "volumen.inference.windows.sliding.SlidingWindow.__call__",
        lambda self, inputs, network: {"ink": torch.where(inputs > 0.42, 5.0, -5.0)},
    )
    settings = {
        "tr_config": {"patch_size": [8, 8, 8], "batch_size": 1},
        "dataset_config": {"min_labeled_ratio": 0.0},
    }
    (tmp_path / "whole").mkdir()
    whole = agree(tmp_path / "data", tmp_path / "whole", settings, monkeypatch)["ink/dice"]
    true, false = ink.sum(), (bright & ~ink & 1).sum()
    assert whole == pytest.approx(2 * true / (2 * true + false), abs=0.01)
    (tmp_path / "drawn").mkdir()
    drawn = {"tr_config": {**settings["tr_config"], "max_val_steps_per_epoch": 60}}
    run = train(tmp_path / "data", tmp_path / "drawn", {**settings, **drawn})
    assert validated(run)["ink/dice"] == pytest.approx(whole, abs=0.1)
    assert read_scores(run)[1]["metrics"]["ink/dice"] == pytest.approx(whole, abs=1e-6)


def crop(source: Path, data: Path, names, size) -> None:
    """Copy part of a real data set."""
    for folder in ("images", "labels", "masks"):
        if (source / folder).is_dir():
            (data / folder).mkdir(parents=True, exist_ok=True)
            for path in sorted((source / folder).iterdir()):
                if any(path.name.startswith(name) for name in names):
                    values = tifffile.imread(path)
                    part = values[tuple(slice(0, n) for n in size)]
                    axes = ("ZYX" if len(size) == 3 else "YX") + "S" * (values.ndim - len(size))
                    options = {"photometric": "rgb"} if axes.endswith("S") else {}
                    tifffile.imwrite(data / folder / path.name, part, metadata={"axes": axes}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fib25", "fib25_neurons", "vnc", "drive", "hippocampus"])
def test_validation_equals_evaluate_on_real_data(tmp_path, monkeypatch, real_data, name):
    source, data = real_data(name), tmp_path / "data"
    target = {"fib25": "membrane", "vnc": "mito", "drive": "vessel", "fib25_neurons": "neuron"}.get(name)
    tasks = {
        "distance": task("distance_transform", target),
        "normals": task("surface_normals", target),
    }
    settings = {"tr_config": {"patch_size": [16, 32, 32]}, "dataset_config": {}, "auxiliary_tasks": tasks}
    if name == "hippocampus":
        data = source
        names = sorted(path.name.split(".")[0] for path in (source / "images").iterdir())[:12]
        settings["dataset_config"]["volumes"] = names
        settings["auxiliary_tasks"] = {}
    elif name == "drive":
        crop(source, data, ("21", "22", "23", "24", "25"), (200, 240))
        settings["tr_config"]["patch_size"] = [64, 64]
    else:
        crop(source, data, ("medulla", "stack1"), (13, 160, 160) if name == "vnc" else (64, 96, 96))
    if name == "fib25_neurons":
        settings["dataset_config"]["targets"] = {"neuron": {"instances": "boundary"}}
        settings["auxiliary_tasks"]["affinities"] = task("affinities", "neuron")
    if name == "vnc":
        settings["tr_config"]["patch_size"] = [4, 48, 48]
    (tmp_path / "out").mkdir()
    found = agree(data, tmp_path / "out", settings, monkeypatch)
    assert "mean_dice" in found
