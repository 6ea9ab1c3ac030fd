"""A class of 0.007 % of the voxels: is it learned, and does it stay learned?

Two anisotropic volumes (voxels 4 x 1 x 1) contain tissue, and a few small cells in it: one trains, one validates. Each
seed trains twice, the same number of steps: with neither, that is patches drawn without attention to classes and no
reaction to a collapse, and with both, that is `dataset_config.class_oversampling: auto` and the default reaction.

    python benchmarks/rare_class.py -o RUNS --csv benchmarks/results/rare_class.csv

A row per run is added to the CSV when the run ends; runs whose row exists are not repeated. About 10 CPU minutes.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
from pathlib import Path

SHAPE, SPACING = (32, 192, 192), (4.0, 1.0, 1.0)
CELLS, RADIUS = 2, (4.0, 3.2, 3.2)
SCORE = "val/tissue/dice/2"
ARMS = {"neither": ("0.0", 10**9), "both": ("auto", None)}
"""Value of class_oversampling, and number of low validations that count as a collapse (None: the default)."""


def write_data(folder: Path, seed: int) -> float:
    """Write both volumes; return the share of the rare class in per cent."""
    import numpy as np
    import tifffile

    rng = np.random.default_rng(seed)
    share = []
    grid = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    for name in ("train", "val"):
        label = np.zeros(SHAPE, np.uint8)
        label[:, :, : SHAPE[2] * 2 // 3] = 1
        for _ in range(CELLS):
            middle = [rng.uniform(0.25, 0.75) * size for size in SHAPE[:2]] + [
                rng.uniform(0.1, 0.5) * SHAPE[2]
            ]
            distance = sum(
                ((axis - place) * width / radius) ** 2
                for axis, place, width, radius in zip(grid, middle, SPACING, RADIUS)
            )
            label[distance <= 1] = 2
        image = 60 + 60 * (label > 0) + 40 * (label == 2) + rng.normal(0, 20, SHAPE)
        share.append(100 * float((label == 2).mean()))
        for part, values in (("images/{}", np.clip(image, 0, 255)), ("labels/{}_tissue", label)):
            path = folder / f"{part.format(name)}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(
                path,
                values.astype(np.uint8),
                imagej=True,
                resolution=(1, 1),
                metadata={"spacing": SPACING[0], "unit": "um", "axes": "ZYX"},
            )
    return sum(share) / len(share)


def train(folder: Path, out: Path, seed: int, arm: str, options: argparse.Namespace) -> list[float]:
    """Train, and return the Dice of the rare class at each validation."""
    sampling, patience = ARMS[arm]
    settings = [
        f"dataset_config.class_oversampling={sampling}",
        "model_config.features_per_stage=[8,16,32]",
        "tr_config.initial_lr=0.003",
    ]
    words = ["train", "-i", str(folder), "-o", str(out), "--val-volumes", "val", "--patch-size", "16,48,48"]
    words += ["--batch-size", "2", "--max-epochs", str(options.epochs)]
    words += ["--steps-per-epoch", str(options.steps), "--val-steps", "1000", "--seed", str(seed)]
    words += ["--workers", "0", "--device", "cpu"]
    words += [word for setting in settings for word in ("--set", setting)]
    code = "import sys, volumen.handlers.rare_classes as rare; from volumen.cli.main import main"
    if patience is not None:
        code += f"; rare.PATIENCE = {patience}"
    bundle = str(Path(__file__).resolve().parents[1] / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(main(sys.argv[1:]))", *words],
        env={**os.environ, "PYTHONPATH": bundle, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    (out / "log.txt").write_text(done.stderr, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stderr)
    with (out / "model" / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[SCORE] or 0) for row in csv.DictReader(file) if row.get(SCORE)]


def collapse(dice: list[float]) -> int | None:
    """Return the epoch from which the class counts as unlearned; None if it stays learned or is never learned."""
    from volumen.handlers.rare_classes import ClassHistory

    history = ClassHistory()
    return next((epoch for epoch, score in enumerate(dice, 1) if history.add(score)), None)


def run(seed: int, arm: str, options: argparse.Namespace) -> dict[str, object]:
    """Train one arm; return its row."""
    folder = options.output / f"seed{seed}"
    share = write_data(folder / "data", seed)
    out = folder / arm
    out.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    dice = train(folder / "data", out, seed, arm, options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seed": seed,
        "arm": arm,
        "epochs": options.epochs,
        "steps": options.steps,
        "rare_percent": round(share, 4),
        "best": round(max(dice), 4),
        "last": round(dice[-1], 4),
        "mean_of_last_5": round(sum(dice[-5:]) / len(dice[-5:]), 4),
        "unlearned_in_epoch": collapse(dice) or "",
        "cpu_seconds": round(spent),
        "dice": " ".join(f"{value:.3f}" for value in dice),
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows that a CSV holds; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, row: dict[str, object]) -> None:
    """Append a row, after the heading where the file is new."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Train what has no row yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--csv", type=Path, help="rows (default: OUTPUT/rows.csv)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40, help="steps of an epoch")
    options = parser.parse_args()
    path = options.csv or options.output / "rows.csv"
    for seed in options.seeds:
        for arm in ARMS:
            key = [str(value) for value in (seed, arm, options.epochs, options.steps)]
            done = [[row[name] for name in ("seed", "arm", "epochs", "steps")] for row in rows_of(path)]
            if key not in done:
                add_row(path, run(seed, arm, options))
    names = (
        "seed",
        "arm",
        "rare_percent",
        "best",
        "last",
        "mean_of_last_5",
        "unlearned_in_epoch",
        "cpu_seconds",
    )
    print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
    for row in rows_of(path):
        print("| " + " | ".join(row[name] or "no" for name in names) + " |")


if __name__ == "__main__":
    main()
