"""Do auxiliary targets help? The membrane of a volume, trained with and without them at equal time.

    python benchmarks/auxiliary_gain.py -i DATA --target membrane --minutes 5 --seeds 0 1 2

Each arm first takes a few steps to learn what one costs, then trains for as many as fit into the time, with the
learning rate annealed to their end. Scored on the validation part, which is the same for both: Dice and surface Dice
at one voxel. One thread; the time is that of the process's own CPU, so that a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from scripts.config import ConfigManager
from scripts.experiment_file import merge
from scripts.inference.predictor import load_predictor, predict_array
from scripts.metrics.target_metrics import build_metrics
from scripts.train import run_bundle, shipped_sections

SMALL = {
    "tr_config": {
        "patch_size": [64, 64, 64],
        "batch_size": 2,
        "num_dataloader_workers": 0,
        "val_every_n": 10**6,
    },
    "model_config": {"features_per_stage": [16, 32, 64, 128], "separate_decoders": False},
}
TRIAL_STEPS = 6


def auxiliary_tasks(source: str) -> dict[str, Any]:
    """Return the four derived targets of a source, weighted so that they guide and do not lead."""
    tensor = {"compute_from": "sdt", "grad_sigma": 1.0, "tensor_sigma": 1.5}
    tasks: dict[str, dict[str, Any]] = {
        "distance": {
            "type": "distance_transform",
            "losses": [{"name": "SignedDistanceLoss", "kwargs": {"rho": 6, "beta": 1, "eikonal": True}}],
        },
        "normals": {"type": "surface_normals", "losses": [{"name": "CosineSimilarityLoss"}]},
        "tensor": {"type": "structure_tensor", "losses": [{"name": "MaskedMSELoss"}], **tensor},
        "direction": {"type": "inplane_direction", "losses": [{"name": "MaskedMSELoss"}], **tensor},
    }
    return {name: {**task, "source_target": source, "loss_weight": 0.1} for name, task in tasks.items()}


def main() -> None:
    """Train both arms for every seed and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-i", "--input", required=True, help="data folder")
    parser.add_argument("--target", default="membrane", help="labelled target (default: membrane)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="CPU minutes of training per arm (default: 5)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arms = {"label alone": {}, "with four derived": auxiliary_tasks(options.target)}
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    print(f"{'arm':<18} {'seed':>4} {'steps':>6} {'s/step':>7} {'Dice':>7} {'surface Dice':>13}")
    for seed in options.seeds:
        for name, tasks in arms.items():
            steps, cost, dice, surface = train_and_score(
                options.input, options.target, tasks, seed, options.minutes
            )
            scores[name].append((dice, surface))
            print(f"{name:<18} {seed:>4} {steps:>6} {cost:>7.2f} {dice:>7.4f} {surface:>13.4f}", flush=True)
    for name, values in scores.items():
        dices, surfaces = zip(*values)
        spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in (dices, surfaces)]
        print(
            f"{name:<18} mean Dice {statistics.mean(dices):.4f} (sd {spread[0]:.4f}), "
            f"surface Dice {statistics.mean(surfaces):.4f} (sd {spread[1]:.4f})"
        )


def train_and_score(
    data: str, target: str, tasks: dict[str, Any], seed: int, minutes: float
) -> tuple[int, float, float, float]:
    """Return the steps taken, CPU seconds of one, Dice and surface Dice on the validation part."""
    sections = merge(shipped_sections(), {**SMALL, "auxiliary_tasks": tasks})
    sections["tr_setup"]["seed"] = seed
    with tempfile.TemporaryDirectory() as folder:
        _, trial = run(sections, data, f"{folder}/trial", TRIAL_STEPS)
        _, longer = run(sections, data, f"{folder}/longer", 2 * TRIAL_STEPS)
        cost = max(1e-3, (longer - trial) / TRIAL_STEPS)
        steps = max(2 * TRIAL_STEPS, int(minutes * 60 / cost))
        config, _ = run(sections, data, f"{folder}/run", steps)
        dice, surface = score(config, target)
    return steps, cost, dice, surface


def run(sections: dict[str, Any], data: str, output: str, steps: int) -> tuple[ConfigManager, float]:
    """Train for a number of steps, in ten epochs where that divides; return configuration and CPU seconds."""
    epochs = 10 if steps >= 40 else 1
    sections = merge(
        sections, {"tr_config": {"max_epoch": epochs, "max_steps_per_epoch": max(1, steps // epochs)}}
    )
    config = ConfigManager(**sections, dataset_dir=data, output_dir=output, device="cpu")
    began = time.process_time()
    run_bundle("train.yaml", (), {"config": config})
    return config, time.process_time() - began


def score(config: ConfigManager, target: str) -> tuple[float, float]:
    """Return Dice and surface Dice at one voxel of the last checkpoint on the validation part."""
    predictor = load_predictor(
        config.run_dir / f"{config.tr_setup.model_name}_{config.tr_config.max_epoch}.pth"
    )
    metrics = build_metrics(
        {target: config.loss_sections[target]}, config.spacing, names=("dice", "surface_dice")
    )
    for case in config.cases:
        for box in config.split.val.get(case.name, ()):
            region = tuple(slice(start, stop) for start, stop in box)
            found = predict_array(predictor, case.image.read(region), targets=[target])
            truth = (case.labels[target].read(region) != 0)[None]
            metrics.update({target: found[target][None]}, {target: truth})
    values = metrics.compute()
    return values[f"{target}/dice"], values[f"{target}/surface_dice"]


if __name__ == "__main__":
    main()
