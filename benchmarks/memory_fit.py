"""Estimated against measured peak memory of a training step on this CPU.

Each size trains for three steps in a process of its own, with the run's network, losses, optimizer and data; measured
is the largest resident memory of the process less what it occupied before the network was built.

    python benchmarks/memory_fit.py             # two minutes of CPU
    python benchmarks/memory_fit.py --large     # and sizes up to 6 GB
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Patch, batch, settings of the network, number of derived targets, mixed precision.
SIZES: list[tuple[list[int], int, dict[str, Any], int, str]] = [
    ([32, 32, 32], 2, {"features_per_stage": [16, 32, 64]}, 0, "off"),
    ([48, 48, 48], 2, {}, 0, "off"),
    ([48, 48, 48], 2, {}, 0, "bfloat16"),
    ([64, 64, 64], 1, {"separate_decoders": True}, 2, "off"),
    ([64, 64, 64], 2, {"features_per_stage": [16, 32, 64, 128]}, 0, "off"),
    ([16, 96, 96], 2, {}, 0, "off"),
    ([256, 256], 4, {}, 0, "off"),
    ([64, 64, 64], 2, {}, 0, "off"),
]
LARGE: list[tuple[list[int], int, dict[str, Any], int, str]] = [
    ([96, 96, 96], 2, {}, 0, "off"),
    ([128, 128, 128], 1, {"separate_decoders": True}, 1, "bfloat16"),
    ([512, 512], 12, {}, 0, "off"),
]


def write_data(folder: Path, dims: int) -> None:
    """Write an image of noise with a labelled ball in it, large enough for every patch."""
    import numpy as np
    import tifffile

    shape = (160,) * 3 if dims == 3 else (768, 768)
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    label = (sum(axis**2 for axis in axes) < 0.5).astype(np.uint8)
    image = (label * 100 + np.random.default_rng(0).integers(0, 99, shape)).astype(np.uint8)
    for name, values in (("images/a", image), ("labels/a_ball", label)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / f"{name}.tif", values)


def child(folder: str, setting: str) -> None:
    """Print the estimate and the measured peak in bytes."""
    import torch

    from volumen.config.manager import ConfigManager
    from volumen.time_budget.measure import anywhere, training_objects
    from volumen.time_budget.memory_estimate import step_memory
    from volumen.time_budget.trial_step import TrialStep, collated
    from volumen.utils.device_memory import resident_memory
    from volumen.utils.memory import freed_memory_kept, limit_kept_memory

    torch.set_num_threads(1)
    patch, batch, model, tasks, amp = json.loads(setting)
    derived = {
        f"distance_{number}": {
            "type": "distance_transform",
            "source_target": "ball",
            "losses": [{"name": "SignedDistanceLoss"}],
        }
        for number in range(tasks)
    }
    config = ConfigManager(
        tr_config={"patch_size": patch, "batch_size": batch, "amp": amp},
        model_config=model,
        auxiliary_tasks=derived,
        dataset_dir=folder,
        device="cpu",
    )
    estimate = step_memory(config).total
    parser = training_objects(anywhere(config))
    dataset = parser.get_parsed_content("train#dataset")
    samples = [dataset[(0, number)] for number in range(batch)]
    with freed_memory_kept(config.device):
        before = resident_memory()
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
        trial = TrialStep(config, parser)
        for _ in range(3):
            trial.step(collated(samples))
            limit_kept_memory()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    if peak > 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        raise RuntimeError("the peak was not counted anew")
    print(json.dumps([estimate, peak - before]))


def measure(folder: Path, size: tuple) -> tuple[int, int]:
    """Return the estimate and the measured peak of one size, from a process of its own."""
    bundle = str(Path(__file__).resolve().parents[1] / "bundle")
    environment = {**os.environ, "PYTHONPATH": bundle, "OMP_NUM_THREADS": "1", "VOLUMEN_CACHE": "off"}
    told = subprocess.run(
        [sys.executable, __file__, "--child", str(folder), json.dumps(size)],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()[-1]
    estimate, peak = json.loads(told)
    return estimate, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="also sizes up to 6 GB")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    print(
        f"{'patch':>12} {'batch':>5} {'targets':>7} {'precision':>9} {'estimate MiB':>12} {'peak MiB':>9}  ratio"
    )
    for size in SIZES + (LARGE if options.large else []):
        patch, batch, _, tasks, amp = size
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), len(patch))
            estimate, peak = measure(Path(folder), size)
        name = "x".join(map(str, patch))
        print(
            f"{name:>12} {batch:5d} {1 + tasks:7d} {amp:>9} {estimate / 2**20:12.0f} {peak / 2**20:9.0f}"
            f"  {estimate / peak:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
