"""What all parts share: the command's choices, results that are written as they come, clocks and small inputs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

FULL, SMALL = (32, 64, 128, 256, 320), (4, 8)


@dataclass
class Run:
    """A part's choices, and where its results go.

    Args:
        part: the part's letter.
        device: cpu or cuda.
        tiny: inputs and networks of a size that a CPU computes in seconds.
        folder: for files; results are in `results.jsonl` in it.
        data: folder of the fib25 data, or None.
        ends: `time.monotonic()` at which the part is stopped.
    """

    part: str
    device: torch.device
    tiny: bool
    folder: Path
    data: Path | None
    ends: float

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.ends - time.monotonic()

    @property
    def features(self) -> tuple[int, ...]:
        return SMALL if self.tiny else FULL

    def write(self, name: str, **values: Any) -> None:
        """Append a result to the file, and print it."""
        line = {"part": self.part, "name": name, **values}
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{self.part} {name}: " + ", ".join(f"{key} {_short(value)}" for key, value in values.items()))

    def attempt(self, name: str, action: Callable[[], dict[str, Any]], seconds: float = 3.0) -> None:
        """Write the results of an action, or why there are none; no failure stops the ones after it."""
        if self.left < seconds:
            self.write(name, skipped="no time left")
            return
        try:
            self.write(name, **action())
        except Exception as error:  # each result stands alone, whatever another case does
            text = str(error).splitlines()
            self.write(name, failed=f"{type(error).__name__}: {text[0] if text else ''}"[:300])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(action: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Return the milliseconds of one call: of a series on a GPU that nothing interrupts."""
    for _ in range(warm_up):
        action()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return (time.perf_counter() - began) / repeats * 1e3


def gpu_memory(device: torch.device) -> float | None:
    """Return the largest GPU memory held since the last reset, in GiB."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value of the reference."""
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    return float((ours - reference).abs().max() / reference.abs().max().clamp_min(1e-12))


def blobs(shape: tuple[int, ...], seed: int, classes: int = 2) -> np.ndarray:
    """Return labels in blobs: int32 (*shape)."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return np.digitize(noise, np.quantile(noise, np.linspace(0.5, 0.9, classes - 1))).astype(np.int32)


def phantom(run: Run, side: int) -> Path:
    """Return the folder of a phantom, written once per side."""
    from volumen.phantom.volume import write_phantom

    folder = run.folder / f"phantom_{side}"
    return folder if folder.is_dir() else write_phantom(folder, (side,) * 3, labelled="all")


def training_settings(run: Run, patch: int, **changes: Any) -> dict[str, Any]:
    """Return settings of a training on the phantom with four derived targets."""
    tasks = ("distance_transform", "surface_normals", "structure_tensor", "inplane_direction")
    losses = {
        "distance_transform": "SignedDistanceLoss",
        "surface_normals": "CosineSimilarityLoss",
        "structure_tensor": "MSELoss",
        "inplane_direction": "SignInvariantCosineLoss",
    }
    training = {
        "patch_size": [patch] * 3,
        "batch_size": 2,
        "max_epoch": 1,
        "max_val_steps_per_epoch": 1,
        "final_val_steps": 1,
        "val_every_n": 1000,
        **changes,
    }
    return {
        "tr_setup": {"deterministic": False},
        "tr_config": training,
        "model_config": {"features_per_stage": list(run.features), "separate_decoders": False},
        "dataset_config": {"cache_valid_patches": False},
        "auxiliary_tasks": {
            name: {"type": name, "source_target": "surface", "reach": 6, "losses": [{"name": losses[name]}]}
            for name in tasks
        },
    }
