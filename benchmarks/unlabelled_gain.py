# ruff: noqa: E402
"""Do unlabelled voxels help? Trains cells of data, labels, arm and seed for equal CPU time; scores a held-out part.

    python benchmarks/unlabelled_gain.py -o RUNS --csv benchmarks/results/unlabelled_gain.csv
        --sets phantom --shares 5 --shapes slices --arms alone average teacher --seeds 0 1 2 [--seconds 60]
    python benchmarks/unlabelled_gain.py -o RUNS --csv ... --sets fib25 -i fib25=FIB25 -i neurons=FIB25_NEURONS
    python benchmarks/unlabelled_gain.py -o RUNS --csv ... --table

`shares` of 2, 5 or 10 % of the voxels of the training part are labelled: whole slices (a box in 2D), one box per image,
or whole volumes; others for every seed, the same for all arms of a seed. Arms:

- alone: the labels, which all other arms are compared with;
- average: the labels, predicted with a running average of the weights, as a teacher's student is;
- teacher: a mean teacher on the unlabelled rest of the training part, with as many unlabelled patches as labelled ones;
  teacher-sure: where the teacher is certain; teacher-mixed: with two unlabelled patches in a batch at least, so that
  boxes of one patch lie in the other;
- rounds: half of the time trains on the labels; then all images are predicted, which takes its time, and the rest
  trains on the labels and on pseudo-labels, which are calibrated on the validation part.

Every cell first takes a few steps to measure the cost of one, then trains for as many steps as fit into the CPU time,
with the learning rate annealed to their end; one thread. The last checkpoint is scored on the held-out part, with the
threshold and the smallest size that are best on the validation part (`auxiliary_gain.py`). Each cell adds a row as soon
as it is done, and a cell that is in the table already is skipped, so the benchmark can be interrupted. `--table` prints
means, and for each arm the mean difference to the label alone over the same seeds with its 95 % interval (Student's t).
"""

from __future__ import annotations

import os

# Set before NumPy is imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from auxiliary_gain import (
    ALONE,
    FIELDS,
    SCORES,
    TRIAL_STEPS,
    cell_parser,
    labelled,
    measure_missing,
    scores,
    sparse_folder,
    table,
    train,
)
from ranking import done
from ranking_sets import SETS, TRAIN, DataSet

from volumen.config.manager import ConfigManager
from volumen.inference.predictor import load_predictor
from volumen.suggestion.pseudo_labels import write_pseudo_labels
from volumen.utils.boxes import Box

TEACHER: dict[str, dict[str, Any]] = {
    "teacher": {"ratio": 1.0},
    "teacher-sure": {"ratio": 1.0, "uncertainty": True},
    "teacher-mixed": {},
}
DECAY = 0.99
ROUNDS = "rounds"
ARMS = (ALONE, "average", *TEACHER, ROUNDS)
SHAPES = ("slices", "boxes", "volumes")
Parts = Callable[[Box, float, np.random.Generator], Sequence[tuple[slice, ...]]]


def arm_settings(arm: str, batch: int) -> dict[str, Any]:
    """Return the settings of an arm.

    Args:
        arm: one of `ARMS`.
        batch: labelled patches of a batch.
    """
    if arm == "average":
        return {"tr_config": {"ema_decay": DECAY}}
    if arm in TEACHER:
        return {
            "tr_config": {"ema_decay": DECAY, "unlabelled": {"ratio": max(1.0, 2.0 / batch), **TEACHER[arm]}}
        }
    return {}


def labelled_box(box: Box, share: float, rng: np.random.Generator) -> list[tuple[slice, ...]]:
    """Return a box of about a share of another one, with the same proportions."""
    part = share ** (1 / len(box))
    sides = [min(stop - start, max(1, round(part * (stop - start)))) for start, stop in box]
    starts = [start + int(rng.integers(stop - start - side + 1)) for (start, stop), side in zip(box, sides)]
    return [tuple(slice(start, start + side) for start, side in zip(starts, sides))]


def labelled_volumes(count: int, share: float, seed: int) -> Parts:
    """Return what labels a share of the volumes wholly, at least one, and the others not at all.

    Args:
        count: number of volumes, which have one box each.
        share: of them.
        seed: draws which ones.
    """
    chosen = set(np.random.default_rng(seed).permutation(count)[: max(1, round(share * count))].tolist())
    numbers = itertools.count()

    def parts(box: Box, share: float, rng: np.random.Generator) -> list[tuple[slice, ...]]:
        return [tuple(slice(start, stop) for start, stop in box)] if next(numbers) in chosen else []

    return parts


def measure(data: DataSet, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train a cell and return its row."""
    arm, seed = str(cell["arm"]), int(cell["seed"])
    percent, shape = str(cell["labels"]).split("% ")
    share = float(percent) / 100
    of_shape: dict[str, Parts] = {"slices": labelled, "boxes": labelled_box}
    if shape == "volumes":
        of_shape[shape] = labelled_volumes(sum(map(len, data.parts[TRAIN].values())), share, seed)
    more = arm_settings(arm, data.batch)
    with tempfile.TemporaryDirectory() as place:
        folder = sparse_folder(data, share, seed, Path(place, "data"), of_shape[shape])
        trial = train(data, folder, ALONE, seed, TRIAL_STEPS, str(Path(place, "trial")), more)[1]
        seconds = float(cell["seconds"])
        if arm == ROUNDS:
            last, spent = two_rounds(data, folder, seed, trial.step, seconds, place)
        else:
            steps = max(TRIAL_STEPS + 1, int(seconds / trial.step))
            last, clock = train(data, folder, ALONE, seed, steps, str(Path(place, "run")), more)
            spent = {"steps": len(clock.times) - 1, "cpu_seconds": round(clock.total, 1)}
        predictor = load_predictor(last_checkpoint(last))
    return {**cell, **spent, **scores(predictor, data)}


def two_rounds(
    data: DataSet, folder: str, seed: int, step: float, seconds: float, place: str
) -> tuple[ConfigManager, dict[str, Any]]:
    """Train two rounds.

    Args:
        data: the data set.
        folder: the same with few labels.
        seed: of the training.
        step: CPU seconds of a step on labelled patches.
        seconds: CPU seconds for all.
        place: folder for the runs.

    Returns:
        The last run, and the columns of the row that say what was spent.
    """
    half = max(TRIAL_STEPS + 1, int(seconds / 2 / step))
    first, clock = train(data, folder, ALONE, seed, half, str(Path(place, "first")), validates=True)
    started, pseudo = time.process_time(), Path(place, "pseudo")
    write_pseudo_labels(first.run_dir, pseudo, "cpu")
    spent = clock.total + time.process_time() - started
    more = {
        "tr_setup": {"checkpoint_path": str(last_checkpoint(first)), "load_weights_only": True},
        "tr_config": {"unlabelled": {"pseudo_labels": str(pseudo), "ratio": 1.0}},
    }
    # A batch has twice as many patches.
    left = max(TRIAL_STEPS + 1, int((seconds - spent) / (2 * step)))
    last, more_clock = train(data, folder, ALONE, seed, left, str(Path(place, "run")), more)
    steps = len(clock.times) + len(more_clock.times) - 2
    return last, {"steps": steps, "cpu_seconds": round(spent + more_clock.total, 1)}


def last_checkpoint(config: ConfigManager) -> Path:
    """Return the checkpoint of a run's last epoch."""
    return config.run_dir / f"{config.tr_setup.model_name}_{config.tr_config.max_epoch}.pth"


def main() -> None:
    """Measure the cells that the table lacks, or print it."""
    parser = cell_parser(__doc__, ARMS, (ALONE, "average", "teacher"), seconds=60)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["phantom"])
    parser.add_argument("--shares", type=float, nargs="+", default=[2, 5, 10], help="labelled, in percent")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["slices", "boxes"])
    options = parser.parse_args()
    if options.table:
        print(table(done(options.csv)))
        return
    labels = [f"{share:g}% {shape}" for share, shape in itertools.product(options.shares, options.shapes)]
    cells = (
        (name, labels_of, arm, seed, options.seconds)
        for seed, name, labels_of, arm in itertools.product(options.seeds, options.sets, labels, options.arms)
    )
    measure_missing(options, FIELDS, cells, measure, SCORES)


if __name__ == "__main__":
    main()
