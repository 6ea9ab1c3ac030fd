"""Cost of a streamed prediction beyond the bare forward passes of its windows, and the gain of bfloat16.

CPU seconds (time.process_time) on one thread, medians of alternating rounds: the reference runs the same
network on as many windows of the same shape, and does nothing else.

    python benchmarks/predict.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

import numpy as np
import torch
import zarr
from scripts.data.volumes import open_volume
from scripts.inference.heads import Head
from scripts.inference.jobs import Job
from scripts.inference.predict import PredictRequest, predict_volume
from scripts.inference.predictor import Predictor
from scripts.networks.multihead import MultiHeadDynUNet
from scripts.transforms.normalize import Normalizer


def make_predictor(patch: tuple[int, ...], features: list[int]) -> Predictor:
    torch.manual_seed(0)
    heads = {"ink": {"out_channels": 1, "separate_decoder": True}}
    network = MultiHeadDynUNet(3, 1, heads, features, [1] + [2] * (len(features) - 1)).eval()
    return Predictor(network, {}, {"ink": Head("ink", 1)}, Normalizer("unit"), patch)


def bare(predictor: Predictor, windows: int, dtype: str) -> float:
    """Return the CPU seconds of the forward passes alone."""
    window = torch.rand(1, 1, *predictor.patch_size)
    began = time.process_time()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        for _ in range(windows):
            predictor.network(window)
    return time.process_time() - began


def streamed(predictor: Predictor, image: Path, amp: str) -> tuple[float, int]:
    """Return the CPU seconds of a whole prediction, file to file, and its windows."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        request = PredictRequest(str(image), "", folder, amp=amp)
        began = time.process_time()
        report = predict_volume(predictor, Job(open_volume(image), Path(folder, "o.zarr")), request)
        return time.process_time() - began, report.windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=160, help="side of the volume")
    parser.add_argument("--patch", type=int, default=64, help="side of a window")
    parser.add_argument("--features", default="16,32,64,128", help="features per stage")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    predictor = make_predictor((arguments.patch,) * 3, [int(f) for f in arguments.features.split(",")])
    with tempfile.TemporaryDirectory(dir=".") as folder:
        image = Path(folder, "image.zarr")
        side = arguments.side
        array = zarr.create_array(image, shape=(side,) * 3, chunks=(64,) * 3, dtype="uint8")
        array[...] = np.random.default_rng(0).integers(0, 256, (side,) * 3, dtype=np.uint8)
        bare(predictor, 1, "float32")
        rows: dict[str, list[tuple[float, float]]] = {"off": [], "bfloat16": []}
        windows = 0
        for _ in range(arguments.rounds):
            for amp, times in rows.items():
                ours, windows = streamed(predictor, image, amp)
                times.append((ours, bare(predictor, windows, "bfloat16" if amp == "bfloat16" else "float32")))
    print(f"{side}^3, {windows} windows of {arguments.patch}^3, CPU seconds on one thread")
    for amp, times in rows.items():
        ours, reference = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"  amp {amp:>8}: streamed {ours:7.1f} s, bare forward passes {reference:7.1f} s, ", end="")
        print(f"ratio {statistics.median(a / b for a, b in times):.3f}")
    gain = [a / b for (a, _), (b, _) in zip(rows["off"], rows["bfloat16"], strict=True)]
    print(f"  bfloat16 against float32: {statistics.median(gain):.2f} times as fast")


if __name__ == "__main__":
    main()
