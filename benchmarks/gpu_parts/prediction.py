"""Part d: voxels per second of a streamed prediction from file to file, against bare forward passes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_parts.common import Run, synchronize
from gpu_parts.steps import build


def run_part(run: Run) -> None:
    """Predict with windows of two sizes."""
    for window, side in ((16, 40),) if run.tiny else ((128, 384), (192, 448)):
        for batch in (1,) if run.tiny else (1, 4):
            run.attempt(
                f"windows of {window}^3, {batch} at once, overlap 0.5",
                lambda w=window, s=side, b=batch: predict(run, w, s, b),
                10,
            )


def predict(run: Run, window: int, side: int, batch: int) -> dict[str, Any]:
    """Return voxels per second of both, their ratio, and the number of windows."""
    import zarr

    from volumen.data.formats.opening import open_volume
    from volumen.inference.jobs import Job
    from volumen.inference.predict import predict_volume
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.inference.windows.heads import Head
    from volumen.transforms.normalize import Normalizer

    network = build("ours", run.features).to(run.device).eval()
    head = {"surface": Head("surface", 1, "sigmoid", "binary")}
    predictor = Predictor(network, {}, head, Normalizer("unit"), (window,) * 3)
    amp = "bfloat16" if run.device.type == "cuda" else "off"
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        image = Path(folder, "image.zarr")
        voxels = np.random.default_rng(0).integers(0, 256, (side,) * 3, dtype=np.uint8)
        zarr.create_array(image, data=voxels, chunks=(64,) * 3)
        for number, cut in enumerate((window, None)):  # the first one compiles and warms up
            region = None if cut is None else ((0, cut),) * 3
            out = Path(folder, f"o{number}.zarr")
            request = PredictRequest(str(image), "", folder, amp=amp, region=region, batch_size=batch)
            synchronize(run.device)
            began = time.perf_counter()
            report = predict_volume(predictor, Job(open_volume(image), out), request)
            synchronize(run.device)
            ours = time.perf_counter() - began
    windows = report.windows
    bare = bare_passes(run, network, window, batch, windows)
    return {
        "Mvoxels_per_s": side**3 / ours / 1e6,
        "windows": windows,
        "bare_Mvoxels_per_s": side**3 / bare / 1e6,
        "busy_share": min(1.0, bare / ours),
    }


def bare_passes(run: Run, network: torch.nn.Module, window: int, batch: int, windows: int) -> float:
    """Return the seconds of the forward passes alone, from some of them."""
    image = torch.rand(batch, 1, *[window] * 3, device=run.device)
    passes = min(-(-windows // batch), 1 if run.tiny else 12)
    with (
        torch.inference_mode(),
        torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"),
    ):
        for _ in range(1 if run.tiny else 3):
            network(image)
        synchronize(run.device)
        began = time.perf_counter()
        for _ in range(passes):
            network(image)
        synchronize(run.device)
        return (time.perf_counter() - began) / passes * windows / batch
