"""Measure the result of a time budget: `volumen train --time-budget` on one core, several seeds, validation Dice.

    python benchmarks/budget.py -i FIB25 --target membrane --budget 35m --seeds 0 1 2 -o RUNS
    python benchmarks/budget.py -i DRIVE --target vessel --budget 20m --seeds 0 1 2 -o RUNS

Each run is the command itself in a separate process, with one thread and no workers; a seed also draws another division
into training and validation part. The same table has a reference: the Dice of the best single threshold on the
image's first channel (green if there are three), chosen on the training part and scored on the validation part.
Finished runs in RUNS are not repeated, so that the benchmark can be interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from volumen.data.layout import OpenCase, discover, open_cases
from volumen.utils.terminal.text import by


def main() -> None:
    """Run every seed and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-i", "--input", required=True, help="data folder")
    parser.add_argument("-o", "--output", required=True, help="folder for the runs, kept")
    parser.add_argument("--target", required=True, help="labelled target to score")
    parser.add_argument("--budget", default="35m", help="time of each run (default: 35m)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--config-path", help="experiment file for all runs")
    options = parser.parse_args()
    cases = open_cases(discover(options.input))
    header = "| seed | network, batch, patch | steps | wall | CPU | Dice, last | Dice, best | threshold |"
    print(header + "\n" + "|---" * header.count(" | ") + "|---|")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    rows = [train_and_report(options, seed, cases) for seed in options.seeds]
    last, best, floor = (statistics.mean(column) for column in zip(*rows))
    print(
        f"\nmean of {len(rows)}: last {last:.3f}, best {best:.3f}, threshold {floor:.3f};"
        f" ratio of the last to it {last / floor:.2f}"
    )


def train_and_report(
    options: argparse.Namespace, seed: int, cases: list[OpenCase]
) -> tuple[float, float, float]:
    """Train one seed unless it is done, print its row, and return last, best and the threshold's Dice."""
    name = f"budget_{Path(options.input).name}_{options.budget}_{seed}"
    run = Path(options.output) / name
    times = run / "times.json"
    if not times.is_file():
        train(options, seed, name, times)
    taken = json.loads(times.read_text())
    with (run / "metrics.csv").open() as file:
        scores = [row.get(f"val/{options.target}/dice") for row in csv.DictReader(file)]
    dice = [float(score) for score in scores if score]
    snapshot = yaml.safe_load((run / f"{name}_config.yaml").read_text())
    training, model = snapshot["tr_config"], snapshot["model_config"]
    floor = threshold_dice(cases, options.target, json.loads((run / f"{name}_split.json").read_text()))
    network = f"{model['features_per_stage'][0]}-{model['features_per_stage'][-1]}"
    patch = by(training["patch_size"])
    print(
        f"| {seed} | {network}, {training['batch_size']}, {patch} |"
        f" {training['max_epoch'] * training['max_steps_per_epoch']} | {taken['wall'] / 60:.1f} min |"
        f" {taken['cpu'] / 60:.1f} min | {dice[-1]:.3f} | {max(dice):.3f} | {floor:.3f} |",
        flush=True,
    )
    return dice[-1], max(dice), floor


def train(options: argparse.Namespace, seed: int, name: str, times: Path) -> None:
    """Run the command and store its wall and CPU seconds."""
    command = [sys.executable, "-m", "volumen.cli.main", "train", "-i", options.input, "-o", options.output]
    command += ["--model-name", name, "--seed", str(seed), "--time-budget", options.budget, "--workers", "0"]
    if options.config_path:
        command += ["--config-path", options.config_path]
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with Path(options.output, f"{name}.log").open("w") as log:
        subprocess.run(command, env={**os.environ, **threads}, stdout=log, stderr=log, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    times.write_text(json.dumps({"wall": time.perf_counter() - started, "cpu": cpu}))


def threshold_dice(cases: list[OpenCase], target: str, split: dict) -> float:
    """Return the validation Dice of the threshold, and side of it, that is best on the training part."""
    train_counts, val_counts = counts(cases, target, split["train"]), counts(cases, target, split["val"])
    choices = [
        (dice_of(train_counts, level, above), level, above) for level in range(256) for above in (0, 1)
    ]
    _, level, above = max(choices)
    return dice_of(val_counts, level, above)


def counts(cases: list[OpenCase], target: str, boxes: dict) -> np.ndarray:
    """Return voxels by label (0, 1) and image value (256 levels), inside the mask if there is one."""
    found = np.zeros((2, 256), dtype=np.int64)
    for case in cases:
        for box in boxes.get(case.name, ()):
            region = tuple(slice(start, stop) for start, stop in box)
            image = case.image.read(region)
            values = image[min(1, len(image) - 1)].astype(np.uint8)
            label = case.labels[target].read(region)[0] != 0
            known = case.masks[target].read(region)[0] > 0 if target in case.masks else np.ones_like(label)
            for side in (0, 1):
                found[side] += np.bincount(values[known & (label == side)], minlength=256)
    return found


def dice_of(found: np.ndarray, level: int, above: int) -> float:
    """Return the Dice if all voxels above (or not above) a level are called foreground."""
    chosen = found[:, level + 1 :] if above else found[:, : level + 1]
    hits, claimed, true = chosen[1].sum(), chosen.sum(), found[1].sum()
    return float(2 * hits / max(1, claimed + true))


if __name__ == "__main__":
    main()
