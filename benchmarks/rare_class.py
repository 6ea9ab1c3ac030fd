"""A class of 0.007 % of the voxels: is it learned, and does it stay learned?

Two anisotropic volumes (voxels 4 x 1 x 1) contain tissue, and a few small cells in it: one trains, one validates. Each
seed trains with patches drawn without and with attention to classes (`dataset_config.class_oversampling`).

    python benchmarks/rare_class.py                  # three seeds, twice each
    python benchmarks/rare_class.py --seeds 1 --epochs 10
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE, SPACING = (32, 192, 192), (4.0, 1.0, 1.0)
CELLS, RADIUS = 2, (4.0, 3.2, 3.2)


def write_data(folder: Path, seed: int) -> float:
    """Write both volumes; return the share of the rare class in per cent."""
    import numpy as np
    import tifffile

    rng = np.random.default_rng(seed)
    share = []
    grid = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    for name in ("train", "val"):
        label = np.zeros(SHAPE, np.uint8)
        label[:, :, : SHAPE[2] * 2 // 3] = 1
        for _ in range(CELLS):
            middle = [rng.uniform(0.25, 0.75) * size for size in SHAPE[:2]] + [
                rng.uniform(0.1, 0.5) * SHAPE[2]
            ]
            distance = sum(
                ((axis - place) * width / radius) ** 2
                for axis, place, width, radius in zip(grid, middle, SPACING, RADIUS)
            )
            label[distance <= 1] = 2
        image = 60 + 60 * (label > 0) + 40 * (label == 2) + rng.normal(0, 20, SHAPE)
        share.append(100 * float((label == 2).mean()))
        for part, values in (("images/{}", np.clip(image, 0, 255)), ("labels/{}_tissue", label)):
            path = folder / f"{part.format(name)}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(
                path,
                values.astype(np.uint8),
                imagej=True,
                resolution=(1, 1),
                metadata={"spacing": SPACING[0], "unit": "um", "axes": "ZYX"},
            )
    return sum(share) / len(share)


def train(folder: Path, out: Path, seed: int, sampling: str, epochs: int) -> tuple[list[float], bool]:
    """Return the Dice of the rare class at each validation, and whether the run reported it as unlearned."""
    settings = [
        f"dataset_config.class_oversampling={sampling}",
        "model_config.features_per_stage=[8,16,32]",
        "tr_config.initial_lr=0.003",
    ]
    bundle = str(Path(__file__).resolve().parents[1] / "bundle")
    command = [
        *(
            sys.executable,
            "-m",
            "volumen",
            "train",
            "-i",
            str(folder),
            "-o",
            str(out),
            "--val-volumes",
            "val",
        ),
        *(
            "--patch-size",
            "16,48,48",
            "--batch-size",
            "2",
            "--max-epochs",
            str(epochs),
            "--steps-per-epoch",
            "20",
        ),
        *("--val-steps", "1000", "--seed", str(seed), "--workers", "0", "--device", "cpu"),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": bundle, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    with (out / "model" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [float(row["val/tissue/dice/2"] or 0) for row in rows], "unlearned" in done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    print(
        f"{'seed':>4} {'sampling':>8} {'rare %':>7} {'best':>6} {'last':>6} {'mean of last 5':>14}  unlearned",
        flush=True,
    )
    for seed in range(options.seeds):
        for sampling in ("0.0", "auto"):
            with tempfile.TemporaryDirectory() as folder:
                share = write_data(Path(folder, "data"), seed)
                dice, unlearned = train(
                    Path(folder, "data"), Path(folder, "out"), seed, sampling, options.epochs
                )
            last = dice[-5:]
            print(
                f"{seed:4d} {sampling:>8} {share:7.4f} {max(dice):6.3f} {dice[-1]:6.3f} {sum(last) / len(last):14.3f}"
                f"  {'yes' if unlearned else 'no'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
