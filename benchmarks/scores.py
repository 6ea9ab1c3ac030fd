"""Scores of a volume by blocks: CPU seconds and memory against MONAI and scikit-image, and memory by volume.

    python benchmarks/scores.py [--side 256] [--sides 256 512 1024] [--all]

Each measurement is a process of its own, whose peak memory counts less that of a process that only imports. Volumes are
wavy sheets with holes, bridges and shifted surfaces, computed where they are read, so that they take no memory
themselves. The first table compares the same scores in the same run; the second shows all default scores of volumes of
growing size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

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
        mask = mask & ~(near & (z % 96 < 48)) | (near & (z % 96 >= 72))
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
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(options.one, options.side)
        return
    base = measure("nothing", 24)["peak"]
    print(f"{options.side}^3 voxels; memory beyond the {base:.0f} MB of a process that imports")
    print("| scores | by | CPU s | MB | ratio of CPU s | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, own, other in (("surfaces", "surfaces", "monai"), ("objects", "objects", "scikit-image")):
        mine, theirs = measure(own, options.side), measure(other, options.side)
        gap = max(abs(mine["values"][name] - value) for name, value in theirs["values"].items())
        for by, found in (("volumen", mine), (other, theirs)):
            ratio = found["seconds"] / mine["seconds"]
            print(
                f"| {title} | {by} | {found['seconds']:.2f} | {found['peak'] - base:.0f} | {ratio:.2f} | {gap:.1e} |"
            )
    which = "all" if options.all else "default"
    print(f"\n{which} scores by volume")
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
