# ruff: noqa: E402
"""Does a validation score rank networks? Train ten, score them on one part, count their errors on another.

    python benchmarks/ranking.py phantom -o RUNS --csv benchmarks/results/ranking_phantom.csv
    python benchmarks/ranking.py fib25 -i FIB25 --objects FIB25_NEURONS -o RUNS --csv ranking_fib25.csv
    python benchmarks/ranking.py drive -i DRIVE -o RUNS --csv ranking_drive.csv
    python benchmarks/ranking.py hippocampus -i HIPPOCAMPUS -o RUNS --csv ranking_hippocampus.csv

The networks differ in training length, width, loss and seed, each trained for a fixed number of steps with one thread;
the last checkpoint counts. The table gets a row per network as soon as that is done; a network that is in it already is
not measured again, and one that lies in RUNS not trained again, so the benchmark can be interrupted. Columns:
`valid/...` scores of the validation part as `volumen evaluate` has them; `valid_counted/...` and `heldout/...` the
errors of ranking_sets.py with a threshold of 0.5, after specks were removed; `heldout_tuned/...` each of them with the
settings under which it is least on the validation part. `benchmarks/ranking_table.py` computes the correlations.
"""

from __future__ import annotations

import os

# Set before NumPy is imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranking_sets import COUNTED, HELD_OUT, SETS, TRAIN, VALID, DataSet, Piece, enclosed

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.data.sampling.split import Split
from volumen.inference.predictor import Predictor, load_predictor, predict_array
from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.objects.errors import object_errors
from volumen.metrics.objects.scores import object_score
from volumen.metrics.score_names import INSTANCES, LABELS, direction_of, names_of
from volumen.metrics.target_metrics import build_metrics
from volumen.run import run_bundle

EPOCHS = 10
BLOCKS = [1, 2, 2, 2]
LOSSES: dict[str, list[dict[str, Any]]] = {
    "cross-entropy + Dice": [{"name": "DiceCELoss"}],
    "cross-entropy": [{"name": "DiceCELoss", "kwargs": {"weight_dice": 0.0}}],
    "Dice": [{"name": "SoftDiceLoss"}],
    "Tversky": [{"name": "TverskyLoss"}],
    "Dice + boundary": [{"name": "SoftDiceLoss"}, {"name": "BoundaryLoss", "weight": 4.0}],
    "cross-entropy + skeleton": [
        {"name": "DiceCELoss", "kwargs": {"weight_dice": 0.0}},
        {"name": "SkeletonRecallLoss", "skip_deep_supervision": True},
    ],
}


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Args:
        steps: optimizer steps.
        features: channels at full resolution.
        loss: key of `LOSSES`.
        seed: of weights and patches.
    """

    steps: int
    features: int
    loss: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.steps}_{self.features}_{self.seed}"


RECIPES = (
    Recipe(40, 16, "cross-entropy + Dice", 0),
    Recipe(80, 32, "Dice", 1),
    Recipe(150, 8, "Tversky", 2),
    Recipe(200, 16, "cross-entropy", 3),
    Recipe(150, 24, "cross-entropy + Dice", 4),
    Recipe(300, 8, "Dice + boundary", 5),
    Recipe(300, 16, "Tversky", 6),
    Recipe(300, 16, "cross-entropy + skeleton", 7),
    Recipe(500, 8, "Dice", 8),
    Recipe(600, 16, "cross-entropy + Dice", 9),
)


def train(data: DataSet, recipe: Recipe, folder: Path) -> tuple[Predictor, float]:
    """Train a network unless the folder has it; return it and the CPU seconds of its training."""
    last, spent = folder / f"{recipe.name}.pth", folder / f"{recipe.name}.txt"
    if not spent.exists():
        with tempfile.TemporaryDirectory(dir=folder) as output:
            config = configuration(data, recipe, output)
            before = time.process_time()
            run_bundle("train.yaml", (), {"config": config})
            seconds = time.process_time() - before
            epochs = config.tr_config.max_epoch
            shutil.copy(config.run_dir / f"{config.tr_setup.model_name}_{epochs}.pth", last)
        spent.write_text(f"{seconds:.1f}", encoding="utf-8")
    return load_predictor(last), float(spent.read_text(encoding="utf-8"))


def configuration(data: DataSet, recipe: Recipe, output: str) -> ConfigManager:
    """Return how a network is trained on the training part, without validation."""
    width = recipe.features
    sections = {
        "tr_setup": {"seed": recipe.seed},
        "tr_config": {
            "patch_size": list(data.patch), "batch_size": data.batch, "max_epoch": EPOCHS,
            "max_steps_per_epoch": round(recipe.steps / EPOCHS), "num_dataloader_workers": 0,
            "initial_lr": 0.003 * math.sqrt(16 / max(16, width)), "keep_checkpoints": 1,
            "losses": LOSSES[recipe.loss], "augment_strength": 0.0,
        },
        "model_config": {
            "features_per_stage": [width, 2 * width, 4 * width, 8 * width], "n_blocks_per_stage": BLOCKS,
        },
    }  # fmt: skip
    boxes = {name: list(found) for name, found in data.parts[TRAIN].items()}
    return ConfigManager(
        **merge(shipped_sections(), sections), dataset_dir=data.folder, output_dir=output, device="cpu",
        split=Split(boxes, {}, 1.0, recipe.seed),
    )  # fmt: skip


def probabilities(predictor: Predictor, data: DataSet, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """Return what a network predicts of each piece, (K, *space)."""
    return [
        predict_array(predictor, piece.image, targets=[data.target], overlap=0.25, precision="bfloat16")[
            data.target
        ]
        for piece in pieces
    ]


def validation_scores(
    predictor: Predictor, data: DataSet, found: Sequence[np.ndarray], pieces: Sequence[Piece]
) -> dict[str, float]:
    """Return every score of the label of which one direction is better, and of the objects that it encloses."""
    names = [name for name in names_of(LABELS, default=False) if direction_of(f"x/{name}") is not None]
    target = data.target
    (head,) = predictor.heads([target])
    section = {target: {"kind": head.kind, "out_channels": head.channels}}
    metrics = build_metrics(section, None, names=names)
    for number, (pred, piece) in enumerate(zip(found, pieces, strict=True)):
        metrics.update(
            {target: pred[None]}, {target: piece.label[None, None]}, {target: piece.known[None, None]},
            cases=[number],
        )  # fmt: skip
    values = {f"valid/{name}": metrics.compute()[f"{target}/{name}"] for name in names}
    if data.objects:
        default = data.settings()[0]
        tables = [
            overlaps(enclosed(target, pred, default), piece.objects, piece.sure)
            for pred, piece in zip(found, pieces, strict=True)
            if piece.objects is not None
        ]
        for name in names_of(INSTANCES, default=False):
            if direction_of(f"x/{name}") is not None:
                scores = [object_score(name, table, object_errors(table)) for table in tables]
                values[f"valid/instances {name}"] = float(np.mean(scores))
    return values


def measure(data: DataSet, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train a network and return its row of the table."""
    predictor, seconds = train(data, recipe, folder)
    before = time.process_time()
    pieces = {part: list(data.pieces(part)) for part in (VALID, HELD_OUT)}
    found = {part: probabilities(predictor, data, pieces[part]) for part in pieces}
    row: dict[str, Any] = {**vars(recipe), "cpu_seconds": round(seconds, 1)}
    row |= validation_scores(predictor, data, found[VALID], pieces[VALID])
    settings = data.settings()
    tried = [data.count(found[VALID], pieces[VALID], entry) for entry in settings]
    held_out: dict[int, dict[str, float]] = {}

    def of_held_out(number: int) -> dict[str, float]:
        if number not in held_out:
            held_out[number] = data.count(found[HELD_OUT], pieces[HELD_OUT], settings[number])
        return held_out[number]

    for name in COUNTED:
        row[f"valid_counted/{name}"] = tried[0][name]
        row[f"heldout/{name}"] = of_held_out(0)[name]
        best = min(range(len(tried)), key=lambda number: (tried[number][name], number))
        row[f"heldout_tuned/{name}"] = of_held_out(best)[name]
    row["scoring_cpu_seconds"] = round(time.process_time() - before, 1)
    return row


def done(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, none where it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a table, with its header where it is the first."""
    fresh = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            table.writeheader()
        table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> None:
    """Measure the networks that the table lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=list(SETS), help="data set")
    parser.add_argument("-i", "--input", help="its folder; the phantom is written to -o")
    parser.add_argument("--objects", help="of fib25: folder with the numbers of the neurons")
    parser.add_argument("-o", "--output", required=True, help="folder for the networks")
    parser.add_argument("--csv", type=Path, required=True, help="table that gets a row per network")
    parser.add_argument("--most", type=int, default=len(RECIPES), help="networks to measure in this call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.output, f"{options.set}_networks")
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "phantom": (Path(options.output, "phantom"),),
        "fib25": (options.input, options.objects),
    }.get(options.set, (options.input,))
    data = SETS[options.set](*arguments)
    known = {tuple(row[key] for key in vars(RECIPES[0])) for row in done(options.csv)}
    missing = [recipe for recipe in RECIPES if tuple(map(str, vars(recipe).values())) not in known]
    for recipe in missing[: options.most]:
        row = measure(data, recipe, folder)
        append(options.csv, row)
        print(f"{recipe}: {row['cpu_seconds']} CPU s, dice {row['valid/dice']:.4f}", flush=True)


if __name__ == "__main__":
    main()
