# ruff: noqa: E402
"""Does pretraining without labels help where few labels are? Trains cells of data, labels, arm and seed.

    python benchmarks/pretraining_gain.py -o RUNS --csv benchmarks/results/pretraining_gain.csv
        --sets phantom --shares 0.05 --arms alone half --seeds 0 1 [--seconds 120]
    python benchmarks/pretraining_gain.py -o RUNS --csv ... --sets fib25 -i fib25=FIB25 -i neurons=FIB25_NEURONS
    python benchmarks/pretraining_gain.py -o RUNS --csv ... --table

All arms of a cell have the same CPU seconds in total, pretraining included, on one thread; each run first takes a few
steps to measure the cost of one, and its learning rate is annealed to its end. Pretraining sees the images of the
training part alone, none of the validation and the held-out part. Arms:

- alone: the label alone, all of the time.
- sawtooth: the same with the learning rates of a fine-tuning, on random weights: what the schedule does by itself.
- quarter, half: that share of the time is pretraining; then `--finetune` with its default schedule (sawtooth).
- half_plain: half of the time is pretraining; then the plain schedule.

Labels are whole slices or boxes of a share of the training part, others for every seed, the same for all arms of a
seed. The last checkpoint is scored on the held-out part as in `auxiliary_gain.py`. Each cell adds a row to the table
as soon as it is done, and a cell that is in it already is skipped. `--table` prints means, and for each arm the mean
difference to the label alone over the same seeds with its 95 % interval (Student's t), and the relative change of the
Dice error (1 - Dice) with the interval of the ratio's logarithm.
"""

from __future__ import annotations

import os

# Set before NumPy is imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import itertools
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auxiliary_gain import (
    ALONE,
    TRIAL_STEPS,
    StepClock,
    cell_parser,
    difference,
    measure_missing,
    scores,
    sparse_folder,
)
from ranking import done
from ranking_sets import TRAIN, DataSet
from scipy.stats import t as student

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.finetuning import with_pretrained
from volumen.config.manager import ConfigManager
from volumen.config.pretraining import PretrainingConfig
from volumen.data.sampling.split import Split
from volumen.inference.predictor import load_predictor
from volumen.run import run_bundle
from volumen.utils.bundle_root import configs_dir

EPOCHS = 20
FIELDS = ("set", "share", "arm", "seed", "seconds")
ARMS: dict[str, tuple[float, str]] = {
    ALONE: (0.0, "none"),
    "sawtooth": (0.0, "sawtooth"),
    "quarter": (0.25, "sawtooth"),
    "half": (0.5, "sawtooth"),
    "half_plain": (0.5, "none"),
}
"""Share of the time for pretraining, and `tr_config.finetune_schedule`, by arm."""
SHOWN = ("dice", "surface_dice@1", "cldice", "broken", "merged", "voi", "adapted_rand_error")


def sections_of(data: DataSet, seed: int, steps: int) -> dict[str, Any]:
    """Return the settings that pretraining and training share, for about this many steps."""
    epochs = EPOCHS if steps >= 2 * EPOCHS else 1
    return merge(
        shipped_sections(),
        {
            "tr_setup": {"seed": seed},
            "tr_config": {
                "patch_size": list(data.patch), "batch_size": data.batch, "max_epoch": epochs,
                "max_steps_per_epoch": max(1, round(steps / epochs)), "num_dataloader_workers": 0,
                "initial_lr": 0.003, "keep_checkpoints": 1, "augment_strength": 0.3, "val_every_n": 10**6,
                "losses": [{"name": "DiceCELoss"}],
            },
            "model_config": {
                "features_per_stage": [16, 32, 64, 128], "n_blocks_per_stage": [1, 2, 2, 2],
                "separate_decoders": False,
            },
            "dataset_config": {"min_labeled_ratio": 0.005},
        },
    )  # fmt: skip


def training_part(data: DataSet, seed: int) -> Split:
    """Return the split in which the training part trains and nothing validates."""
    return Split({name: list(found) for name, found in data.parts[TRAIN].items()}, {}, 1.0, seed)


def pretrain(data: DataSet, folder: str, seed: int, steps: int, output: str) -> tuple[Path, StepClock]:
    """Pretrain on the images of the training part; return the last checkpoint."""
    config = PretrainingConfig(
        **sections_of(data, seed, steps), dataset_dir=folder, output_dir=output, device="cpu",
        split=training_part(data, seed),
    )  # fmt: skip
    clock = StepClock()
    overlay = str(configs_dir() / "pretrain.yaml")
    run_bundle("train.yaml", [overlay], {"experiment": config, "config": config}, handlers=[clock])
    return config.run_dir / f"{config.tr_setup.model_name}_final.pth", clock


def train(
    data: DataSet, folder: str, seed: int, steps: int, output: str, schedule: str, start: Path | None
) -> tuple[Path, StepClock]:
    """Train on the labels; return the last checkpoint."""
    sections = sections_of(data, seed, steps)
    sections["tr_config"]["finetune_schedule"] = schedule
    if start is not None:
        sections["tr_setup"] |= {"checkpoint_path": str(start), "load_weights_only": True}
    config = ConfigManager(
        **sections, dataset_dir=folder, output_dir=output, device="cpu", split=training_part(data, seed)
    )
    config = with_pretrained(config)
    clock = StepClock()
    run_bundle("train.yaml", (), {"config": config}, handlers=[clock])
    return config.run_dir / f"{config.tr_setup.model_name}_final.pth", clock


def measure(data: DataSet, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Pretrain and train a cell and return its row."""
    seed, seconds = int(cell["seed"]), float(cell["seconds"])
    part, schedule = ARMS[str(cell["arm"])]
    row: dict[str, Any] = dict(cell)
    with tempfile.TemporaryDirectory() as place:
        folder = sparse_folder(data, float(cell["share"]), seed, Path(place, "data"))
        start, before = None, 0.0
        if part:
            step = pretrain(data, folder, seed, TRIAL_STEPS, str(Path(place, "pretrain_trial")))[1].step
            steps = max(1, int(part * seconds / step))
            start, clock = pretrain(data, folder, seed, steps, str(Path(place, "pretrain")))
            before, row["pretraining_steps"] = clock.total, len(clock.times) - 1
        options = (schedule, start)
        step = train(data, folder, seed, TRIAL_STEPS, str(Path(place, "trial")), *options)[1].step
        steps = max(1, int((seconds - before) / step))
        checkpoint, clock = train(data, folder, seed, steps, str(Path(place, "run")), *options)
        predictor = load_predictor(checkpoint)
    row.setdefault("pretraining_steps", 0)
    row |= {"steps": len(clock.times) - 1, "pretraining_seconds": round(before, 1)}
    row["cpu_seconds"] = round(before + clock.total, 1)
    return {**row, **scores(predictor, data)}


def error_change(ours: Sequence[float], alone: Sequence[float]) -> str:
    """Return the relative change of the Dice error with its 95 % interval, from paired logarithms."""
    logs = [math.log((1 - a) / (1 - b)) for a, b in zip(ours, alone, strict=True)]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return f"{math.expm1(mean):+.1%}"
    half = student.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.expm1(mean):+.1%} ({math.expm1(mean - half):+.1%} to {math.expm1(mean + half):+.1%})"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table: per cell the label alone, and the differences of the other arms to it."""
    head = ("set", "share", "seconds", "arm", "seeds", "steps", "error", *SHOWN)
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for place in dict.fromkeys((row["set"], row["share"], row["seconds"]) for row in rows):
        here = [row for row in rows if (row["set"], row["share"], row["seconds"]) == place]
        alone = {row["seed"]: row for row in here if row["arm"] == ALONE}
        for arm in dict.fromkeys(row["arm"] for row in here):
            mine = {row["seed"]: row for row in here if row["arm"] == arm and row["seed"] in alone}
            if not mine:
                continue
            pairs = {
                name: [(float(mine[seed][name]), float(alone[seed][name])) for seed in mine] for name in SHOWN
            }
            cells = [_cell(arm, values) for values in pairs.values()]
            error = "" if arm == ALONE else error_change(*zip(*pairs["dice"]))
            steps = round(statistics.mean(int(row["steps"]) for row in mine.values()))
            before = round(statistics.mean(int(row["pretraining_steps"]) for row in mine.values()))
            words = (*place, arm, len(mine), f"{before} + {steps}" if before else steps, error, *cells)
            lines.append(f"| {' | '.join(map(str, words))} |")
    return "\n".join(lines)


def _cell(arm: str, pairs: Sequence[tuple[float, float]]) -> str:
    if any(math.isnan(value) for pair in pairs for value in pair):
        return ""
    if arm == ALONE:
        return f"{statistics.mean(ours for ours, _ in pairs):.3g}"
    return difference([ours - alone for ours, alone in pairs])


def main() -> None:
    """Measure the cells that the table lacks, or print it."""
    parser = cell_parser(__doc__, ARMS, tuple(ARMS), seconds=120)
    parser.add_argument(
        "--sets", nargs="+", choices=["phantom", "fib25", "vnc", "drive"], default=["phantom"]
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.05], help="labelled share of the training part"
    )
    options = parser.parse_args()
    if options.table:
        print(table(done(options.csv)))
        return
    cells = (
        (name, share, arm, seed, options.seconds)
        for seed, name, share, arm in itertools.product(
            options.seeds, options.sets, options.shares, options.arms
        )
    )
    measure_missing(options, FIELDS, cells, measure, SHOWN)


if __name__ == "__main__":
    main()
