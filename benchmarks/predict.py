"""Cost of a streamed prediction beyond the bare forward passes of its windows, and the gain of bfloat16.

CPU seconds (time.process_time) on one thread, medians of alternating rounds. The reference runs the same network on as
many windows of the same shape, with freed memory kept as ours keeps it, and does nothing else. With `--nnunet` a second
one is nnU-Net's predictor with the same network and windows, from an array in memory to class probabilities in memory;
ours goes from file to file.

    python benchmarks/predict.py
    python benchmarks/predict.py --side 192 --features 32,64,128,256 --nnunet     # 125 windows, minutes a round

nnU-Net is `pip install nnunetv2`; where it is not installed, its published sliding window is run as written below
(nnunetv2 2.6, `nnUNetPredictor._internal_predict_sliding_window_return_logits`: half-precision sums and weights).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

import numpy as np
import torch
import zarr
from torch import nn

from volumen.data.formats.opening import open_volume
from volumen.inference.jobs import Job
from volumen.inference.predict import predict_volume
from volumen.inference.predictor import Predictor
from volumen.inference.request import PredictRequest
from volumen.inference.windows.blending import gaussian_window
from volumen.inference.windows.heads import Head
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.transforms.normalize import Normalizer
from volumen.utils.memory import freed_memory_kept


def make_predictor(patch: tuple[int, ...], features: list[int], classes: int) -> Predictor:
    torch.manual_seed(0)
    heads = {"ink": {"out_channels": classes, "separate_decoder": True}}
    network = MultiHeadDynUNet(3, 1, heads, features, [1] + [2] * (len(features) - 1)).eval()
    kind = ("sigmoid", "binary") if classes == 1 else ("softmax", "multiclass")
    return Predictor(network, {}, {"ink": Head("ink", classes, *kind)}, Normalizer("unit"), patch)


def bare(predictor: Predictor, windows: int, dtype: str) -> float:
    """Return the CPU seconds of the forward passes alone."""
    window = torch.rand(1, 1, *predictor.patch_size)
    began = time.process_time()
    with (
        freed_memory_kept(torch.device("cpu")),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        for _ in range(windows):
            predictor.network(window)
    return time.process_time() - began


def streamed(predictor: Predictor, image: Path, amp: str, side: int | None = None) -> tuple[float, int]:
    """Return the CPU seconds of a whole prediction, or of a corner of that side, file to file, and its windows."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        region = None if side is None else ((0, side),) * 3
        request = PredictRequest(str(image), "", folder, amp=amp, region=region)
        began = time.process_time()
        report = predict_volume(predictor, Job(open_volume(image), Path(folder, "o.zarr")), request)
        return time.process_time() - began, report.windows


class OneOutput(nn.Module):
    """The network as nnU-Net calls it: a tensor in, a tensor out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)["ink"]


def nnunet(predictor: Predictor, image: np.ndarray) -> tuple[float, str]:
    """Return the CPU seconds of nnU-Net's sliding window over an array, and which code ran."""
    network = OneOutput(predictor.network)
    data = torch.from_numpy(predictor.normalizer(image[None]))
    classes = predictor.targets["ink"].channels
    try:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    except ImportError:
        source = "its algorithm, as published"

        def run() -> torch.Tensor:
            return sliding_window_of_nnunet(network, data, predictor.patch_size, classes)
    else:
        source = "nnunetv2"
        theirs = nnUNetPredictor(
            use_mirroring=False,
            perform_everything_on_device=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )
        theirs.network = network
        theirs.configuration_manager = SimpleNamespace(patch_size=predictor.patch_size)
        theirs.label_manager = SimpleNamespace(num_segmentation_heads=classes)

        def run() -> torch.Tensor:
            return theirs.predict_sliding_window_return_logits(data)

    began = time.process_time()
    logits = run()
    (logits.float().sigmoid() if classes == 1 else logits.float().softmax(0))
    return time.process_time() - began, source


@torch.inference_mode()
def sliding_window_of_nnunet(
    network: nn.Module, data: torch.Tensor, patch: tuple[int, ...], classes: int
) -> torch.Tensor:
    """Return logits (classes, *space) of a normalised image (C, *space), at least a patch large."""
    gaussian = torch.from_numpy(gaussian_window(patch)).half() * 10
    gaussian.clamp_(min=gaussian[gaussian != 0].min().item())
    logits = torch.zeros((classes, *data.shape[1:]), dtype=torch.half)
    counts = torch.zeros(data.shape[1:], dtype=torch.half)
    starts = []
    for size, side in zip(data.shape[1:], patch):
        steps = math.ceil((size - side) / (side * 0.5)) + 1
        starts.append([round((size - side) / max(steps - 1, 1) * i) for i in range(steps)])
    for start in itertools.product(*starts):
        place = tuple(slice(s, s + p) for s, p in zip(start, patch))
        output = network(data[(slice(None), *place)][None])[0]
        output *= gaussian
        logits[(slice(None), *place)] += output
        counts[place] += gaussian
    return logits.div_(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=160, help="side of the volume")
    parser.add_argument("--patch", type=int, default=64, help="side of a window")
    parser.add_argument("--features", default="16,32,64,128", help="features per stage")
    parser.add_argument("--classes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nnunet", action="store_true", help="measure nnU-Net's predictor too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    predictor = make_predictor(
        (arguments.patch,) * 3, [int(f) for f in arguments.features.split(",")], arguments.classes
    )
    with tempfile.TemporaryDirectory(dir=".") as folder:
        image = Path(folder, "image.zarr")
        side = arguments.side
        voxels = np.random.default_rng(0).integers(0, 256, (side,) * 3, dtype=np.uint8)
        zarr.create_array(image, data=voxels, chunks=(64,) * 3)
        streamed(predictor, image, "off", arguments.patch // 2)  # imports, compiled kernels
        rows: dict[str, list[tuple[float, float]]] = {"off": [], "bfloat16": []}
        theirs: list[float] = []
        windows, source = 0, ""
        for _ in range(arguments.rounds):
            for amp, times in rows.items():
                ours, windows = streamed(predictor, image, amp)
                times.append((ours, bare(predictor, windows, "bfloat16" if amp == "bfloat16" else "float32")))
            if arguments.nnunet:
                seconds, source = nnunet(predictor, voxels)
                theirs.append(seconds)
    print(f"{side}^3, {windows} windows of {arguments.patch}^3, CPU seconds on one thread")
    for amp, times in rows.items():
        ours, reference = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"  amp {amp:>8}: streamed {ours:7.1f} s, bare forward passes {reference:7.1f} s, ", end="")
        print(f"ratio {statistics.median(a / b for a, b in times):.3f}")
    gain = [a / b for (a, _), (b, _) in zip(rows["off"], rows["bfloat16"], strict=True)]
    print(f"  bfloat16 against float32: {statistics.median(gain):.2f} times as fast")
    if theirs:
        ratio = statistics.median(ours / other for (ours, _), other in zip(rows["off"], theirs, strict=True))
        print(f"  nnU-Net ({source}): {statistics.median(theirs):.1f} s, ", end="")
        print(f"streamed against it {ratio:.3f}")


if __name__ == "__main__":
    main()
