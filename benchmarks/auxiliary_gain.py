# ruff: noqa: E402
"""Measure whether derived targets help: train the membrane of a volume with and without them at equal CPU time.

    python benchmarks/auxiliary_gain.py --data DATA --output OUT --minutes 30 --seeds 0 1 2 [--overlay my.yaml]

Each arm first takes a few steps to measure the cost of one, then trains for as many steps as fit into the time, with
the learning rate annealed to their end: the arm with derived targets takes fewer. Scored on the validation part, which
is the same for both: Dice and surface Dice at one voxel. One thread; the time is that of the process's own CPU, so that
a busy machine does not matter, and the table states the actual time of each run. A finished run is stored in
OUT and skipped when the command is repeated; so is its cost of a step.
"""

from __future__ import annotations

import os

# Set before NumPy is imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from volumen.config.experiment_file import merge, read_experiment, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.inference.predictor import load_predictor, predict_array
from volumen.metrics.target_metrics import build_metrics
from volumen.run import run_bundle

SMALL = {
    "tr_config": {"patch_size": [64, 64, 64], "batch_size": 2, "val_every_n": 10**6},
    "model_config": {"features_per_stage": [16, 32, 64, 128], "separate_decoders": False},
}
"""Settings that suit a CPU; an overlay takes precedence over them."""
FIXED = {"num_dataloader_workers": 0, "early_stopping_patience": None, "time_budget": None}
"""Settings that do all work in one process, whose time is measured."""
TRIAL_STEPS, WARM_UP = 10, 3
EPOCHS = 10
ALONE, DERIVED = "label alone", "with four derived"


def auxiliary_tasks(source: str, weight: float) -> dict[str, Any]:
    """Return the four derived targets of a source, with small weights so that the source target dominates."""
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
    return {name: {**task, "source_target": source, "loss_weight": weight} for name, task in tasks.items()}


class StepClock:
    """Records the process's CPU time at the start and after every iteration of a trainer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Start the clock when the trainer starts."""
        for event in (Events.STARTED, Events.ITERATION_COMPLETED):
            engine.add_event_handler(event, lambda _: self.times.append(time.process_time()))

    @property
    def step(self) -> float:
        """Return the median CPU seconds of a step, including its data."""
        ends = self.times[1 + WARM_UP :]
        return statistics.median(after - before for before, after in itertools.pairwise(ends))

    @property
    def total(self) -> float:
        """Return the CPU seconds of all steps."""
        return self.times[-1] - self.times[0]


class Experiment:
    """Both arms on one data set; the results are stored on disk.

    Args:
        options: the parsed flags.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        overlay = read_experiment(options.overlay) if options.overlay else {}
        base = merge(merge(merge(shipped_sections(), SMALL), overlay), {"tr_config": FIXED})
        tasks = auxiliary_tasks(options.target, options.weight)
        self.arms = {ALONE: merge(base, {}), DERIVED: merge(base, {"auxiliary_tasks": tasks})}
        self.arms[ALONE]["auxiliary_tasks"] = {}

    def result(self, arm: str, seed: int) -> dict[str, float]:
        """Return steps, CPU minutes and scores of one run; train it if it has not been trained."""
        return self._stored_or_computed(
            f"{arm} {seed}", [self.options.minutes, seed], arm, lambda: self._train(arm, seed)
        )

    def step_cost(self, arm: str) -> float:
        """Return the CPU seconds of a step of an arm, measured once."""

        def measure() -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                return {"seconds": self._run(arm, 0, TRIAL_STEPS, folder)[1].step}

        return self._stored_or_computed(f"{arm} cost", [], arm, measure)["seconds"]

    def _stored_or_computed(self, name: str, depends: Sequence[Any], arm: str, make: Any) -> dict[str, float]:
        # A result that was computed with other settings is recomputed.
        facts = [depends, self.arms[arm], str(Path(self.options.data).resolve()), self.options.target]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        path = self.folder / f"{name.replace(' ', '_')}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return kept["result"]
        result = make()
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"key": key, "result": result}, indent=1), encoding="utf-8")
        fresh.replace(path)
        return result

    def _train(self, arm: str, seed: int) -> dict[str, float]:
        steps = max(TRIAL_STEPS, int(self.options.minutes * 60 / self.step_cost(arm)))
        with tempfile.TemporaryDirectory() as folder:
            config, clock = self._run(arm, seed, steps, folder)
            dice, surface = score(config, self.options.target)
        return {
            "steps": len(clock.times) - 1,
            "minutes": clock.total / 60,
            "dice": dice,
            "surface_dice": surface,
        }

    def _run(self, arm: str, seed: int, steps: int, output: str) -> tuple[ConfigManager, StepClock]:
        """Train for about this many steps, in epochs of equal length."""
        epochs = EPOCHS if steps >= 4 * EPOCHS else 1
        schedule = {"max_epoch": epochs, "max_steps_per_epoch": max(1, round(steps / epochs))}
        sections = merge(self.arms[arm], {"tr_config": schedule, "tr_setup": {"seed": seed}})
        config = ConfigManager(**sections, dataset_dir=self.options.data, output_dir=output, device="cpu")
        clock = StepClock()
        run_bundle("train.yaml", (), {"config": config}, handlers=[clock])
        return config, clock


def score(config: ConfigManager, target: str) -> tuple[float, float]:
    """Return Dice and surface Dice at one voxel of the last checkpoint on the validation part."""
    name = f"{config.tr_setup.model_name}_{config.tr_config.max_epoch}.pth"
    predictor = load_predictor(config.run_dir / name)
    section = {target: config.loss_sections[target]}
    metrics = build_metrics(section, config.spacing, names=("dice", "surface_dice"))
    for case in config.cases:
        for box in config.split.val.get(case.name, ()):
            region = tuple(slice(start, stop) for start, stop in box)
            found = predict_array(predictor, case.image.read(region), targets=[target])
            truth = (case.labels[target].read(region) != 0)[None]
            metrics.update({target: found[target][None]}, {target: truth})
    values = metrics.compute()
    return values[f"{target}/dice"], values[f"{target}/surface_dice"]


def table(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Return a Markdown table: a row per run, and mean and standard deviation of each arm and of the gain."""
    lines = [
        "| arm | seed | steps | CPU minutes | Dice | surface Dice |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, runs in results.items():
        for seed, run in runs.items():
            lines.append(
                f"| {arm} | {seed} | {run['steps']} | {run['minutes']:.1f} | {run['dice']:.4f} |"
                f" {run['surface_dice']:.4f} |"
            )
    for arm, runs in results.items():
        dice, surface = (spread([run[key] for run in runs.values()]) for key in ("dice", "surface_dice"))
        lines.append(f"| **{arm}** | mean (sd) | | | {dice} | {surface} |")
    alone, derived = results[ALONE], results[DERIVED]
    gains = [
        spread([derived[seed][key] - alone[seed][key] for seed in alone if seed in derived], sign=True)
        for key in ("dice", "surface_dice")
    ]
    lines.append(f"| **gain** | mean (sd) of pairs | | | {gains[0]} | {gains[1]} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Return mean and standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{'+' if sign else ''}.4f} ({deviation:.4f})"


def main() -> None:
    """Train both arms for every seed and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-i", "--data", required=True, help="data folder")
    parser.add_argument("-o", "--output", required=True, help="folder that keeps results of finished runs")
    parser.add_argument("--target", default="membrane", help="labelled target (default: membrane)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="CPU minutes of training per run (default: 5)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument(
        "--weight", type=float, default=0.1, help="weight of each derived target (default: 0.1)"
    )
    parser.add_argument("--overlay", help="experiment file with settings of both arms")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    experiment = Experiment(options)
    results: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in experiment.arms}
    for seed in options.seeds:
        for arm in experiment.arms:
            results[arm][seed] = found = experiment.result(arm, seed)
            print(
                f"{arm:<18} seed {seed}: {found['steps']} steps, {found['minutes']:.1f} CPU minutes,"
                f" Dice {found['dice']:.4f}, surface Dice {found['surface_dice']:.4f}",
                flush=True,
            )
    text = table(results)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
