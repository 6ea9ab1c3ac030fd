"""Part e: a training at nnU-Net's size on fib25 for the time that is left, and the Dice of its validation part."""

from __future__ import annotations

import csv
from typing import Any

from gpu_parts.common import Run, phantom

ONE_CORE = "mean of three seeds 0.780, 35 minutes on one core (docs/training.md)"


def run_part(run: Run) -> None:
    """Train."""
    if run.data is None and not run.tiny:
        run.write("training on fib25", skipped="no --data: the folder of the fib25 data set")
        return
    run.attempt("training on fib25" if run.data else "training on the phantom", lambda: train(run), 10)


def train(run: Run) -> dict[str, Any]:
    """Return the validation Dice by epoch, the last and the best, and the number of steps."""
    from volumen.run import train_on_folder

    target = "surface" if run.data is None else "membrane"
    data = run.data or phantom(run, 48)
    training: dict[str, Any] = {"patch_size": [96, 128, 128], "batch_size": 2}
    model: dict[str, Any] = {"features_per_stage": list(run.features)}
    if run.tiny:
        training = {
            "patch_size": [16] * 3,
            "max_epoch": 1,
            "max_steps_per_epoch": 2,
            "max_val_steps_per_epoch": 1,
            "final_val_steps": 1,
            "num_dataloader_workers": 0,
        }
    else:
        training["time_budget"] = f"{max(1, int(run.left * 0.85))}s"
    settings = {"tr_config": training, "model_config": model}
    folder = train_on_folder(data, run.folder / "e", settings, device=str(run.device))
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    dice = [float(row[f"val/{target}/dice"]) for row in rows if row.get(f"val/{target}/dice")]
    return {
        "steps": int(rows[-1]["iteration"]),
        "last_dice": dice[-1],
        "best_dice": max(dice),
        "one_core": ONE_CORE,
    }
