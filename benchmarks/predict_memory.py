"""Peak resident memory of a prediction against the size of the volume.

Each volume is predicted in a process of its own. The image is a zarr array on disk (noise under a smooth
pattern), the network a small U-Net-like pair of convolutions, so what differs between sizes is the streaming.

    python benchmarks/predict_memory.py                 # 128^3, 256^3, 512^3
    python benchmarks/predict_memory.py --huge          # and 256 x 4096 x 4096 (some minutes, 5 GB of disk)
    python benchmarks/predict_memory.py --sizes 128,256 # cubes of these sides
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = [(128, 128, 128), (256, 256, 256), (512, 512, 512)]
HUGE = (256, 4096, 4096)


def make_image(path: Path, shape: tuple[int, ...]) -> None:
    """Write an image of 128^3 chunks, block by block."""
    import numpy as np
    import zarr

    chunks = tuple(min(128, n) for n in shape)
    array = zarr.create_array(path, shape=shape, chunks=chunks, dtype="uint8")
    block = np.random.default_rng(0).integers(0, 64, chunks, dtype=np.uint8)
    for z in range(0, shape[0], chunks[0]):
        for y in range(0, shape[1], chunks[1]):
            for x in range(0, shape[2], chunks[2]):
                array[z : z + chunks[0], y : y + chunks[1], x : x + chunks[2]] = block + (z + y + x) % 128


def child(image: str, output: str, overlap: float) -> None:
    """Predict one image; print the peak resident memory in MB, the CPU seconds and the windows."""
    import torch
    from torch import nn

    from volumen.data.formats.opening import open_volume
    from volumen.inference.jobs import Job
    from volumen.inference.predict import predict_volume
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.inference.windows.heads import Head
    from volumen.transforms.normalize import Normalizer

    torch.set_num_threads(1)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv3d(1, 1, 1)

        def forward(self, x, targets=None):
            return {"ink": self.net(x)}

    predictor = Predictor(Tiny().eval(), {}, {"ink": Head("ink", 1)}, Normalizer("unit"), (64, 64, 64))
    request = PredictRequest(image, "", output, overlap=overlap, amp="off")
    began = time.process_time()
    report = predict_volume(predictor, Job(open_volume(image), Path(output)), request)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{peak:.0f} {time.process_time() - began:.1f} {report.windows}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--huge", action="store_true", help=f"also {HUGE}")
    parser.add_argument("--sizes", help="sides of cubes, by commas (default: 128,256,512)")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--child", nargs=2, metavar=("IMAGE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child, arguments.overlap)
        return
    reference = None
    sizes = [(int(side),) * 3 for side in arguments.sizes.split(",")] if arguments.sizes else SIZES
    print(f"{'volume':>18} {'windows':>8} {'CPU s':>8} {'peak MB':>8}  ratio to the first")
    for shape in sizes + ([HUGE] if arguments.huge else []):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            image, output = Path(folder, "image.zarr"), Path(folder, "out.zarr")
            make_image(image, shape)
            command = [sys.executable, __file__, "--overlap", str(arguments.overlap)]
            bundle = str(Path(__file__).resolve().parents[1] / "bundle")
            environment = {**os.environ, "PYTHONPATH": bundle, "OMP_NUM_THREADS": "1"}
            told = subprocess.run(
                [*command, "--child", str(image), str(output)],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout.split()
            peak, seconds, windows = float(told[0]), float(told[1]), int(told[2])
            reference = reference or peak
            name = " x ".join(map(str, shape))
            print(f"{name:>18} {windows:8d} {seconds:8.1f} {peak:8.0f}  {peak / reference:.2f}", flush=True)


if __name__ == "__main__":
    main()
