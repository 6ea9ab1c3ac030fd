"""Train volumen and nnU-Net on the same data for the same time, and compare them on parts that neither has seen.

    python benchmarks/versus_nnunet.py DATA --budget 20m -o WORK [--target NAME] [--seeds 0 1] [--csv ROWS.csv]

DATA is in volumen's layout. One fifth of its images is held out; of fewer than five images, the last quarter of each
along its longest axis. Both systems get the other part, one thread, and the same CPU seconds of training (a clock that
stands still while other programs have the core): volumen by `--time-budget`, with all that it does in it (measuring,
validation); nnU-Net after its planning and preprocessing, which are not counted, with its default trainer on all cases
and its learning rate spread over the time. Its planner gets `--memory` GiB, since its plans for a GPU allow a core only
a few steps. Both predict as their commands do by default: nnU-Net mirrors, volumen does not.

The scores are computed here, by NumPy and SciPy alone: Dice per class, and the boundary Dice, the share of boundary
voxels of both masks that lie within one voxel of the other's boundary. Both are means over held-out images, or over
blocks of 64 voxels a side where only one image is held out. Intervals hold 95 % of 2000 bootstrap samples of these
units. A finished row of the CSV is not measured again. The environment of nnU-Net is made in WORK.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tifffile
from nnunet_environment import make_environment
from PIL import Image
from scipy import ndimage

from volumen.data.formats.opening import open_volume
from volumen.data.layout import discover
from volumen.time_budget.duration import parse_duration

SYSTEMS = ("volumen", "nnU-Net")
COLUMNS = (
    "set",
    "system",
    "seed",
    "budget_s",
    "cpu_s",
    "steps",
    "patch",
    "batch",
    "unit",
    "label",
    "dice",
    "boundary",
)
FEW, HELD_OUT, LAST = 5, 0.2, 0.25
BLOCK = 64
IGNORE = "ignore"


def main() -> None:
    """Prepare the data, measure what is missing in the CSV, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--target", help="target to train and score; the first one by default")
    parser.add_argument("--budget", default="20m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--memory", type=float, default=1.0, help="GiB for which nnU-Net plans")
    parser.add_argument("--most", type=int, help="use no more images than this")
    parser.add_argument("--csv", type=Path, help="rows, appended to; in WORK by default")
    parser.add_argument("--environment", type=Path, help="environment of nnU-Net; in WORK by default")
    options = parser.parse_args()
    name, budget = options.data.name, round(parse_duration(options.budget))
    rows_file = options.csv or options.output / "rows.csv"
    work = options.output / name
    prepare(options, work)
    for seed, system in itertools.product(options.seeds, SYSTEMS):
        rows = read_rows(rows_file)
        key = (name, system, str(seed), str(budget))
        if any((row["set"], row["system"], row["seed"], row["budget_s"]) == key for row in rows):
            continue
        folder = work / f"{system}_{budget}_{seed}"
        report = (run_volumen if system == "volumen" else run_nnunet)(options, work, folder, budget, seed)
        head = dict(zip(COLUMNS, key)) | {
            "cpu_s": report["cpu_seconds"],
            "steps": report["steps"],
            "patch": "x".join(map(str, report["patch"])),
            "batch": report["batch"],
        }
        append_rows(rows_file, [head | row for row in score(work, folder / "predictions")])
    print(
        table([row for row in read_rows(rows_file) if row["set"] == name and row["budget_s"] == str(budget)])
    )


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Write both parts of the data, in the layout of each system, unless they are there."""
    if (work / "complete.txt").is_file():
        return
    layout = discover(options.data)
    target = options.target or layout.targets[0]
    cases = [case for case in layout.cases if target in case.labels][: options.most]
    held = set(np.random.default_rng(0).permutation(len(cases))[: round(HELD_OUT * len(cases))].tolist())
    classes, masked = 0, False
    for number, case in enumerate(cases):
        volume = open_volume(case.image)
        image = read_all(volume)
        label = read_all(open_volume(case.labels[target]))[0]
        mask = read_all(open_volume(case.masks[target]))[0] > 0 if target in case.masks else None
        spacing = volume.spacing or (1.0,) * label.ndim
        classes, masked = max(classes, int(label.max())), masked or mask is not None
        if len(cases) >= FEW:
            parts = {"test" if number in held else "train": (slice(None),) * label.ndim}
        else:
            axis = int(np.argmax(label.shape))
            at = round(label.shape[axis] * (1 - LAST))
            before = (slice(None),) * axis
            parts = {"train": (*before, slice(0, at)), "test": (*before, slice(at, None))}
        for part, region in parts.items():
            own = None if mask is None else mask[region]
            write_case(
                work, part, case.name, target, image[(slice(None), *region)], label[region], own, spacing
            )
    ndim = label.ndim
    names = {"background": 0, **{f"class{value}": value for value in range(1, classes + 1)}}
    if masked:
        names[IGNORE] = classes + 1
        for part in ("train", "test"):
            mark_ignored(work, part, classes + 1, ndim)
    raw = work / "nnunet" / "raw" / "Dataset001_Same"
    description = {
        "channel_names": {str(n): f"channel{n}" for n in range(len(image))},
        "labels": names,
        "numTraining": len(list((raw / "labelsTr").iterdir())),
        "file_ending": ".png" if ndim == 2 else ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    (work / "complete.txt").write_text(json.dumps({"target": target, "classes": classes}))


def read_all(volume: Any) -> np.ndarray:
    """Return a whole volume (C, *space)."""
    return volume.read(tuple(slice(0, size) for size in volume.shape))


def write_case(
    work: Path,
    part: str,
    name: str,
    target: str,
    image: np.ndarray,
    label: np.ndarray,
    mask: np.ndarray | None,
    spacing: tuple[float, ...],
) -> None:
    """Write a case as TIFF in volumen's layout, and as PNG (2D) or NIfTI (3D) in nnU-Net's."""
    label = label.astype(np.uint8)
    axes = "YX" if label.ndim == 2 else "ZYX"
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip(axes, spacing)}
    one = image[0] if len(image) == 1 else image
    arrays = {"images": (name, one), "labels": (f"{name}_{target}", label)}
    if mask is not None:
        arrays["masks"] = (f"{name}_{target}", mask.astype(np.uint8))
    for kind, (stem, array) in arrays.items():
        path = work / part / kind / f"{stem}.ome.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"axes": ("C" if array.ndim > label.ndim else "") + axes, **sizes}
        tifffile.imwrite(
            path, np.ascontiguousarray(array), ome=True, metadata=metadata, photometric="minisblack"
        )
    raw = work / "nnunet" / "raw" / "Dataset001_Same"
    ending = "Tr" if part == "train" else "Ts"
    for kind in ("images", "labels"):
        (raw / f"{kind}{ending}").mkdir(parents=True, exist_ok=True)
    if label.ndim == 2:
        Image.fromarray(np.moveaxis(image, 0, -1).squeeze()).save(
            raw / f"images{ending}" / f"{name}_0000.png"
        )
        Image.fromarray(label).save(raw / f"labels{ending}" / f"{name}.png")
        return
    affine = np.diag([*spacing[::-1], 1.0])
    for number, channel in enumerate(image):
        file = raw / f"images{ending}" / f"{name}_{number:04d}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(channel.T.astype(np.float32), affine), file)
    nibabel.save(nibabel.Nifti1Image(label.T, affine), raw / f"labels{ending}" / f"{name}.nii.gz")


def mark_ignored(work: Path, part: str, value: int, ndim: int) -> None:
    """Give nnU-Net's labels its value for unknown voxels outside the mask."""
    raw = work / "nnunet" / "raw" / "Dataset001_Same" / ("labelsTr" if part == "train" else "labelsTs")
    for path in (work / part / "masks").iterdir():
        mask = tifffile.imread(path) > 0
        stem = path.name.removesuffix(".ome.tif").rpartition("_")[0]
        if ndim == 2:
            file = raw / f"{stem}.png"
            Image.fromarray(np.where(mask, np.asarray(Image.open(file)), value).astype(np.uint8)).save(file)
            continue
        file = raw / f"{stem}.nii.gz"
        stored = nibabel.load(file)
        values = np.where(mask.T, np.asarray(stored.dataobj), value).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(values, stored.affine), file)


def run_volumen(
    options: argparse.Namespace, work: Path, folder: Path, budget: int, seed: int
) -> dict[str, Any]:
    """Train volumen by its time budget in a process of its own, and predict the held-out part."""
    arguments = [str(work / "train"), str(folder), str(budget), str(seed), str(work / "test" / "images")]
    script = Path(__file__).with_name("versus_child.py")
    return run_child([sys.executable, str(script), *arguments], folder)


def run_nnunet(
    options: argparse.Namespace, work: Path, folder: Path, budget: int, seed: int
) -> dict[str, Any]:
    """Train nnU-Net in its environment, and predict the held-out part."""
    python = make_environment(options.environment or options.output / "environment")
    images = work / "nnunet" / "raw" / "Dataset001_Same" / "imagesTs"
    script = Path(__file__).with_name("nnunet_child.py")
    arguments = [work / "nnunet", budget, seed, options.memory, images, folder / "predictions"]
    return run_child([str(python), str(script), *map(str, arguments)], folder)


def run_child(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command on one thread with its log in a folder; return the JSON object in its last line."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            command,
            env={**os.environ, **dict.fromkeys(names, "1")},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed, see {folder / 'log.txt'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def score(work: Path, predictions: Path) -> list[dict[str, Any]]:
    """Return a row for every unit and class of the held-out part."""
    known = json.loads((work / "complete.txt").read_text())
    labels = sorted((work / "test" / "labels").iterdir())
    rows = []
    for path in labels:
        name = path.name.removesuffix(".ome.tif").removesuffix(f"_{known['target']}")
        truth, found = tifffile.imread(path), read_prediction(predictions, name)
        if truth.shape != found.shape:
            raise SystemExit(f"{predictions}: {name} has shape {found.shape}, its label {truth.shape}")
        mask = work / "test" / "masks" / path.name
        valid = tifffile.imread(mask) > 0 if mask.exists() else np.ones(truth.shape, bool)
        boxes = [(slice(None),) * truth.ndim] if len(labels) > 1 else blocks(truth.shape)
        for value in range(1, known["classes"] + 1):
            counts = counted(truth == value, found == value, valid)
            for number, box in enumerate(boxes):
                dice, boundary = ratios([count[box].sum() for count in counts])
                unit = name if len(boxes) == 1 else f"{name}:{number}"
                rows.append({"unit": unit, "label": value, "dice": dice, "boundary": boundary})
    return rows


def read_prediction(predictions: Path, name: str) -> np.ndarray:
    """Return the label map of a case, (Z, Y, X) or (Y, X)."""
    (path,) = [
        path
        for path in predictions.iterdir()
        if path.name.startswith((f"{name}.", f"{name}_")) and path.suffix in (".tif", ".png", ".gz")
    ]
    if path.suffix == ".gz":
        return np.asarray(nibabel.load(path).dataobj).T
    return np.asarray(Image.open(path)) if path.suffix == ".png" else tifffile.imread(path)


def blocks(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Return boxes of about 64 voxels a side that cover a shape."""
    cuts = [np.linspace(0, size, max(1, round(size / BLOCK)) + 1).astype(int) for size in shape]
    sides = [[slice(*pair) for pair in itertools.pairwise(cut.tolist())] for cut in cuts]
    return list(itertools.product(*sides))


def counted(truth: np.ndarray, found: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
    """Return where voxels count: both, truth, found; boundaries near the other's, and all boundaries.

    A boundary voxel has a face neighbour outside its mask; those at the edge of the known part do not become one.
    """
    edges = [mask & ~ndimage.binary_erosion(mask, border_value=1) for mask in (truth, found)]
    reach = ndimage.generate_binary_structure(truth.ndim, 1)
    near = [edge & ndimage.binary_dilation(other, reach) for edge, other in zip(edges, edges[::-1])]
    return [part & valid for part in (truth & found, truth, found, *near, *edges)]


def ratios(counts: list[int]) -> tuple[float, float]:
    """Return Dice and boundary Dice; NaN where both masks are empty."""
    both, truth, found, near_truth, near_found, edge_truth, edge_found = (int(count) for count in counts)
    voxels, edges = truth + found, edge_truth + edge_found
    dice = 2 * both / voxels if voxels else float("nan")
    return dice, (near_truth + near_found) / edges if edges else float("nan")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV, which is made with its header if it does not exist."""
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(
            {k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def table(rows: list[dict[str, str]]) -> str:
    """Return the table of both systems, and of their difference, with intervals."""
    lines = ["| | seeds | CPU s | steps | patch, batch | Dice | boundary Dice |", "|" + " --- |" * 7]
    for system in SYSTEMS:
        own = [row for row in rows if row["system"] == system]
        if not own:
            continue
        seeds = sorted({row["seed"] for row in own})
        first = own[0]
        steps = "/".join(next(row["steps"] for row in own if row["seed"] == seed) for seed in seeds)
        spent = "/".join(next(row["cpu_s"] for row in own if row["seed"] == seed) for seed in seeds)
        cells = [interval(by_unit(own, key)) for key in ("dice", "boundary")]
        lines.append(
            f"| {system} | {len(seeds)} | {spent} | {steps} | {first['patch']}, {first['batch']} |"
            f" {cells[0]} | {cells[1]} |"
        )
    pairs = []
    for key in ("dice", "boundary"):
        values = [by_unit([row for row in rows if row["system"] == system], key) for system in SYSTEMS]
        if not all(values):
            return "\n".join(lines)
        pairs.append(
            interval({unit: values[0][unit] - values[1][unit] for unit in values[0].keys() & values[1]})
        )
    return "\n".join([*lines, f"| difference | | | | | {pairs[0]} | {pairs[1]} |"])


def by_unit(rows: list[dict[str, str]], key: str) -> dict[str, float]:
    """Return the mean over classes and seeds for each unit."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["unit"], []).append(float(row[key]))
    return {unit: float(np.nanmean(values)) for unit, values in found.items() if not np.isnan(values).all()}


def interval(values: dict[str, float]) -> str:
    """Return the mean and the interval that holds 95 % of the means of bootstrap samples of the units."""
    array = np.array([values[unit] for unit in sorted(values)])
    drawn = np.random.default_rng(0).integers(0, len(array), (2000, len(array)))
    low, high = np.percentile(array[drawn].mean(axis=1), [2.5, 97.5])
    return f"{array.mean():.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
