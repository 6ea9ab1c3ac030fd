# ruff: noqa: E402
"""Time the derivation of the four tasks of a patch against the straightforward pipeline.

The reference is the obvious implementation: every task separately, SciPy's distance transform of the inside and
of the outside, Gaussian smoothing and numpy.gradient, gaussian_filter of every product, numpy.linalg.eigh for
every voxel. It uses float32 wherever ours does, and the central differences of numpy.gradient, which
cost less than Scharr's. Ours also computes masks of validity, which the reference does not, and computes no
eigenvectors where these masks are False.

Both run on one thread. Times are CPU seconds, the median of the repeats after one warm-up. The time of a data-loading
worker before its first patch is measured separately, in new processes: compiling every kernel with an
empty cache (once per machine), and reading them from the cache (every start).

    python benchmarks/derived_targets.py [--sizes 64 128 192] [--repeats 3] [--label PATH.npy] [--device cuda]
"""

from __future__ import annotations

import os

# Set before NumPy is imported: one thread for all libraries.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from volumen.transforms.derive import DeriveTargetsd

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
    """Return the signed distance by two SciPy transforms, cut at the reach."""
    outside = distance_transform_edt(label == 0) - 0.5
    inside = distance_transform_edt(label > 0) - 0.5
    return np.clip(np.where(label > 0, -inside, outside), -REACH, REACH).astype(np.float32)


def reference_gradient(label: np.ndarray, sigma: float) -> np.ndarray:
    """Return the gradient (z, y, x) of the smoothed signed distance."""
    return np.stack(np.gradient(gaussian_filter(reference_distance(label), sigma)))


def reference_normals(label: np.ndarray) -> np.ndarray:
    """Return unit normals (x, y, z)."""
    slope = reference_gradient(label, NORMAL_SIGMA)
    return (slope / np.maximum(np.linalg.norm(slope, axis=0), 1e-6))[::-1]


def reference_tensor(label: np.ndarray) -> np.ndarray:
    """Return the structure tensor (zz, zy, zx, yy, yx, xx)."""
    slope = reference_gradient(label, GRAD_SIGMA)
    return np.stack([gaussian_filter(slope[i] * slope[j], TENSOR_SIGMA) for i, j in PAIRS])


def reference_direction(label: np.ndarray) -> np.ndarray:
    """Return the eigenvector (x, y, z) of the smallest eigenvalue."""
    tensor = reference_tensor(label)
    matrices = np.empty((*label.shape, 3, 3), np.float32)
    for component, (i, j) in zip(tensor, PAIRS):
        matrices[..., i, j] = matrices[..., j, i] = component
    _, vectors = np.linalg.eigh(matrices)
    return np.moveaxis(vectors[..., ::-1, 0], -1, 0)


def straightforward(label: np.ndarray) -> dict[str, np.ndarray]:
    """Return all four tasks, each computed separately."""
    return {
        "distance_transform": reference_distance(label)[None],
        "surface_normals": reference_normals(label),
        "structure_tensor": reference_tensor(label),
        "inplane_direction": reference_direction(label),
    }


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median CPU seconds of `run` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def largest_difference(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray], name: str) -> float:
    """Return the largest difference where the mask is True, 11 voxels from the border (where SciPy mirrors the
    image)."""
    inner = (slice(None), *[slice(11, -11)] * 3)
    mine, theirs = ours[name][inner], reference[name][inner]
    if name == "inplane_direction":
        theirs = theirs * np.where((mine * theirs).sum(axis=0) < 0, -1, 1)
    return float(np.abs((mine - theirs) * ours[f"{name}_mask"][inner]).max())


def clear_direction(reference: dict[str, np.ndarray], gap: float) -> np.ndarray:
    """Return where the two smallest eigenvalues differ by more than `gap` of the largest, (*spatial)."""
    matrices = np.empty((*reference["structure_tensor"].shape[1:], 3, 3))
    for component, (i, j) in zip(reference["structure_tensor"], PAIRS):
        matrices[..., i, j] = matrices[..., j, i] = component
    values = np.linalg.eigvalsh(matrices)
    return values[..., 1] - values[..., 0] > gap * values[..., 2]


FIRST_PATCH = """
import sys, time
sys.path.insert(0, {bundle!r})
import numpy as np
from volumen.transforms.derive import DeriveTargetsd
start = time.process_time()
label = np.zeros((1, 24, 24, 24), np.uint8)
label[..., 9:12] = 1
DeriveTargetsd({tasks!r})({{"sheet": label}})
print(time.process_time() - start)
"""


def first_patch_seconds(repeats: int) -> tuple[float, float]:
    """Return the CPU seconds of a new process for its first patch: with an empty cache of kernels, and a full one."""
    bundle = str(Path(__file__).resolve().parents[1] / "bundle")
    code = FIRST_PATCH.format(bundle=bundle, tasks=TASKS)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}

        def measure() -> float:
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            )
            return float(done.stdout)

        return measure(), statistics.median(measure() for _ in range(repeats))


def batch_seconds(label: np.ndarray, device: str, repeats: int, count: int = 2) -> float:
    """Return the median wall seconds of deriving a batch of `count` such patches in torch on a device."""
    import torch

    from volumen.transforms.derive_batch import DeriveBatch, PackSourcesd

    torch.set_num_threads(1)
    derive = DeriveBatch(TASKS)
    sample = PackSourcesd(derive.sources)({"sheet": label[None], "spacing": (1.0, 1.0, 1.0)})
    packed = [key for key in sample if key.startswith("wide/")]
    batch = {key: torch.stack([torch.as_tensor(sample[key])] * count) for key in packed}
    facts = derive.host_facts(batch)
    batch = {key: value.to(device) for key, value in batch.items()}
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        derive(batch, facts)
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 192], help="edges of the patch")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, at least 3 (default: 3)")
    parser.add_argument("--label", type=Path, help="a .npy label volume instead of the phantom")
    parser.add_argument("--device", help="also time a batch of 2 in torch there, such as cuda or cpu")
    arguments = parser.parse_args()
    if arguments.repeats < 3:
        parser.error("--repeats: expected at least 3, or a median says little")
    compiled, cached = first_patch_seconds(arguments.repeats)
    print(f"first patch of a process: {compiled:.1f} s compiling, {cached:.2f} s with kernels from the cache")
    for size in arguments.sizes:
        compare(arguments, size)


def compare(arguments: argparse.Namespace, size: int) -> None:
    """Print times and differences for patches of one size."""
    if arguments.label:
        label = (np.load(arguments.label)[:size, :size, :size] > 0).astype(np.uint8)
    else:
        label = rolled_sheet(size)
    sample = {"sheet": label[None], "in_volume": None, "spacing": (1.0, 1.0, 1.0)}
    derive = DeriveTargetsd(TASKS)
    ours = cpu_seconds(lambda: derive(sample), 2 * arguments.repeats + 1)
    theirs = cpu_seconds(lambda: straightforward(label), arguments.repeats)
    print(f"{label.shape}: volumen {ours:.3f} s, reference {theirs:.2f} s, ratio {theirs / ours:.1f}")
    result, reference = derive(sample), straightforward(label)
    worst = 0.0
    for name in TASKS:
        valid = result[f"{name}_mask"].mean()
        difference = largest_difference(result, reference, name)
        note = ""
        if name == "inplane_direction":
            # A direction is only as accurate as the gap between the eigenvalues allows.
            result[f"{name}_mask"] = result[f"{name}_mask"] & clear_direction(reference, 0.05)
            note = f" where eigenvalues nearly meet, {difference:.1e};"
            difference = largest_difference(result, reference, name)
        worst = max(worst, difference)
        print(f"    {name:20s} valid {valid:6.1%},{note} largest difference {difference:.1e}")
    print(f"    largest difference of all {worst:.1e}")
    if arguments.device:
        seconds = batch_seconds(label, arguments.device, arguments.repeats)
        print(f"    a batch of 2 in torch on {arguments.device}: {seconds:.3f} s")


if __name__ == "__main__":
    main()
