# ruff: noqa: E402
"""Do derived targets help the label? Trains cells of data, labels, targets and seed; counts errors on a held-out part.

    python benchmarks/auxiliary_gain.py -o RUNS --csv benchmarks/results/auxiliary_gain.csv
        --sets phantom --labels tenth --arms alone distance several --seeds 0 1 [--seconds 25]
    python benchmarks/auxiliary_gain.py -o RUNS --csv ... --sets fib25 -i fib25=FIB25 -i neurons=FIB25_NEURONS
    python benchmarks/auxiliary_gain.py -o RUNS --csv ... --table

Every cell first takes a few steps to measure the cost of one, then trains for as many steps as fit into the CPU time,
with the learning rate annealed to their end: targets that make a step longer get fewer steps. One thread. `labels` says
what is labelled of the training part: everything, or whole slices or boxes of a tenth or a fiftieth of it, others for
every seed; networks and labels are the same for all arms of a seed. The last checkpoint is scored on the held-out part
(`ranking_sets.py`): Dice, surface Dice at one voxel, clDice, and what a person counts, with the threshold and the
smallest size that are best on the validation part, which is labelled in full. Each cell adds a row to the table as soon
as it is done, and a cell that is in it already is skipped. `--table` prints means, and for each arm the mean difference
to the label alone over the same seeds with its 95 % interval (Student's t).
"""

from __future__ import annotations

import os

# Set before NumPy is imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from ignite.engine import Engine, Events
from ranking import append, done, probabilities
from ranking_sets import COUNTED, HELD_OUT, SETS, TRAIN, VALID, DataSet, enclosed
from scipy.stats import t as student

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.data.layout import discover, open_cases
from volumen.data.sampling.split import Split
from volumen.data.validity import inside_mask
from volumen.inference.predictor import Predictor, load_predictor
from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.objects.errors import object_errors
from volumen.metrics.objects.scores import object_score
from volumen.metrics.target_metrics import build_metrics
from volumen.phantom.volume import write_ome_zarr
from volumen.run import run_bundle
from volumen.utils.boxes import Box

TRIAL_STEPS, WARM_UP, EPOCHS = 12, 4, 10
SHARES = {"full": 1.0, "tenth": 0.1, "fiftieth": 0.02}
SLAB = 5
"""Slices of a labelled slab; at a fiftieth single slices are labelled."""
WEIGHT = 0.3
"""Of each derived target in the total."""
ALONE = "alone"
FIELDS = ("set", "labels", "arm", "seed", "seconds")
LABEL_SCORES = ("dice", "surface_dice@1", "cldice")
SCORES = (*LABEL_SCORES, *COUNTED, "adapted_rand_error")
TASKS: dict[str, dict[str, Any]] = {
    "distance": {"type": "distance_transform", "losses": [{"name": "SignedDistanceLoss"}]},
    "normals": {"type": "surface_normals", "losses": [{"name": "CosineSimilarityLoss"}]},
    "tensor": {"type": "structure_tensor", "losses": [{"name": "MaskedMSELoss"}]},
    "direction": {"type": "inplane_direction", "losses": [{"name": "CosineSimilarityLoss"}]},
    "skeleton": {
        "type": "skeleton", "losses": [{"name": "BCEWithLogitsLoss", "kwargs": {"pos_weight": 3.0}}],
    },
    "boundary": {"type": "boundary", "losses": [{"name": "SoftDiceLoss"}]},
    "affinities": {"type": "affinities", "offsets": "auto", "losses": [{"name": "BCEWithLogitsLoss"}]},
}  # fmt: skip
SEVERAL = ("distance", "normals", "skeleton")
FIELD_LOSSES: list[dict[str, Any]] = [
    {"name": "DiceCELoss"},
    {"name": "FieldWeightedLoss", "kwargs": {"gain": 4.0}, "field": "thin"},
    {"name": "SkeletonRecallLoss", "weight": 0.5, "field": "middle"},
]
ARMS = (ALONE, *TASKS, "several", "fused", "aligned", "losses")


def arm_sections(arm: str, target: str) -> dict[str, Any]:
    """Return the settings of an arm: of derived targets, of the label's losses, of fusion or balancing."""
    if arm == "losses":
        fields = {"thin": {"type": "critical"}, "middle": {"type": "skeleton"}}
        tasks = {name: {**task, "source_target": target, "head": False} for name, task in fields.items()}
        return {
            "auxiliary_tasks": tasks,
            "dataset_config": {"targets": {target: {"losses": FIELD_LOSSES}}},
        }
    names = {ALONE: (), "several": SEVERAL, "fused": SEVERAL, "aligned": SEVERAL}.get(arm, (arm,))
    tasks = {name: {**TASKS[name], "source_target": target, "loss_weight": WEIGHT} for name in names}
    sections: dict[str, Any] = {"auxiliary_tasks": tasks}
    if arm == "fused":
        sections["dataset_config"] = {"targets": {target: {"fuse": "auto"}}}
    if arm == "aligned":
        sections["tr_config"] = {"loss_balancing": "aligned"}
    return sections


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


def labelled(box: Box, share: float, rng: np.random.Generator) -> list[tuple[slice, ...]]:
    """Return the labelled parts of a box: whole slices in 3D, a box in 2D and in volumes of few slices.

    Args:
        box: start and stop along every axis.
        share: of its voxels, at most 1.
        rng: draws where they lie.
    """
    whole = tuple(slice(start, stop) for start, stop in box)
    depth = box[0][1] - box[0][0]
    if share >= 1:
        return [whole]
    if len(box) == 3 and depth >= 2 / share:
        thick = SLAB if depth * share >= SLAB else max(1, round(depth * share))
        period = round(thick / share)
        first = box[0][0] + int(rng.integers(max(1, min(period, depth) - thick)))
        return [(slice(z, z + thick), *whole[1:]) for z in range(first, box[0][1] - thick + 1, period)]
    if len(box) == 3 and depth * share >= 1:
        z = box[0][0] + int(rng.integers(depth - round(depth * share) + 1))
        return [(slice(z, z + round(depth * share)), *whole[1:])]
    part = math.sqrt(share)
    sides = [max(1, round(part * (stop - start))) for start, stop in box[-2:]]
    starts = [
        start + int(rng.integers(stop - start - side + 1)) for (start, stop), side in zip(box[-2:], sides)
    ]
    return [(*whole[:-2], *(slice(start, start + side) for start, side in zip(starts, sides)))]


def sparse_folder(
    data: DataSet, share: float, seed: int, folder: Path, parts: Callable[..., Sequence[Any]] = labelled
) -> str:
    """Return a data folder in which only a share of the training part is labelled; the rest is as in the original.

    Images and labels are links, masks are written.

    Args:
        data: the data set.
        share: of the voxels of the training part.
        seed: draws what is labelled.
        folder: new folder.
        parts: returns the labelled parts of a box, as `labelled` does.
    """
    if share >= 1:
        return data.folder
    rng = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
        for path in sorted(Path(data.folder, kind).iterdir()):
            (folder / kind / path.name).symlink_to(path.resolve())
    (folder / "masks").mkdir()
    for case in open_cases(discover(data.folder)):
        shape = case.image.shape
        region = tuple(slice(0, size) for size in shape)
        mask = case.masks.get(data.target)
        known = np.ones(shape, bool) if mask is None else inside_mask(mask.read(region))
        allowed = known.copy()
        for box in data.parts[TRAIN].get(case.name, ()):
            known[tuple(slice(start, stop) for start, stop in box)] = False
            for part in parts(box, share, rng):
                known[part] = allowed[part]
        name = folder / "masks" / f"{case.name}_{data.target}"
        if known.ndim == 3:
            write_ome_zarr(name.with_suffix(".zarr"), known.astype(np.uint8))
        else:
            tifffile.imwrite(name.with_suffix(".tif"), known.astype(np.uint8))
    return str(folder)


def train(
    data: DataSet,
    folder: str,
    arm: str,
    seed: int,
    steps: int,
    output: str,
    more: Mapping[str, Any] | None = None,
    validates: bool = False,
) -> tuple[ConfigManager, StepClock]:
    """Train an arm for about this many steps, with further settings, and on request with a validation part."""
    epochs = EPOCHS if steps >= 4 * EPOCHS else 1
    sections = {
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
    }  # fmt: skip
    # A fusion is fitted on the validation part, after the last step.
    parts = [{name: list(found) for name, found in data.parts[part].items()} for part in (TRAIN, VALID)]
    valid = parts[1] if validates or (arm == "fused" and steps > TRIAL_STEPS) else {}
    config = ConfigManager(
        **merge(merge(merge(shipped_sections(), sections), arm_sections(arm, data.target)), more or {}),
        dataset_dir=folder, output_dir=output, device="cpu", split=Split(parts[0], valid, 1.0, seed),
    )  # fmt: skip
    clock = StepClock()
    run_bundle("train.yaml", (), {"config": config}, handlers=[clock])
    return config, clock


def measure(data: DataSet, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train a cell and return its row."""
    arm, seed = str(cell["arm"]), int(cell["seed"])
    with tempfile.TemporaryDirectory() as place:
        folder = sparse_folder(data, SHARES[str(cell["labels"])], seed, Path(place, "data"))
        step = train(data, folder, arm, seed, TRIAL_STEPS, str(Path(place, "trial")))[1].step
        steps = max(TRIAL_STEPS + 1, int(float(cell["seconds"]) / step))
        config, clock = train(data, folder, arm, seed, steps, str(Path(place, "run")))
        name = f"{config.tr_setup.model_name}_{config.tr_config.max_epoch}.pth"
        predictor = load_predictor(config.run_dir / name)
    spent = {"steps": len(clock.times) - 1, "cpu_seconds": round(clock.total, 1)}
    return {**cell, **spent, **scores(predictor, data)}


def scores(predictor: Predictor, data: DataSet) -> dict[str, float]:
    """Return the scores of the held-out part, see `SCORES`; NaN for what the data set has not."""
    pieces = {part: list(data.pieces(part)) for part in (VALID, HELD_OUT)}
    found = {part: probabilities(predictor, data, pieces[part]) for part in pieces}
    (head,) = predictor.heads([data.target])
    section = {data.target: {"kind": head.kind, "out_channels": head.channels}}
    metrics = build_metrics(section, None, names=list(LABEL_SCORES))
    for number, (pred, piece) in enumerate(zip(found[HELD_OUT], pieces[HELD_OUT], strict=True)):
        metrics.update(
            {data.target: pred[None]}, {data.target: piece.label[None, None]},
            {data.target: piece.known[None, None]}, cases=[number],
        )  # fmt: skip
    measured = metrics.compute()
    row = {name: measured[f"{data.target}/{name}"] for name in LABEL_SCORES}
    tried = data.settings()
    counts = [data.count(found[VALID], pieces[VALID], one)["errors"] for one in tried]
    best = tried[min(range(len(tried)), key=counts.__getitem__)]
    row |= data.count(found[HELD_OUT], pieces[HELD_OUT], best)
    row["adapted_rand_error"] = rand_error(data, found[HELD_OUT], pieces[HELD_OUT], best)
    return row


def rand_error(data: DataSet, found: Sequence[np.ndarray], pieces: Sequence[Any], best: Mapping) -> float:
    """Return the mean adapted Rand error of the instances that the target encloses; NaN without instances."""
    if not data.objects:
        return math.nan
    tables = [
        overlaps(enclosed(data.target, one, best), piece.objects, piece.sure)
        for one, piece in zip(found, pieces, strict=True)
    ]
    return statistics.mean(object_score("adapted_rand_error", one, object_errors(one)) for one in tables)


def fewer_settings(data: DataSet) -> DataSet:
    """Return a data set of which three thresholds and two sizes are tried."""
    grid = {
        name: values[1::3] if name == "threshold" and len(values) > 3 else values
        for name, values in data.grid.items()
    }
    if "min_size" in grid:
        grid["min_size"] = grid["min_size"][::2]
    return dataclasses.replace(data, grid=grid)


def difference(values: Sequence[float]) -> str:
    """Return the mean of paired differences with its 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3g}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3g} ({mean - half:+.3g} to {mean + half:+.3g})"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table: per cell the label alone, and the differences of the other arms to it."""
    shown = ("dice", "surface_dice@1", "cldice", "broken", "merged", "voi", "adapted_rand_error")
    lines = [
        f"| set | labels | targets | seeds | steps | {' | '.join(shown)} |",
        "| --- " * (5 + len(shown)) + "|",
    ]
    for place in dict.fromkeys((row["set"], row["labels"], row["seconds"]) for row in rows):
        here = [row for row in rows if (row["set"], row["labels"], row["seconds"]) == place]
        alone = {row["seed"]: row for row in here if row["arm"] == ALONE}
        for arm in dict.fromkeys(row["arm"] for row in here):
            mine = {row["seed"]: row for row in here if row["arm"] == arm}
            seeds = [seed for seed in mine if arm == ALONE or seed in alone]
            if not seeds:
                continue
            cells = []
            for name in shown:
                values = [float(mine[seed][name]) for seed in seeds]
                if arm != ALONE:
                    values = [value - float(alone[seed][name]) for seed, value in zip(seeds, values)]
                if any(map(math.isnan, values)):
                    cells.append("")
                else:
                    cells.append(f"{statistics.mean(values):.3g}" if arm == ALONE else difference(values))
            steps = round(statistics.mean(int(mine[seed]["steps"]) for seed in seeds))
            lines.append(
                f"| {place[0]} | {place[1]} | {arm} | {len(seeds)} | {steps} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def cell_parser(
    text: str | None, arms: Iterable[str], default: Sequence[str], seconds: int
) -> ArgumentParser:
    """Return a parser of the options that all benchmarks of cells have.

    Args:
        text: what the benchmark does.
        arms: what may be compared.
        default: what is compared by default.
        seconds: CPU seconds of a cell by default.
    """
    parser = ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "-i", "--input", action="append", default=[], metavar="NAME=FOLDER", help="data folders"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the phantom")
    parser.add_argument("--csv", type=Path, required=True, help="table that gets a row per cell")
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(default))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--seconds", type=int, default=seconds, help=f"CPU seconds per cell (default: {seconds})"
    )
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    return parser


def measure_missing(
    options: Namespace,
    fields: Sequence[str],
    cells: Iterable[Sequence[Any]],
    measure: Callable[[DataSet, Mapping[str, Any]], dict[str, Any]],
    shown: Sequence[str],
) -> None:
    """Measure the cells that the table lacks, and add a row for each as soon as it is done.

    The table is read before every cell, so that several processes may share it.

    Args:
        options: of `cell_parser`.
        fields: columns that name a cell; the first is the data set.
        cells: their values.
        measure: returns the row of a cell.
        shown: columns that are printed besides.
    """
    torch.set_num_threads(1)
    folders = dict(entry.split("=", 1) for entry in options.input)
    sources = {name: (folders.get(name),) for name in SETS} | {
        "phantom": (options.output / "phantom",),
        "fib25": (folders.get("fib25"), folders.get("neurons")),
    }
    for values in cells:
        if tuple(map(str, values)) in {tuple(row[key] for key in fields) for row in done(options.csv)}:
            continue
        row = measure(fewer_settings(SETS[values[0]](*sources[values[0]])), dict(zip(fields, values)))
        append(options.csv, row)
        print({key: value for key, value in row.items() if key in (*fields, "steps", *shown)}, flush=True)


def main() -> None:
    """Measure the cells that the table lacks, or print it."""
    parser = cell_parser(__doc__, ARMS, ARMS, seconds=60)
    parser.add_argument(
        "--sets", nargs="+", choices=["phantom", "fib25", "vnc", "drive"], default=["phantom"]
    )
    parser.add_argument("--labels", nargs="+", choices=list(SHARES), default=list(SHARES))
    options = parser.parse_args()
    if options.table:
        print(table(done(options.csv)))
        return
    cells = (
        (name, labels, arm, seed, options.seconds)
        for seed, name, labels, arm in itertools.product(
            options.seeds, options.sets, options.labels, options.arms
        )
    )
    measure_missing(options, FIELDS, cells, measure, SCORES)


if __name__ == "__main__":
    main()
