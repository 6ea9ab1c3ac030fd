# ruff: noqa: E402
"""Time the input side: (a) the index of valid patches, (b) reading and the whole pipeline, (c) the augmentation.

(a) is `valid_patches.py`: the index against decoding every stored label chunk once, and its peak memory.
(c) is `augmentation.py`: the augmentation alone against batchgeneratorsv2, where that is installed.
(b) times the way from a zarr volume to training tensors: plain reading, and the whole pipeline by stage.

The volume is written by zarr with 64^3 chunks and its default compression. "Read and normalise" is timed for
patches that coincide with chunks, for patches half a chunk apart (the default stride) and for patches
anywhere, against zarr's own reading of the chunks that they touch, once each, in the same run, and against
their codec alone: no reader of whole chunks is faster than that. Every figure
comes cold, without the cache of decoded chunks, as in a volume far larger than the cache, and warm, with all
chunks decoded already: a training run lies between the two. The whole pipeline reads image and label with the
halo that the four derived targets need, normalises, augments with the default probabilities, derives and
finalises. One thread; CPU seconds, medians of rounds.

    python benchmarks/input_pipeline.py [--parts a b c] [--sizes 64 128] [--volume 320] [--rounds 5]
"""

from __future__ import annotations

import os

# Before NumPy, zarr and torch are imported: one thread for everybody.
for _name in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "BLOSC_NTHREADS",
):
    os.environ[_name] = "1"

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numcodecs
import numpy as np
import torch
import zarr
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from scripts.data.block_cache import BLOCKS, DEFAULT_BYTES
from scripts.data.layout import OpenCase
from scripts.data.patches import PatchLocation
from scripts.data.volumes import open_volume
from scripts.transforms.derive import DeriveTargetsd, derive_halo
from scripts.transforms.finalize import CropHalod, FinalizePatchd
from scripts.transforms.intensity import (
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandLowResolutiond,
    RandNoised,
)
from scripts.transforms.read import ReadPatchd
from scripts.transforms.spatial import RandSpatialTransformd

CHUNK = 64
SPACING = (1.0, 1.0, 1.0)
TASKS = {
    name: {"type": name, "source_target": "sheet"}
    for name in ("distance_transform", "surface_normals", "structure_tensor", "inplane_direction")
}
PATCHES = {64: 24, 128: 4}


def write_case(folder: Path, size: int) -> OpenCase:
    """A noisy image of thin curved sheets and its label, as zarr arrays of (size,) * 3 bytes."""
    rng = np.random.default_rng(0)
    small = rng.standard_normal((size // 4,) * 3).astype(np.float32)
    wave = gaussian_filter(small, 4).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    depth = np.arange(size, dtype=np.float32)[:, None, None] + 150 * wave
    sheet = (np.mod(depth, 16) < 4).astype(np.uint8)
    image = np.clip(sheet * 60 + 90 + 20 * rng.standard_normal(sheet.shape), 0, 255).astype(np.uint8)
    for name, array in (("image", image), ("sheet", sheet)):
        stored = zarr.create_array(
            str(folder / f"{name}.zarr"), shape=array.shape, chunks=(CHUNK,) * 3, dtype=array.dtype
        )
        stored[...] = array
    return OpenCase(
        name="volume",
        image=open_volume(folder / "image.zarr", axes="zyx"),
        labels={"sheet": open_volume(folder / "sheet.zarr", axes="zyx")},
        masks={},
        spacing=SPACING,
    )


def located(case: OpenCase, size: int, starts: Sequence[Sequence[int]]) -> list[dict]:
    """Samples for patches of `size` at `starts`."""
    bounds = tuple((0, extent) for extent in case.image.shape)
    return [
        {"case": case, "location": PatchLocation(0, tuple(map(int, start)), (size,) * 3, bounds)}
        for start in starts
    ]


def cpu_seconds(run: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds of `run` after one warm-up."""
    run()
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def touched_chunks(sample: dict) -> int:
    """Number of storage chunks that a patch overlaps."""
    location = sample["location"]
    return int(
        np.prod([(s + n - 1) // CHUNK - s // CHUNK + 1 for s, n in zip(location.start, location.size)])
    )


def time_reading(case: OpenCase, rounds: int) -> None:
    """Prints patches per CPU second of reading and normalising one image of 64^3."""
    extent, size = case.image.shape[0], 64
    read = ReadPatchd([], normalization_scheme="unit")
    corners = list(product(range(0, extent - size + 1, CHUNK), repeat=3))
    rng = np.random.default_rng(1)
    stored = zarr.open_array(str(case.image.path), mode="r")
    chunks = [tuple(slice(first, first + CHUNK) for first in corner) for corner in corners[:27]]
    decoding = cpu_seconds(lambda: [stored[chunk] for chunk in chunks], rounds) / len(chunks)
    codec = cpu_seconds(codec_alone(case, corners[:27]), rounds) / len(chunks)
    print(
        f"zarr itself returns {1 / decoding:.0f} whole chunks of 64^3 per CPU second, "
        f"the codec alone decodes {1 / codec:.0f}"
    )
    anywhere = rng.integers(0, extent - size + 1, (60, 3))
    halves = rng.integers(0, (extent - size) // 32 + 1, (60, 3)) * 32
    for label, starts in (
        ("on the chunk grid", corners[:60]),
        ("half a chunk apart", halves),
        ("anywhere", anywhere),
    ):
        samples = located(case, size, starts)
        touched = statistics.mean(map(touched_chunks, samples))
        cold, warm = (
            1
            / with_cache(kept, lambda samples=samples: [read(sample) for sample in samples], rounds)
            * len(samples)
            for kept in (0, DEFAULT_BYTES)
        )
        print(
            f"read and normalise 64^3, patches {label}: cold {cold:6.0f}, warm {warm:6.0f} per CPU second "
            f"({touched:.1f} chunks each; cold takes {1 / (cold * touched * decoding):.2f} of zarr's time for them, "
            f"{1 / (cold * touched * codec):.2f} of the codec's)"
        )


def codec_alone(case: OpenCase, corners: Sequence[Sequence[int]]) -> Callable[[], object]:
    """Decode the stored bytes of chunks, without reading them."""
    folder = Path(str(case.image.path), "c")
    stored = [folder.joinpath(*(str(first // CHUNK) for first in corner)).read_bytes() for corner in corners]
    codec = numcodecs.get_codec({"id": "zstd"})
    return lambda: [codec.decode(data) for data in stored]


def with_cache(kept: int, run: Callable[[], object], rounds: int) -> float:
    """CPU seconds of `run` with `kept` bytes for decoded chunks."""
    BLOCKS.resize(kept)
    return cpu_seconds(run, rounds)


def training_stages(size: int) -> list[tuple[str, Callable]]:
    """The transforms of training in order, each with the stage that it belongs to."""
    halo = derive_halo(TASKS, SPACING)
    names = list(TASKS)
    augment = [RandNoised(), RandBlurd(), RandBrightnessd(), RandContrastd(), RandLowResolutiond()]
    augment += [RandGammad(prob=0.1, invert=True), RandGammad(prob=0.3)]
    return [
        ("draw", RandSpatialTransformd()),
        ("read, resample, normalise", ReadPatchd(["sheet"], patch_size=(size,) * 3, halo=halo)),
        *(("intensity", transform) for transform in augment),
        ("derive four tasks", DeriveTargetsd(TASKS, halo=halo)),
        ("finalise", CropHalod(["sheet"], halo)),
        ("finalise", FinalizePatchd(["sheet"], names)),
    ]


def time_training(case: OpenCase, size: int, rounds: int, kept: int) -> None:
    """Prints patches per CPU second of the whole pipeline and each stage's share, `kept` bytes of chunks cached."""
    BLOCKS.resize(kept)
    stages = training_stages(size)
    rng = np.random.default_rng(2)
    samples = located(case, size, rng.integers(0, case.image.shape[0] - size + 1, (PATCHES[size], 3)))
    shares: list[Counter] = []
    for number in range(rounds + 1):
        spent: Counter = Counter()
        for index, sample in enumerate(samples):
            seeds = np.random.SeedSequence([number, index]).generate_state(len(stages))
            for (stage, transform), seed in zip(stages, seeds):
                if hasattr(transform, "set_random_state"):
                    transform.set_random_state(seed=int(seed))
                start = time.process_time()
                sample = transform(sample)
                spent[stage] += time.process_time() - start
        shares.append(spent)
    totals = [sum(spent.values()) / len(samples) for spent in shares[1:]]
    total = statistics.median(totals)
    halo = derive_halo(TASKS, SPACING)
    state = "warm" if kept else "cold"
    print(
        f"whole pipeline at {size}^3, {state}, halo {halo}: {1 / total:.1f} patches per CPU second, of which"
    )
    for stage in dict.fromkeys(name for name, _ in stages):
        each = statistics.median([spent[stage] / len(samples) for spent in shares[1:]])
        print(f"  {stage:27s} {each * 1e3:8.2f} ms  {100 * each / total:5.1f} %")


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--parts", nargs="+", choices="abc", default=["a", "b", "c"])
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(PATCHES), default=sorted(PATCHES))
    parser.add_argument("--volume", type=int, default=320, help="voxels per axis, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "a" in arguments.parts:
        run_beside("valid_patches.py", "--repeats", str(arguments.rounds))
    if "b" in arguments.parts:
        time_patches(arguments)
    if "c" in arguments.parts:
        run_beside("augmentation.py")


def run_beside(name: str, *words: str) -> None:
    """Run another benchmark in a process of its own, which has its own memory to be measured."""
    print(f"--- {name}", flush=True)
    source = str(Path(__file__).resolve().parents[1] / "bundle")
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *words],
        check=True,
        env={**os.environ, "PYTHONPATH": source},
    )


def time_patches(arguments: argparse.Namespace) -> None:
    """Part (b)."""
    with tempfile.TemporaryDirectory() as folder:
        case = write_case(Path(folder), arguments.volume)
        time_reading(case, arguments.rounds)
        for size in arguments.sizes:
            for kept in (0, DEFAULT_BYTES):
                time_training(case, size, arguments.rounds, kept)


if __name__ == "__main__":
    main()
