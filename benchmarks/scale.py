"""Compute a training on, and a prediction of, a huge volume from costs that were measured: bytes, cores, hours, money.

Costs of the CPU are those that `docs/scaling.md` and the benchmarks named in it state; the time of a step and of a
forward pass on a GPU are arguments, since they differ by GPU: take them from `benchmarks/gpu.py`.

    python benchmarks/scale.py [--step-ms 200] [--forward-ms 30] [--terabytes 10] [--gpus 1 8 64]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

CHUNK, PATCH = 128, 128


@dataclass(frozen=True)
class Costs:
    """What was measured, and what is assumed.

    Args:
        step_ms: milliseconds of a training step of `batch` patches of 128^3 on a GPU.
        forward_ms: milliseconds of a forward pass of one window of 128^3 on a GPU.
        decode_ms: CPU milliseconds to read and decode a chunk of 64^3 bytes with zstd (590 patches of 8 a second).
        draw_ms: CPU milliseconds in which a worker draws and copies a patch of 128^3 for the device (196 a second).
        window_ms: CPU milliseconds of a prediction per window of 64^3, beside its forward pass.
        image_ratio: compression of the image.
        label_ratio: compression of labels.
        batch: patches per step.
        request_s: seconds of a request to object storage.
        gpu_hour: price of an hour of a GPU.
    """

    step_ms: float = 200.0
    forward_ms: float = 30.0
    decode_ms: float = 1000 / (590 * 8)
    draw_ms: float = 1000 / 196
    window_ms: float = 5.0
    image_ratio: float = 2.0
    label_ratio: float = 20.0
    batch: int = 2
    request_s: float = 0.05
    gpu_hour: float = 2.5

    @property
    def chunk_ms(self) -> float:
        """CPU milliseconds to decode a chunk of 128^3."""
        return self.decode_ms * (CHUNK / 64) ** 3


@dataclass(frozen=True)
class Training:
    """What a training needs per second.

    Attributes:
        patches: patches per second.
        stored_bytes: bytes per second from the storage.
        cores: CPU cores that read, decode and draw.
        requests: requests in flight to object storage.
        workers: reading processes, of which each waits for the chunks of its patch.
    """

    patches: float
    stored_bytes: float
    cores: float
    requests: float
    workers: float


def training(costs: Costs, gpus: int) -> Training:
    """Return what feeds a training whose steps nothing delays.

    A random patch of the size of a chunk overlaps eight chunks of the image, and eight of the label.
    """
    patches = gpus * costs.batch / costs.step_ms * 1e3
    chunk = CHUNK**3
    stored = 8 * chunk / costs.image_ratio + 8 * chunk / costs.label_ratio
    cpu_ms = 2 * 8 * costs.chunk_ms + costs.draw_ms
    waiting = 2 * costs.request_s + cpu_ms / 1e3  # image and label one after the other
    return Training(
        patches, patches * stored, patches * cpu_ms / 1e3, patches * 16 * costs.request_s, patches * waiting
    )


@dataclass(frozen=True)
class Prediction:
    """What a prediction needs.

    Attributes:
        windows: number of windows.
        hours: of all GPUs together, side by side.
        read_bytes: bytes from the storage, each chunk once.
        written_bytes: bytes to the storage.
        cores: CPU cores that keep up.
        price: of the GPUs.
    """

    windows: float
    hours: float
    read_bytes: float
    written_bytes: float
    cores: float
    price: float


def prediction(costs: Costs, voxels: float, gpus: int, overlap: float = 0.5) -> Prediction:
    """Return what a prediction of a volume of bytes needs, for one output channel of bytes."""
    windows = voxels / (PATCH * (1 - overlap)) ** 3
    seconds = windows * costs.forward_ms / 1e3 / gpus
    cpu_ms = windows * costs.window_ms * (PATCH / 64) ** 3 + voxels / CHUNK**3 * costs.chunk_ms
    return Prediction(
        windows,
        seconds / 3600,
        voxels / costs.image_ratio,
        voxels / costs.image_ratio,
        cpu_ms / 1e3 / seconds,
        seconds / 3600 * gpus * costs.gpu_hour,
    )


@dataclass
class Tables:
    """The two tables as Markdown."""

    costs: Costs
    lines: list[str] = field(default_factory=list)

    def text(self, terabytes: float, gpus: list[int]) -> str:
        """Return the tables for a volume and some numbers of GPUs."""
        self.lines = [
            "| GPUs | patches/s | read | cores | requests in flight | workers |",
            "|" + " --- |" * 6,
        ]
        for count in gpus:
            need = training(self.costs, count)
            self.lines.append(
                f"| {count} | {need.patches:.0f} | {need.stored_bytes / 1e6:.0f} MB/s | {need.cores:.1f} |"
                f" {need.requests:.0f} | {need.workers:.0f} |"
            )
        self.lines += ["", "| GPUs | hours | read | written | cores | price |", "|" + " --- |" * 6]
        for count in gpus:
            found = prediction(self.costs, terabytes * 1e12, count)
            per_second = found.hours * 3600
            self.lines.append(
                f"| {count} | {found.hours:.1f} | {found.read_bytes / per_second / 1e6:.0f} MB/s |"
                f" {found.written_bytes / per_second / 1e6:.0f} MB/s | {found.cores:.1f} | {found.price:.0f} |"
            )
        return "\n".join(self.lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, default=Costs.step_ms, help="a step of 2 patches of 128^3")
    parser.add_argument("--forward-ms", type=float, default=Costs.forward_ms, help="a window of 128^3")
    parser.add_argument("--terabytes", type=float, default=10, help="size of the volume, a byte per voxel")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--request", type=float, default=Costs.request_s, help="seconds of a request")
    parser.add_argument("--gpu-hour", type=float, default=Costs.gpu_hour, help="price of a GPU's hour")
    arguments = parser.parse_args()
    costs = Costs(
        step_ms=arguments.step_ms,
        forward_ms=arguments.forward_ms,
        request_s=arguments.request,
        gpu_hour=arguments.gpu_hour,
    )
    print(Tables(costs).text(arguments.terabytes, arguments.gpus))


if __name__ == "__main__":
    main()
