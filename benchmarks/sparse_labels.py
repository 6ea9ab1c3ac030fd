# ruff: noqa: E402
"""Measure what derived targets learn from few labels, with exact and with informed validity.

    python benchmarks/sparse_labels.py -o OUT [--steps 200] [--seeds 0 1 2] [--labels slabs slices boxes]

Trains on a phantom roll that is labelled in 5 of 16 slices, in every 8th slice, or in two small boxes, with five
derived targets, and scores every head on another roll against the targets of its whole labels. Steps, seeds and network
are the same for both; the CPU minutes are recorded. Each run adds its rows to OUT/rows.csv and is skipped when the
command is repeated. `--derive-only` trains nothing and measures what is taught: the share of labelled voxels that
teach each head, their error, and the CPU time of the derivation.

Errors of voxels within 8 voxels of the surface: mean angle of normals and directions in degrees, mean difference
of distances in voxels, relative norm of tensors, 1 - Dice of skeletons.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from volumen.config.experiment_file import merge, shipped_sections
from volumen.config.manager import ConfigManager
from volumen.inference.predictor import load_predictor, predict_array
from volumen.phantom.geometry import Roll, sheet_geometry
from volumen.phantom.volume import scan, write_ome_zarr
from volumen.run import run_bundle
from volumen.transforms.derive import DeriveTargetsd, derive_halo

SIZE, HELD_OUT = 96, 72
EPOCHS = 5
NEAR = 8.0
FIELDS = ["labels", "validity", "seed", "head", "error", "steps", "cpu_minutes"]
TASKS: dict[str, dict[str, Any]] = {
    "distance": {"type": "distance_transform", "losses": [{"name": "SignedDistanceLoss"}]},
    "normals": {"type": "surface_normals", "losses": [{"name": "CosineSimilarityLoss"}]},
    "tensor": {"type": "structure_tensor", "losses": [{"name": "MaskedMSELoss"}]},
    "direction": {"type": "inplane_direction", "losses": [{"name": "CosineSimilarityLoss"}]},
    "skeleton": {
        "type": "skeleton",
        "losses": [{"name": "BCEWithLogitsLoss", "kwargs": {"pos_weight": 3.0}}],
    },
}
SETTINGS: dict[str, Any] = {
    "tr_config": {
        "patch_size": [48, 48, 48],
        "batch_size": 1,
        "val_every_n": 10**6,
        "final_val_steps": 1,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
        "initial_lr": 3e-3,
        "augment_strength": 0.3,
    },
    "model_config": {"features_per_stage": [12, 24, 48, 64], "separate_decoders": False},
    "dataset_config": {"min_labeled_ratio": 0.01},
}


def tasks(validity: str) -> dict[str, Any]:
    """Return the derived targets with a validity."""
    common = {"source_target": "surface", "validity": validity, "loss_weight": 1.0}
    return {name: {**task, **common} for name, task in TASKS.items()}


def labelled(labels: str, size: int) -> np.ndarray:
    """Return what is labelled, bool (size,) * 3."""
    z = np.arange(size)[:, None, None]
    if labels == "boxes":
        known = np.zeros((size,) * 3, bool)
        side = size // 3
        for start in (size // 16, size // 2):
            known[start : start + side, start : start + side, start : start + side] = True
        return known
    thick, period = {"slabs": (5, 16), "slices": (1, 8)}[labels]
    return np.broadcast_to(z % period < thick, (size,) * 3).copy()


def roll(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return image and labels of a phantom roll, uint8 (size,) * 3."""
    geometry = sheet_geometry(Roll.draw((size,) * 3, seed), (size,) * 3)
    return scan(geometry.distance, geometry.along, seed), (geometry.distance <= 0).astype(np.uint8)


def train(labels: str, validity: str, seed: int, steps: int, folder: Path) -> tuple[Any, float]:
    """Train on a roll; return the predictor of the last checkpoint and the CPU minutes."""
    image, label = roll(SIZE, seed)
    known = labelled(labels, SIZE).astype(np.uint8)
    data = folder / "data"
    for name, array in (
        ("images/scroll.zarr", image),
        ("labels/scroll_surface.zarr", label * known),
        ("masks/scroll_surface.zarr", known),
    ):
        write_ome_zarr(data / name, array)
    schedule = {"max_epoch": EPOCHS, "max_steps_per_epoch": max(1, steps // EPOCHS)}
    sections = merge(merge(shipped_sections(), SETTINGS), {"auxiliary_tasks": tasks(validity)})
    sections = merge(sections, {"tr_config": schedule, "tr_setup": {"seed": seed}})
    config = ConfigManager(**sections, dataset_dir=str(data), output_dir=str(folder / "run"), device="cpu")
    start = time.process_time()
    run_bundle("train.yaml", (), {"config": config})
    minutes = (time.process_time() - start) / 60
    return load_predictor(config.run_dir / f"{config.tr_setup.model_name}_{EPOCHS}.pth"), minutes


def score(predictor: Any, seed: int) -> dict[str, float]:
    """Return the error of every head on another roll."""
    image, label = roll(HELD_OUT, seed + 1000)
    truth = DeriveTargetsd(tasks("exact"))({"surface": label[None].astype(np.int32)})
    found = predict_array(predictor, image[None], targets=list(TASKS))
    near = abs(truth["distance"][0]) < NEAR
    return {
        name: error(name, np.asarray(found[name]), truth[name], near & truth[f"{name}_mask"][0])
        for name in TASKS
    }


def error(name: str, found: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> float:
    """Return the error of a head over the valid voxels."""
    found, truth = found[:, valid].astype(float), truth[:, valid].astype(float)
    if name == "distance":
        return float(abs(found - truth).mean())
    if name == "tensor":
        twice = np.array([1, 2, 2, 1, 2, 1.0])[:, None]
        return float(np.sqrt((twice * (found - truth) ** 2).sum() / (twice * truth**2).sum()))
    if name == "skeleton":
        sure = found[0] > 0.5
        return float(1 - 2 * (sure & (truth[0] > 0)).sum() / max(1, sure.sum() + (truth[0] > 0).sum()))
    cosine = (found * truth).sum(axis=0) / np.maximum(np.linalg.norm(found, axis=0), 1e-9)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return float((np.minimum(angle, 180 - angle) if name == "direction" else angle).mean())


def derivation(labels: str, repeats: int = 9) -> Iterator[dict[str, Any]]:
    """Yield per validity, for a patch of 64 voxels per axis of a roll, CPU seconds, and for each head two numbers.

    The seconds are the least of several repetitions, in turn with those of exact derivation, over which they are given.

    These are the share of labelled voxels that teach it, and the error of what they teach against the target of the
    whole labels, weighted by the confidence; of distances, of the nearer bound.
    """
    halo = derive_halo(TASKS, (1.0, 1.0, 1.0))
    size = 64 + 2 * halo[0]
    _, label = roll(size, 0)
    known = labelled(labels, size)
    sample = {"surface": label[None].astype(np.int32), "surface_mask": known[None]}
    truth = DeriveTargetsd(tasks("exact"), halo)({"surface": sample["surface"]})
    core = known[halo[0] : -halo[0], halo[0] : -halo[0], halo[0] : -halo[0]]
    derivations = {validity: DeriveTargetsd(tasks(validity), halo) for validity in ("exact", "informed")}
    found = {validity: derive(sample) for validity, derive in derivations.items()}
    times: dict[str, list[float]] = {validity: [] for validity in derivations}
    for _ in range(repeats):
        for validity, derive in derivations.items():
            start = time.process_time()
            derive(sample)
            times[validity].append(time.process_time() - start)
    for validity, one in found.items():
        row: dict[str, Any] = {"cpu_seconds": min(times[validity])}
        row["over_exact"] = min(times[validity]) / min(times["exact"])
        for name in TASKS:
            weight = one.get(f"{name}_confidence", one[f"{name}_mask"].astype(float))[0]
            row[f"{name} share"] = float((weight > 0).sum() / core.sum())
            row[f"{name} error"] = taught_error(name, one, truth, weight)
        yield row


def taught_error(name: str, found: Mapping, truth: Mapping, weight: np.ndarray) -> float:
    """Return the mean error of a target against the truth, by weight; NaN where nothing is taught."""
    chosen = (weight > 0) & truth[f"{name}_mask"][0]
    if not chosen.any():
        return float("nan")
    values, true, weight = found[name][:, chosen], truth[name][:, chosen], weight[chosen]
    if name == "distance":
        wrong = np.maximum(values - true, true - found.get("distance_upper", found[name])[:, chosen]).clip(0)[
            0
        ]
    elif name in ("normals", "direction"):
        free = found.get(f"{name}_free", np.zeros_like(found[name]))[:, chosen]
        inside = true - (true * free).sum(axis=0) * free
        inside /= np.maximum(np.linalg.norm(inside, axis=0), 1e-6)
        wrong = np.degrees(np.arccos(np.clip((values * inside).sum(axis=0), -1, 1)))
        wrong = np.minimum(wrong, 180 - wrong) if name == "direction" else wrong
    else:
        wrong = np.sqrt(((values - true) ** 2).mean(axis=0))
    return float((weight * wrong).sum() / weight.sum())


def finished(path: Path) -> set[tuple[str, str, int, int]]:
    """Return the runs whose rows exist."""
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(row["labels"], row["validity"], int(row["seed"]), int(row["steps"])) for row in rows}


def append(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file."""
    fresh = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def table(path: Path) -> str:
    """Return a Markdown table: per labels and head the mean error over the seeds that both have, and their ratio."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = ["| labels | head | exact | informed | informed / exact | seeds |", "| --- " * 6 + "|"]
    cells = {
        (row["labels"], row["head"], row["validity"], row["steps"], row["seed"]): float(row["error"])
        for row in rows
    }
    for labels, head, steps in dict.fromkeys((row["labels"], row["head"], row["steps"]) for row in rows):
        seeds = [
            seed
            for seed in dict.fromkeys(row["seed"] for row in rows)
            if {(labels, head, one, steps, seed) for one in ("exact", "informed")} <= cells.keys()
        ]
        if not seeds:
            continue
        exact, informed = (
            [cells[labels, head, one, steps, seed] for seed in seeds] for one in ("exact", "informed")
        )
        means = " | ".join(f"{statistics.mean(one):.3g}" for one in (exact, informed))
        share = ratio([mine / other for mine, other in zip(informed, exact, strict=True)])
        lines.append(f"| {labels} | {head} | {means} | {share} | {len(seeds)} |")
    return "\n".join(lines)


def ratio(values: list[float]) -> str:
    """Return the mean of ratios of pairs with its 95 % interval (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.2f} ({max(0.0, mean - half):.2f} to {mean + half:.2f})"


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of rows.csv")
    parser.add_argument("--steps", type=int, default=200, help="training steps per run (default: 200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--labels", nargs="+", default=["slabs", "slices", "boxes"], help="default: all three"
    )
    parser.add_argument("--validity", nargs="+", default=["informed", "exact"], help="default: both")
    parser.add_argument("--table", action="store_true", help="print the table of OUT/rows.csv, train nothing")
    parser.add_argument("--derive-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.csv"
    if options.table:
        print(table(path))
        return
    for labels in options.labels if options.derive_only else ():
        for validity, row in zip(("exact", "informed"), derivation(labels), strict=True):
            print(labels, validity, {key: round(value, 3) for key, value in row.items()}, flush=True)
    if options.derive_only:
        return
    for seed in options.seeds:
        for labels in options.labels:
            for validity in options.validity:
                if (labels, validity, seed, options.steps) in finished(path):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    predictor, minutes = train(labels, validity, seed, options.steps, Path(folder))
                    errors = score(predictor, seed)
                run = {"labels": labels, "validity": validity, "seed": seed, "steps": options.steps}
                rows = [
                    {**run, "head": name, "error": f"{value:.4f}", "cpu_minutes": f"{minutes:.2f}"}
                    for name, value in errors.items()
                ]
                append(path, rows)
                print(run, {name: round(value, 3) for name, value in errors.items()}, flush=True)
    print(table(path))


if __name__ == "__main__":
    main()
