"""Scores of a volume by blocks: CPU seconds and memory against MONAI and scikit-image, and memory by volume.

    python benchmarks/scores.py [--side 256] [--sides 256 512 1024] [--all]
    python benchmarks/scores.py --command 256 512 1024 [--diagnostics] [--scratch FOLDER]

Each measurement is a process of its own, whose peak memory counts less that of a process that only imports. Volumes are
wavy sheets with holes, bridges and shifted surfaces, computed where they are read, so that they take no memory
themselves. The first table compares the same scores in the same run; the second shows all default scores of volumes of
growing size.

With `--command` the volumes are stored as zarr arrays instead, the prediction as probabilities, and `volumen evaluate
--metrics all` scores them and writes its report with pictures: reading, all scores, all files. Peak memory is that of
this process, with Python and all that it imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PERIOD = 24
"""Voxels from one sheet to the next."""


def sheets(region: tuple[slice, ...], shift: float, errors: bool) -> np.ndarray:
    """Return wavy sheets, 5 voxels thick, in a region of an endless volume; bool (Z, Y, X).

    Args:
        region: where.
        shift: of the sheets along z, in voxels.
        errors: whether there are holes and bridges, one each in about 64^3 voxels.
    """
    z, y, x = np.ogrid[region]
    height = 4 * np.sin(y / 23.0) + 3 * np.sin(x / 31.0 + y / 57.0) + shift
    mask = np.abs((z - height) % PERIOD - PERIOD / 2) < 2.5
    if errors:
        near = (np.minimum(y % 64, 64 - y % 64) < 4) & (np.minimum(x % 64, 64 - x % 64) < 4)
        mask = mask & ~(near & (z % 96 < 48)) | (near & (z % 96 >= 60) & (z % 96 < 84))
    return mask


def read(region: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return prediction, truth and known voxels of a region."""
    pred = sheets(region, 0.7, errors=True)
    return pred, sheets(region, 0.0, errors=False), np.ones(pred.shape, bool)


def _whole(side: int) -> tuple[np.ndarray, np.ndarray]:
    pred, truth, _ = read((slice(0, side),) * 3)
    return pred, truth


def ours(names: tuple[str, ...]) -> Callable[[int], dict[str, float]]:
    """Return what scores a volume by blocks."""

    def score(side: int) -> dict[str, float]:
        from volumen.metrics.label_scores import LabelScores, LabelSettings

        scores = LabelScores((side,) * 3, LabelSettings(names, (1.0, 1.0, 1.0), 1.0, border=True))
        for number in scores.grid:
            scores.add(number, read)
        return scores.result(read)[0]

    return score


def diagnostics(side: int) -> dict[str, float]:
    """Count errors by geometry, and look for suspect labels, by blocks; the truth stands for an image."""
    from volumen.metrics.geometry.scale import Scale
    from volumen.metrics.geometry.suspects import MISSING, WRONG, SuspectPiece, SuspectTally, piece_region
    from volumen.metrics.geometry.tally import GeometryTally, Piece
    from volumen.metrics.grid import BlockGrid
    from volumen.metrics.label_scores import BLOCK

    scale, grid, tally = Scale((1.0, 1.0, 1.0)), BlockGrid.of((side,) * 3, BLOCK), GeometryTally(1.0)
    sides = [SuspectTally(grid, scale, kind) for kind in (MISSING, WRONG)]
    for number in grid:
        box = grid.box(number)
        outer = piece_region(box, grid, scale.halo)
        pred, truth, known = read(outer)
        image = truth.astype(np.float32)
        tally.add(Piece(box, outer, truth, pred, pred & truth, known, image), scale, [(0, side)] * 3)
        outer = piece_region(box, grid, sides[0].halo)
        pred, truth, known = read(outer)
        for suspects in sides:
            suspects.add(number, SuspectPiece(box, outer, truth, pred, known, None))
    return {suspects.kind: float(len(suspects.suspects(10**6))) for suspects in sides}


def scipy_thickness(side: int) -> dict[str, float]:
    """Return SciPy's exact distances inside and outside the truth: the least that thickness and gaps need."""
    from scipy.ndimage import distance_transform_edt

    _, truth = _whole(side)
    distance_transform_edt(truth)
    distance_transform_edt(~truth)
    return {}


def monai_surfaces(side: int) -> dict[str, float]:
    """Return MONAI's HD95, surface Dice and mean surface distance."""
    import torch
    from monai.metrics import HausdorffDistanceMetric, SurfaceDiceMetric, SurfaceDistanceMetric

    tensors = [torch.from_numpy(mask)[None, None].float() for mask in _whole(side)]
    found = {}
    for name, metric in (
        ("hd95", HausdorffDistanceMetric(include_background=True, percentile=95)),
        ("surface_dice@1", SurfaceDiceMetric([1.0], include_background=True)),
        ("mean_surface_distance", SurfaceDistanceMetric(include_background=True, symmetric=True)),
    ):
        metric(*tensors)
        found[name] = metric.aggregate().item()
    return found


def scikit_image_objects(side: int) -> dict[str, float]:
    """Return scikit-image's components, Euler characteristics, Rand error and variation of information."""
    from skimage.measure import euler_number, label
    from skimage.metrics import adapted_rand_error, variation_of_information

    masks = _whole(side)
    pred, truth = (label(mask, connectivity=3) for mask in masks)
    holes = [label(np.pad(~mask, 1, constant_values=True), connectivity=1).max() - 1 for mask in masks]
    b1 = [
        int(objects.max()) + int(cavities) - int(euler_number(mask, connectivity=3))
        for objects, cavities, mask in zip((pred, truth), holes, masks, strict=True)
    ]
    counted = masks[1]
    split, merge = variation_of_information(truth[counted], pred[counted])
    return {
        "b0_error": abs(int(pred.max()) - int(truth.max())),
        "b1_error": abs(b1[0] - b1[1]),
        "adapted_rand_error": float(adapted_rand_error(truth, pred)[0]),
        "voi_split": float(split),
        "voi_merge": float(merge),
    }


SURFACES = ("hd95", "surface_dice@1", "mean_surface_distance")
OBJECTS = ("b0_error", "b1_error", "adapted_rand_error", "voi_split", "voi_merge")


def _work(name: str) -> Callable[[int], dict[str, float]]:
    from volumen.metrics.score_names import names_of

    every = names_of("labels", pieces=False)
    return {
        "surfaces": ours(SURFACES),
        "monai": monai_surfaces,
        "objects": ours(OBJECTS),
        "scikit-image": scikit_image_objects,
        "default": ours(every),
        "all": ours(names_of("labels", default=False, pieces=False)),
        "diagnostics": diagnostics,
        "scipy": scipy_thickness,
        "nothing": lambda side: {},
    }[name]


def measure(name: str, side: int) -> dict[str, float]:
    """Return CPU seconds, peak memory in MB and values, of a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--side", str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _one(name: str, side: int) -> None:

    work = _work(name)
    # Compiles what is compiled at the first call, and imports.
    work(24)
    before = time.process_time()
    values = work(side)
    seconds = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "values": values}))


def probabilities(region: tuple[slice, ...]) -> np.ndarray:
    """Return a prediction whose voxels of 0.5 and more are those of `read`, float16 (Z, Y, X)."""
    rng = np.random.default_rng([part.start for part in region])
    mask = read(region)[0]
    doubt = rng.random(mask.shape, np.float32)
    return np.where(mask, 0.5 + 0.5 * doubt, 0.48 * doubt**2).astype(np.float16)


def store(folder: Path, side: int, chunk: int = 128) -> tuple[Path, Path]:
    """Write prediction and label as zarr arrays, chunk by chunk; return their paths."""
    import zarr

    found, label = folder / "sheets_surface.zarr", folder / "labels" / "sheets_surface.zarr"
    arrays = [
        zarr.create_array(str(path), shape=(side,) * 3, chunks=(min(chunk, side),) * 3, dtype=kind)
        for path, kind in ((found, "float16"), (label, "uint8"))
    ]
    steps = range(0, side, chunk)
    for corner in ((z, y, x) for z in steps for y in steps for x in steps):
        region = tuple(slice(at, min(at + chunk, side)) for at in corner)
        arrays[0][region] = probabilities(region)
        arrays[1][region] = read(region)[1].astype(np.uint8)
    return found, label


def run_command(side: int, diagnostics: bool, scratch: str | None) -> tuple[float, float, float]:
    """Return CPU seconds, wall seconds and peak memory in MB of `volumen evaluate --metrics all`."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        found, label = store(Path(folder), side)
        script = (
            "import resource, sys, time; from volumen.cli.main import main; start = time.time();"
            "status = main(sys.argv[1:]); own = resource.getrusage(resource.RUSAGE_SELF);"
            "print(status or 0, own.ru_utime + own.ru_stime, time.time() - start, own.ru_maxrss / 1024)"
        )
        command = [sys.executable, "-c", script, "evaluate", "-p", str(found), "-l", str(label)]
        command += ["-o", str(Path(folder) / "report"), "--metrics", "all", "--quiet"]
        command += [] if diagnostics else ["--no-diagnostics"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        told = json.loads((Path(folder) / "report" / "metrics.json").read_text())
        print(json.dumps({key: round(value, 4) for key, value in told["mean"].items() if value is not None}))
        _, seconds, wall, peak = map(float, done.stdout.split()[-4:])
        return seconds, wall, peak


def _print_commands(sides: list[int], diagnostics: bool, scratch: str | None) -> None:
    rows = []
    for side in sides:
        seconds, wall, peak = run_command(side, diagnostics, scratch)
        rows.append(f"| {side} | {seconds:.0f} | {wall:.0f} | {seconds / side**3 * 1e6:.2f} | {peak:.0f} |")
        print(rows[-1], flush=True)
    print("\nvolumen evaluate --metrics all" + ("" if diagnostics else " --no-diagnostics"))
    print("| side | CPU s | wall s | CPU s / 10^6 voxels | peak MB |\n| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument(
        "--all", action="store_true", help="all scores rather than the default ones by volume"
    )
    parser.add_argument(
        "--command",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="score stored volumes of these sides by the command",
    )
    parser.add_argument(
        "--diagnostics", action="store_true", help="with --command: errors by geometry and suspects too"
    )
    parser.add_argument("--scratch", help="folder for the stored volumes; by default that of the system")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(options.one, options.side)
        return
    if options.command:
        _print_commands(options.command, options.diagnostics, options.scratch)
        return
    base = measure("nothing", 24)["peak"]
    print(f"{options.side}^3 voxels; memory beyond the {base:.0f} MB of a process that imports")
    print("| scores | by | CPU s | MB | ratio of CPU s | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, own, other in (
        ("surfaces", "surfaces", "monai"),
        ("objects", "objects", "scikit-image"),
        ("diagnostics; distances alone", "diagnostics", "scipy"),
    ):
        mine, theirs = measure(own, options.side), measure(other, options.side)
        gap = max((abs(mine["values"][name] - value) for name, value in theirs["values"].items()), default=0)
        for by, found in (("volumen", mine), (other, theirs)):
            ratio = found["seconds"] / mine["seconds"]
            print(
                f"| {title} | {by} | {found['seconds']:.2f} | {found['peak'] - base:.0f} | {ratio:.2f} | {gap:.1e} |"
            )
    for which, title in (
        ("all", "all scores") if options.all else ("default", "default scores"),
        ("diagnostics", "errors by geometry and suspects"),
    ):
        print(f"\n{title} by volume")
        print("| side | CPU s | CPU s / 10^6 voxels | MB |")
        print("| --- | --- | --- | --- |")
        for side in options.sides:
            found = measure(which, side)
            print(
                f"| {side} | {found['seconds']:.1f} | {found['seconds'] / side**3 * 1e6:.2f} "
                f"| {found['peak'] - base:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
