# ruff: noqa: E402
"""Time the derivation of the four tasks of a patch against the straightforward pipeline.

The reference does what one writes first: every task on its own, SciPy's distance transform of the inside and
of the outside, Gaussian smoothing and numpy.gradient, gaussian_filter of every product, numpy.linalg.eigh for
every voxel. Both run on one thread; CPU seconds, median of the repeats after one warm-up.

    python benchmarks/derived_targets.py [--sizes 64 128 192] [--repeats 3] [--label PATH.npy]
"""

from __future__ import annotations

import os

# Before NumPy is imported: one thread for everybody.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from scripts.transforms.derive import DeriveTargetsd

TASKS = {
    name: {"type": name, "source_target": "sheet"}
    for name in ("distance_transform", "surface_normals", "structure_tensor", "inplane_direction")
}
REACH, NORMAL_SIGMA, GRAD_SIGMA, TENSOR_SIGMA = 16.0, 2.0, 1.0, 1.5
PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def rolled_sheet(size: int, seed: int = 0) -> np.ndarray:
    """Return uint8 (size,) * 3: a rolled sheet 4 voxels thick, 16 apart, wavy along the roll's axis."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(size, dtype=np.float32)] * 3, indexing="ij")
    wave = gaussian_filter(rng.normal(size=(size,) * 3).astype(np.float32), 8) * 60
    y, x = y - size * 0.45, x - size * 0.55
    turn = np.arctan2(y, x) / (2 * np.pi)
    phase = (np.hypot(y, x) + wave + 0.1 * z) / 16 - turn
    return (np.mod(phase, 1) < 0.25).astype(np.uint8)


def reference_distance(label: np.ndarray) -> np.ndarray:
    """Signed distance by two SciPy transforms, cut at the reach."""
    outside = distance_transform_edt(label == 0) - 0.5
    inside = distance_transform_edt(label > 0) - 0.5
    return np.clip(np.where(label > 0, -inside, outside), -REACH, REACH).astype(np.float32)


def reference_gradient(label: np.ndarray, sigma: float) -> np.ndarray:
    """Gradient (z, y, x) of the smoothed signed distance."""
    return np.stack(np.gradient(gaussian_filter(reference_distance(label), sigma)))


def reference_normals(label: np.ndarray) -> np.ndarray:
    """Unit normals (x, y, z)."""
    slope = reference_gradient(label, NORMAL_SIGMA)
    return (slope / np.maximum(np.linalg.norm(slope, axis=0), 1e-6))[::-1]


def reference_tensor(label: np.ndarray) -> np.ndarray:
    """Structure tensor (zz, zy, zx, yy, yx, xx)."""
    slope = reference_gradient(label, GRAD_SIGMA)
    return np.stack([gaussian_filter(slope[i] * slope[j], TENSOR_SIGMA) for i, j in PAIRS])


def reference_direction(label: np.ndarray) -> np.ndarray:
    """Eigenvector (x, y, z) of the smallest eigenvalue."""
    tensor = reference_tensor(label)
    matrices = np.empty((*label.shape, 3, 3), np.float32)
    for component, (i, j) in zip(tensor, PAIRS):
        matrices[..., i, j] = matrices[..., j, i] = component
    _, vectors = np.linalg.eigh(matrices)
    return np.moveaxis(vectors[..., ::-1, 0], -1, 0)


def straightforward(label: np.ndarray) -> dict[str, np.ndarray]:
    """All four tasks, each on its own."""
    return {
        "distance_transform": reference_distance(label)[None],
        "surface_normals": reference_normals(label),
        "structure_tensor": reference_tensor(label),
        "inplane_direction": reference_direction(label),
    }


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of `run` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def largest_difference(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray], name: str) -> float:
    """Largest difference where the mask is True, 11 voxels from the border (where SciPy mirrors the
    image)."""
    inner = (slice(None), *[slice(11, -11)] * 3)
    mine, theirs = ours[name][inner], reference[name][inner]
    if name == "inplane_direction":
        theirs = theirs * np.where((mine * theirs).sum(axis=0) < 0, -1, 1)
    return float(np.abs((mine - theirs) * ours[f"{name}_mask"][inner]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--label", type=Path, help="a .npy label volume instead of the phantom")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        if arguments.label:
            label = (np.load(arguments.label)[:size, :size, :size] > 0).astype(np.uint8)
        else:
            label = rolled_sheet(size)
        sample = {"sheet": label[None], "in_volume": None, "spacing": (1.0, 1.0, 1.0)}
        derive = DeriveTargetsd(TASKS)
        ours = cpu_seconds(lambda derive=derive, sample=sample: derive(sample), 2 * arguments.repeats + 1)
        theirs = cpu_seconds(lambda label=label: straightforward(label), arguments.repeats)
        print(f"{label.shape}: volumen {ours:.3f} s, reference {theirs:.2f} s, ratio {theirs / ours:.1f}")
        result, reference = derive(sample), straightforward(label)
        for name in TASKS:
            valid = result[f"{name}_mask"].mean()
            difference = largest_difference(result, reference, name)
            print(f"    {name:20s} valid {valid:6.1%}, largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
