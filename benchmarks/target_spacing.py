# ruff: noqa: E402
"""Measure what one voxel size for all volumes gains: train on volumes of mixed voxel sizes with and without it.

    python benchmarks/target_spacing.py --output OUT [--data HIPPOCAMPUS] [--steps 300] [--seeds 0 1]

The volumes are rolled sheets of the phantom (another roll each), written at three voxel sizes; and, with --data, scans
in the program's layout, of which every second and third is resampled to other voxel sizes (images linearly, labels
nearest). Each arm trains the same number of steps on the same volumes; scored are whole held-out volumes, by
`volumen evaluate`, on their own voxels. One thread; a finished run in OUT is not repeated. The interval of the gain
holds 95 % of 2000 bootstrap samples of the held-out volumes.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

import volumen
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.layout import discover
from volumen.data.resampled import ResampledVolume
from volumen.data.space.resampling import Resampling

SIZES = ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (1.7, 0.7, 0.7))
"""Voxel sizes of the volumes in turn, in units of the original ones."""
ARMS: dict[str, Any] = {"as stored": None, "target_spacing: auto": "auto"}


def main() -> None:
    """Make the data, train every arm, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="scans with one label each, in the program's layout")
    parser.add_argument("--volumes", type=int, default=12, help="scans for training")
    parser.add_argument("--held-out", type=int, default=6)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--csv", type=Path, help="Dice of every held-out volume; in OUT by default")
    options = parser.parse_args()
    sets: dict[str, Path] = {"phantom": make_phantom(options.output / "phantom")}
    if options.data is not None:
        sets[options.data.name] = make_scans(options.output / options.data.name, options)
    rows = []
    for seed in options.seeds:
        for name, folder in sets.items():
            rows += [run_arm(name, folder, arm, seed, options) for arm in ARMS]
            write_csv(options.csv or options.output / "rows.csv", rows, sets)
    print(table(rows))


def make_phantom(folder: Path) -> Path:
    """Write rolled sheets: four volumes for training and three held-out ones, each at one of three voxel sizes."""
    from volumen.phantom.geometry import Roll, sheet_geometry
    from volumen.phantom.volume import scan

    shape = (96, 128, 128)
    for number in range(7):
        part = folder / ("train" if number < 4 else "test")
        roll = Roll.draw(shape, seed=number)
        geometry = sheet_geometry(roll, shape)
        image = scan(geometry.distance, geometry.along, seed=number)
        label = (geometry.distance <= 0).astype(np.uint8)
        write_pair(part, f"roll{number}", "sheet", image, label, SIZES[number % 3])
    return folder


def make_scans(folder: Path, options: argparse.Namespace) -> Path:
    """Write scans of a folder at one of three voxel sizes each, the first ones for training."""
    layout = discover(options.data)
    target = layout.targets[0]
    for number, case in enumerate(layout.cases[: options.volumes + options.held_out]):
        part = folder / ("train" if number < options.volumes else "test")
        arrays = []
        for volume in (open_volume(case.image), open_volume(case.labels[target])):
            arrays.append(volume.read(tuple(slice(0, size) for size in volume.shape))[0])
        write_pair(part, case.name, target, arrays[0].astype(np.float32), arrays[1], SIZES[number % 3])
    return folder


def write_pair(
    folder: Path, name: str, target: str, image: np.ndarray, label: np.ndarray, size: tuple[float, ...]
) -> None:
    """Write an image and its label as TIFF at a voxel size, in units of their own voxels."""
    for kind, file, array in (("images", name, image), ("labels", f"{name}_{target}", label)):
        path = folder / kind / f"{file}.ome.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        view = ResampledVolume(ArrayVolume(array), Resampling(array.shape, size), is_label=kind == "labels")
        values = view.read(tuple(slice(0, extent) for extent in view.shape))[0]
        if kind == "images" and array.dtype == np.uint8:
            values = np.rint(values).astype(np.uint8)
        metadata: dict[str, Any] = {"axes": "ZYX"}
        for axis, step in zip("ZYX", size, strict=True):
            metadata |= {f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": "µm"}
        tifffile.imwrite(path, values, ome=True, metadata=metadata)


def run_arm(name: str, folder: Path, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train an arm and score it on the held-out volumes; return its row."""
    output = options.output / "runs" / f"{name}_{list(ARMS).index(arm)}_{seed}_{options.steps}"
    stored = output / "row.json"
    if stored.exists():
        return {"steps": options.steps, **json.loads(stored.read_text())}
    epochs = 10
    settings = {
        "tr_setup": {"seed": seed},
        "dataset_config": {
            "target_spacing": ARMS[arm],
            "cache_valid_patches": False,
            # A patch is nearly a whole scan; which patches count must not depend on the voxel size.
            **({} if name == "phantom" else {"min_labeled_ratio": 0.01, "min_bbox_percent": 0.0}),
        },
        "tr_config": {
            "patch_size": [32, 32, 32],
            "batch_size": 2,
            "max_epoch": epochs,
            "max_steps_per_epoch": options.steps // epochs,
            "val_every_n": epochs,
            "num_dataloader_workers": 0,
        },
        "model_config": {"features_per_stage": [12, 24, 48, 96]},
    }
    began = time.process_time()
    run = volumen.train(folder / "train", output, settings, device="cpu")
    cpu = time.process_time() - began
    checkpoint = max(run.glob("model_[0-9]*.pth"))
    volumen.predict(folder / "test" / "images", checkpoint, output / "prediction", dtype="labels", workers=1)
    scores = volumen.evaluate(
        output / "prediction", folder / "test" / "labels", output / "scores", metrics=("dice",)
    )
    found = scores.cases
    cases = {
        name: next(v for k, v in values.items() if k.endswith("/dice")) for name, values in found.items()
    }
    row = {
        "set": name,
        "arm": arm,
        "seed": seed,
        "steps": options.steps,
        "cpu_seconds": round(cpu),
        "dice": cases,
    }
    stored.write_text(json.dumps(row))
    return row


def write_csv(path: Path, rows: list[dict[str, Any]], sets: dict[str, Path]) -> None:
    """Write the Dice of every held-out volume, with its voxel size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "arm", "seed", "steps", "cpu_seconds", "volume", "voxel_size", "dice"])
        for row in rows:
            for volume, dice in row["dice"].items():
                spacing = open_volume(sets[row["set"]] / "test" / "images" / f"{volume}.ome.tif").spacing
                size = "x".join(f"{value:g}" for value in spacing or ())
                head = [row["set"], row["arm"], row["seed"], row["steps"], row["cpu_seconds"]]
                writer.writerow([*head, volume, size, f"{dice:.4f}"])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean Dice of the held-out volumes over seeds, with an interval of the paired difference."""
    lines = ["| set | seeds | " + " | ".join(ARMS) + " | gain |", "| --- " * (len(ARMS) + 3) + "|"]
    for name in dict.fromkeys(row["set"] for row in rows):
        arms = []
        for arm in ARMS:
            own = [row["dice"] for row in rows if row["set"] == name and row["arm"] == arm]
            arms.append({volume: float(np.mean([dice[volume] for dice in own])) for volume in own[0]})
        seeds = len({row["seed"] for row in rows if row["set"] == name})
        gains = np.array([arms[1][volume] - arms[0][volume] for volume in arms[0]])
        drawn = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
        low, high = np.percentile(gains[drawn].mean(axis=1), [2.5, 97.5])
        means = " | ".join(f"{np.mean(list(arm.values())):.3f}" for arm in arms)
        lines.append(f"| {name} | {seeds} | {means} | {gains.mean():+.3f} ({low:+.3f} to {high:+.3f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
