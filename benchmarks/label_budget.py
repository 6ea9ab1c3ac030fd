# ruff: noqa: E402
"""How many labelled voxels does a score need? A simulated annotator labels the boxes that a strategy suggests.

    python benchmarks/label_budget.py hippocampus -i HIPPOCAMPUS -o RUNS --csv benchmarks/results/label_budget.csv
    python benchmarks/label_budget.py drive -i DRIVE -o RUNS --csv benchmarks/results/label_budget.csv

Training starts from random boxes with about 1 % of the voxels, the same for every strategy, in which all classes occur.
Then, in every round, `volumen suggest` suggests boxes by the network of the round before, their truth is painted,
`volumen suggest --accept` takes them back, and a network is trained from scratch for the same number of steps with one
thread. There is no validation part: the last checkpoint counts. The score is the Dice of each class over all voxels of
images that are never trained on. A row is added per round; rows that the table has are not computed again, so the
benchmark can be interrupted. The set `summary` prints the means and draws the curves (`--picture`).
"""

from __future__ import annotations

import os

# Set before NumPy is imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.data.layout import OpenCase, discover, open_cases
from volumen.inference.predictor import Predictor, load_predictor, predict_array
from volumen.run import run_bundle
from volumen.suggestion.accept import accept
from volumen.suggestion.crops import create_volume
from volumen.suggestion.labelled import HowOpened, find_images, open_images
from volumen.suggestion.record import BOXES
from volumen.suggestion.request import AcceptRequest, SuggestRequest
from volumen.suggestion.store import Painted, write_in_place
from volumen.suggestion.subject import LabelForm
from volumen.suggestion.suggest import suggest

STRATEGIES = ("random", "foreground", "entropy", "power")
FIELDS = [
    "set", "strategy", "seed", "round", "boxes", "labelled_share", "foreground_share", "dice", "dice_by_class",
    "steps", "cpu_minutes",
]  # fmt: skip
COLOURS = {"random": "#888888", "foreground": "#0072b2", "entropy": "#d55e00", "power": "#009e73"}
EPOCHS = 2


@dataclass(frozen=True)
class Setting:
    """A data set and how it is trained.

    Args:
        target: the labelled target.
        classes: its foreground classes.
        box: voxels of a box per axis.
        patch: voxels of a patch.
        features: width of the network per stage.
        steps: optimizer steps of each training.
        train, test: parts of the sorted images, or of the first axis of a single one.
        split_axis: axis along which a single volume is divided; None: whole images.
    """

    target: str
    classes: int
    box: tuple[int, ...]
    patch: tuple[int, ...]
    features: tuple[int, ...]
    steps: int
    train: slice
    test: slice
    split_axis: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


SETS = {
    "hippocampus": Setting(
        "hippocampus", 2, (12, 12, 12), (24, 24, 24), (8, 16, 32), 600, slice(0, 30), slice(85, 100)
    ),
    "drive": Setting("vessel", 1, (48, 48), (96, 96), (8, 16, 32), 900, slice(0, 12), slice(12, 20)),
    "fib25": Setting(
        "membrane", 1, (16, 16, 16), (32, 32, 32), (8, 16, 32), 150, slice(0, 150), slice(160, 250), split_axis=2
    ),
    "vnc": Setting(
        "mito", 1, (4, 48, 48), (8, 96, 96), (8, 16, 32), 150, slice(0, 600), slice(650, 1024), split_axis=2
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """An image with its whole label, in memory: (C, *space), and where it is scored."""

    name: str
    image: np.ndarray
    label: np.ndarray
    known: np.ndarray
    case: OpenCase


def read_pieces(setting: Setting, folder: Path) -> tuple[list[Piece], list[Piece]]:
    """Return the images to train on and those to score."""
    cases = sorted(open_cases(discover(folder, allow_unlabeled=True)), key=lambda case: case.name)
    if setting.split_axis is None:
        parts = [[(case, None) for case in cases[part]] for part in (setting.train, setting.test)]
    else:
        parts = [[(cases[0], part)] for part in (setting.train, setting.test)]
    train, test = ([_piece(case, part, setting) for case, part in pairs] for pairs in parts)
    return train, test


def _piece(case: OpenCase, part: slice | None, setting: Setting) -> Piece:
    region = [slice(0, n) for n in case.image.shape]
    if part is not None and setting.split_axis is not None:
        region[setting.split_axis] = part
    there = tuple(region)
    mask = case.masks.get(setting.target)
    label = case.labels[setting.target].read(there)
    if setting.classes == 1:
        label = (label > 0).astype(np.uint8)
    known = np.ones(label.shape[1:], bool) if mask is None else mask.read(there)[0] > 0
    return Piece(case.name, case.image.read(there), label.astype(np.uint8), known, case)


def start_data(setting: Setting, pieces: Sequence[Piece], seed: int, number: int, data: Path) -> None:
    """Write the images, and random boxes with their truth in which every class occurs."""
    for piece in pieces:
        array = create_volume(
            data / "images" / f"{piece.name}.zarr", piece.image.shape[1:], piece.image.dtype, piece.case.image.geometry,
            channels=len(piece.image),
        )  # fmt: skip
        array[...] = piece.image if len(piece.image) > 1 else piece.image[0]
    rng = np.random.default_rng(seed)
    while True:
        regions = [_random_box(pieces, setting, rng) for _ in range(number)]
        found = np.unique(np.concatenate([pieces[n].label[(0, *box)].ravel() for n, box in regions]))
        if set(range(1, setting.classes + 1)) <= set(found.tolist()):
            break
    images = {
        image.name: image
        for image in open_images(find_images(str(data)), [LabelForm(setting.target, ())], HowOpened())
    }
    painted: dict[tuple[str, str], list[Painted]] = {}
    for n, box in regions:
        label = pieces[n].label[(slice(None), *box)]
        one = Painted(box, label, np.ones(label.shape[1:], bool))
        painted.setdefault((pieces[n].name, setting.target), []).append(one)
    write_in_place(data, images, painted)


def _random_box(
    pieces: Sequence[Piece], setting: Setting, rng: np.random.Generator
) -> tuple[int, tuple[slice, ...]]:
    n = int(rng.integers(len(pieces)))
    shape = pieces[n].label.shape[1:]
    sides = [min(side, size) for side, size in zip(setting.box, shape, strict=True)]
    starts = [int(rng.integers(size - side + 1)) for side, size in zip(sides, shape, strict=True)]
    return n, tuple(slice(a, a + side) for a, side in zip(starts, sides, strict=True))


def train(setting: Setting, data: Path, run: Path, seed: int) -> tuple[Path, float]:
    """Train from scratch; return the last checkpoint and the CPU minutes."""
    target: dict[str, Any] = {"kind": "binary"}
    if setting.classes > 1:
        target = {"kind": "multiclass", "out_channels": setting.classes + 1}
    settings = {
        "tr_setup": {"seed": seed, "tr_val_split": 1.0},
        "tr_config": {
            "patch_size": list(setting.patch),
            "batch_size": 4,
            "max_epoch": EPOCHS,
            "max_steps_per_epoch": setting.steps // EPOCHS,
            "num_dataloader_workers": 0,
            "initial_lr": 3e-3,
            "amp": "off",
        },
        "model_config": {
            "features_per_stage": list(setting.features),
            "n_blocks_per_stage": [1, 2, 2][: len(setting.features)],
        },
        "dataset_config": {
            "targets": {setting.target: target}, "min_labeled_ratio": 0.02, "allow_unlabeled_data": True,
            "cache_valid_patches": False,
        },
    }  # fmt: skip
    sections = merge(shipped_sections(), settings)
    shutil.rmtree(run, ignore_errors=True)
    config = ConfigManager(**sections, dataset_dir=str(data), output_dir=str(run), device="cpu")
    start = time.process_time()
    run_bundle("train.yaml", (), {"config": config})
    minutes = (time.process_time() - start) / 60
    return config.run_dir / f"{config.tr_setup.model_name}_{EPOCHS}.pth", minutes


def score(setting: Setting, predictor: Predictor, pieces: Sequence[Piece]) -> list[float]:
    """Return the Dice of each foreground class over the known voxels of all images."""
    both = np.zeros(setting.classes)
    sizes = np.zeros(setting.classes)
    for piece in pieces:
        found = predict_array(predictor, piece.image, targets=[setting.target], overlap=0.25)[setting.target]
        decided = np.asarray(found).argmax(axis=0) if setting.classes > 1 else np.asarray(found)[0] >= 0.5
        for number in range(setting.classes):
            one = (decided == number + 1) & piece.known
            other = (piece.label[0] == number + 1) & piece.known
            both[number] += (one & other).sum()
            sizes[number] += one.sum() + other.sum()
    return [float(2 * b / s) if s else float("nan") for b, s in zip(both, sizes, strict=True)]


def labelled_shares(setting: Setting, data: Path, pieces: Sequence[Piece]) -> tuple[float, float]:
    """Return the labelled share of all voxels, and that of the foreground."""
    counts = np.zeros(4)
    for piece in pieces:
        path = data / "masks" / f"{piece.name}_{setting.target}.zarr"
        mask = np.zeros(piece.label.shape[1:], bool)
        if path.exists():
            mask = np.asarray(zarr.open_array(path / "0", mode="r")) > 0
        foreground = piece.label[0] > 0
        counts += (mask.sum(), mask.size, (mask & foreground).sum(), foreground.sum())
    return float(counts[0] / counts[1]), float(counts[2] / counts[3])


def annotate(setting: Setting, pieces: Sequence[Piece], folder: Path) -> None:
    """Paint the suggested boxes with their truth and mark them as done."""
    from volumen.suggestion.record import read_record

    by_name = {piece.name: piece for piece in pieces}
    for box in read_record(folder).boxes:
        place = folder / BOXES / box.folder
        truth = by_name[box.volume].label[(0, *(slice(*side) for side in box.box))]
        zarr.open_array(place / f"{setting.target}.zarr" / "0", mode="r+")[...] = truth
        (place / "done").touch()


class Table:
    """The CSV of results, a row per cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as stream:
                self.rows = list(csv.DictReader(stream))

    def has(self, *cell: object) -> bool:
        """Whether a cell (set, strategy, seed, round) is done."""
        return tuple(map(str, cell)) in {tuple(row[name] for name in FIELDS[:4]) for row in self.rows}

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row to the file."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({key: str(value) for key, value in row.items()})


def one_round(
    name: str,
    strategy: str,
    seed: int,
    number: int,
    folder: Path,
    parts: tuple[list[Piece], list[Piece]],
    table: Table,
) -> None:
    """Train and score a round, if the table lacks it or the next round needs its network."""
    setting = SETS[name]
    data, run = folder / f"data_{number}", folder / f"run_{number}"
    checkpoint = run / "model" / f"model_{EPOCHS}.pth"
    if table.has(name, strategy, seed, number) and checkpoint.exists():
        return
    checkpoint, minutes = train(setting, data, run, seed)
    dice = score(setting, load_predictor(checkpoint), parts[1])
    share, foreground = labelled_shares(setting, data, parts[0])
    if not table.has(name, strategy, seed, number):
        table.add(
            {
                "set": name, "strategy": strategy, "seed": seed, "round": number, "boxes": boxes_of(setting, parts[0]),
                "labelled_share": f"{share:.5f}", "foreground_share": f"{foreground:.5f}",
                "dice": f"{np.mean(dice):.4f}", "dice_by_class": " ".join(f"{value:.4f}" for value in dice),
                "steps": setting.steps, "cpu_minutes": f"{minutes:.2f}",
            }
        )  # fmt: skip


def boxes_of(setting: Setting, pieces: Sequence[Piece]) -> int:
    """Return the boxes that are 1 % of the voxels."""
    voxels = sum(piece.known.size for piece in pieces)
    return max(2, round(0.01 * voxels / np.prod(setting.box)))


def run_cell(
    name: str,
    strategy: str,
    seed: int,
    rounds: int,
    runs: Path,
    parts: tuple[list[Piece], list[Piece]],
    table: Table,
) -> None:
    """Run all rounds of a strategy; the start is the same for every strategy and trained once."""
    setting, number = SETS[name], boxes_of(SETS[name], parts[0])
    start = runs / name / f"start_{seed}"
    if not (start / "data_0" / "masks").exists():
        shutil.rmtree(start, ignore_errors=True)
        start_data(setting, parts[0], seed, number, start / "data_0")
    one_round(name, "start", seed, 0, start, parts, table)
    folder = runs / name / f"{strategy}_{seed}"
    for step in range(1, rounds + 1):
        if all(table.has(name, strategy, seed, later) for later in range(step, rounds + 1)):
            return
        before = start if step == 1 else folder
        data = folder / f"data_{step}"
        if not data.exists():
            suggestions = folder / f"suggestions_{step}"
            earlier = before / f"data_{step - 1}"
            checkpoint = before / f"run_{step - 1}" / "model" / f"model_{EPOCHS}.pth"
            request = SuggestRequest(
                str(checkpoint), str(earlier), str(suggestions), number, setting.box, strategy=strategy,  # type: ignore[arg-type]
                overlap=0.25, seed=1000 * seed + step, device="cpu", workers=1,
            )  # fmt: skip
            suggest(request)
            annotate(setting, parts[0], suggestions)
            accept(AcceptRequest(str(suggestions), str(earlier), str(data)))
            shutil.rmtree(suggestions)
        one_round(name, strategy, seed, step, folder, parts, table)


def finished_seeds(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of seeds that have every round of every strategy, so that all means are over the same seeds."""
    most = max(int(row["round"]) for row in rows)
    number: dict[tuple[str, str], int] = {}
    for row in rows:
        number[row["set"], row["seed"]] = number.get((row["set"], row["seed"]), 0) + 1
    return [row for row in rows if number[row["set"], row["seed"]] == 1 + most * len(STRATEGIES)]


def summary(table: Table, picture: Path | None) -> None:
    """Print the mean Dice of finished seeds by set, round and strategy, and draw the curves."""
    from statistics import fmean, stdev

    lines = {}
    finished = finished_seeds(table.rows)
    for name in dict.fromkeys(row["set"] for row in finished):
        rows = [row for row in finished if row["set"] == name]
        for strategy in ("start", *STRATEGIES):
            for number in sorted({int(row["round"]) for row in rows if row["strategy"] == strategy}):
                own = [row for row in rows if row["strategy"] == strategy and int(row["round"]) == number]
                dice = [float(row["dice"]) for row in own]
                shares = [
                    fmean(float(row[key]) for row in own) for key in ("labelled_share", "foreground_share")
                ]
                spread = stdev(dice) if len(dice) > 1 else float("nan")
                lines[name, strategy, number] = (shares[0], fmean(dice), spread)
                print(
                    f"{name:12} {strategy:11} round {number}: {100 * shares[0]:5.2f} % of voxels,"
                    f" {100 * shares[1]:5.1f} % of foreground, Dice {fmean(dice):.3f} +- {spread:.3f} ({len(dice)})"
                )
    for line in mean_over_rounds(finished):
        print(line)
    if picture is not None:
        _draw(lines, picture)


def mean_over_rounds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table: the mean Dice over all rounds, and its difference to random boxes of the same seed."""
    lines = [
        "| set | strategy | mean Dice over the rounds | over random, per seed |",
        "| --- | --- | --- | --- |",
    ]
    scores: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row["set"], row["strategy"], row["seed"]), []).append(float(row["dice"]))
    means = {key: sum(each) / len(each) for key, each in scores.items()}
    for name in dict.fromkeys(row["set"] for row in rows):
        seeds = sorted({key[2] for key in means if key[0] == name})
        for strategy in STRATEGIES:
            own = [means[name, strategy, seed] for seed in seeds]
            gains = [f"{mean - means[name, 'random', seed]:+.3f}" for mean, seed in zip(own, seeds)]
            told = "" if strategy == "random" else ", ".join(gains)
            lines.append(f"| {name} | {strategy} | {sum(own) / len(own):.3f} | {told} |")
    return lines


def _draw(lines: Mapping[tuple[str, str, int], tuple[float, float, float]], path: Path) -> None:
    """Write an SVG: Dice against labelled voxels, a panel per set, a line with standard deviations per strategy."""
    width, height, left, low = 350, 230, 48, 36
    names = list(dict.fromkeys(key[0] for key in lines))
    parts = []
    for place, name in enumerate(names):
        own = {key: value for key, value in lines.items() if key[0] == name}
        xs, ys = ([value[n] for value in own.values()] for n in (0, 1))
        x_most, y_least, y_most = max(xs) * 1.05, min(ys) - 0.02, max(ys) + 0.02

        def point(x: float, y: float) -> tuple[float, float]:
            across = (width - left - 24) * x / x_most  # noqa: B023
            up = (height - low - 20) * (y - y_least) / (y_most - y_least)  # noqa: B023
            return left + across, height - low - up

        panel = [
            f'<text x="{width / 2:.0f}" y="14" text-anchor="middle">{name}: Dice by labelled voxels</text>'
        ]
        for value in np.linspace(y_least, y_most, 5):
            y = point(0, float(value))[1]
            panel.append(
                f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#ddd"/><text x="4" y="{y + 4:.1f}">{value:.2f}</text>'
            )
        for value in np.linspace(0, x_most, 5):
            x = point(float(value), y_least)[0]
            panel.append(
                f'<text x="{x:.1f}" y="{height - 20}" text-anchor="middle">{100 * value:.1f} %</text>'
            )
        for number, (strategy, colour) in enumerate(COLOURS.items()):
            keys = [key for key in own if key[1] in ("start", strategy)]
            points = [point(own[key][0], own[key][1]) for key in keys]
            drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            panel.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for key, (x, _) in zip(keys, points, strict=True):
                spread = 0.0 if np.isnan(own[key][2]) else own[key][2]
                ends = [point(0, own[key][1] + sign * spread)[1] for sign in (-1, 1)]
                panel.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>')
            panel.append(
                f'<text x="{left + 8 + 70 * number}" y="{height - 4}" fill="{colour}">{strategy}</text>'
            )
        parts.append(f'<g transform="translate({place * width} 0)">{"".join(panel)}</g>')
    size = f'width="{width * len(names)}" height="{height}"'
    style = 'font-family="sans-serif" font-size="11"'
    page = '<rect width="100%" height="100%" fill="white"/>'  # dark pages have light text
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{page}{"".join(parts)}</svg>\n')


def main() -> None:
    """Run the cells that the table lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=[*SETS, "summary"])
    parser.add_argument("-i", "--input", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="folder for runs; needed again to go on")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--picture", type=Path, help="SVG of the summary")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(options.csv)
    if options.set == "summary":
        summary(table, options.picture)
        return
    parts = read_pieces(SETS[options.set], options.input)
    for seed in options.seeds:
        for strategy in options.strategies:
            run_cell(options.set, strategy, seed, options.rounds, options.output, parts, table)


if __name__ == "__main__":
    main()
