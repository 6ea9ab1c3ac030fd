# ruff: noqa: E402
"""Time the input side: (a) the index of valid patches, (b) reading and the whole pipeline, (c) the augmentation.

(a) is `valid_patches.py`: the index against decoding every stored label chunk once, and its peak memory.
(c) is `augmentation.py`: the augmentation alone against batchgeneratorsv2, where that is installed.
(b) times the way from a zarr volume to training tensors: plain reading, and the whole pipeline by stage.

The volume is written by zarr with 64^3 chunks and its default compression. "Read and normalise" is timed for
patches that coincide with chunks, for patches half a chunk apart (the default stride) and for patches
anywhere. The references, in the same run: slicing the same patches with zarr itself, without normalising
them, and decoding the chunks that they touch by their codec alone: no reader of whole chunks is faster than
that. Every figure comes cold, without the cache of decoded chunks, as in a volume far larger than the cache
(`dataset_config.chunk_cache_mib`), and warm, with all chunks decoded already: a training run lies between the
two. `--codecs` compares what the chunks may be compressed with. The whole pipeline reads image and label with the
halo that the four derived targets need, normalises, augments with the default probabilities, derives and
finalises. Freed memory is kept, by the references too, as training on a CPU keeps it. One thread; CPU seconds, medians
of rounds.

    python benchmarks/input_pipeline.py [--parts a b c] [--sizes 64 128] [--volume 320] [--rounds 5]
                                        [--codecs zstd lz4 none]
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
from zarr.codecs import BloscCodec, ZstdCodec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from volumen.data.caching.block_cache import BLOCKS, DEFAULT_BYTES
from volumen.data.formats.opening import open_volume
from volumen.data.index.patch_index import PatchLocation
from volumen.data.layout import OpenCase
from volumen.transforms.derive import DeriveTargetsd, derive_halo
from volumen.transforms.finalize import CropHalod, FinalizePatchd
from volumen.transforms.intensity import (
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandLowResolutiond,
    RandNoised,
)
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd
from volumen.utils.memory import keep_freed_memory

CHUNK = 64
SPACING = (1.0, 1.0, 1.0)
TASKS = {
    name: {"type": name, "source_target": "sheet"}
    for name in ("distance_transform", "surface_normals", "structure_tensor", "inplane_direction")
}
PATCHES = {64: 24, 128: 4}


CODECS = {
    "zstd": ZstdCodec(),  # what zarr 3 takes by default
    "lz4": BloscCodec(cname="lz4", shuffle="noshuffle"),
    "none": None,
}


def write_case(folder: Path, size: int, codec: str) -> OpenCase:
    """A noisy image of thin curved sheets and its label, as zarr arrays of (size,) * 3 bytes."""
    rng = np.random.default_rng(0)
    small = rng.standard_normal((size // 4,) * 3).astype(np.float32)
    wave = gaussian_filter(small, 4).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    depth = np.arange(size, dtype=np.float32)[:, None, None] + 150 * wave
    sheet = (np.mod(depth, 16) < 4).astype(np.uint8)
    image = np.clip(sheet * 60 + 90 + 20 * rng.standard_normal(sheet.shape), 0, 255).astype(np.uint8)
    for name, array in (("image", image), ("sheet", sheet)):
        stored = zarr.create_array(
            str(folder / f"{name}.zarr"),
            shape=array.shape,
            chunks=(CHUNK,) * 3,
            dtype=array.dtype,
            compressors=CODECS[codec],
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


def time_reading(case: OpenCase, codec: str, rounds: int) -> None:
    """Prints patches per CPU second of reading and normalising one image of 64^3."""
    extent, size = case.image.shape[0], 64
    read = ReadPatchd([], normalization_scheme="unit")
    stored = zarr.open_array(str(case.image.path), mode="r")
    decode = decoding_seconds(case, codec, rounds)
    kept = sum(file.stat().st_size for file in Path(str(case.image.path)).rglob("*") if file.is_file())
    print(
        f"read and normalise 64^3 from chunks of 64^3, codec {codec} "
        f"({kept / extent**3:.2f} of the bytes), patches per CPU second:"
    )
    print(f"  {'patches':20s} chunks   zarr slicing   codec alone     cold     warm   cold / zarr")
    rng = np.random.default_rng(1)
    for label, starts in (
        ("on the chunk grid", list(product(range(0, extent - size + 1, CHUNK), repeat=3))[:60]),
        ("half a chunk apart", rng.integers(0, (extent - size) // 32 + 1, (60, 3)) * 32),
        ("anywhere", rng.integers(0, extent - size + 1, (60, 3))),
    ):
        samples = located(case, size, starts)
        touched = statistics.mean(map(touched_chunks, samples))
        regions = [tuple(slice(first, first + size) for first in start) for start in starts]
        plain = len(samples) / cpu_seconds(lambda regions=regions: [stored[r] for r in regions], rounds)
        cold, warm = (
            len(samples) / with_cache(kept, lambda samples=samples: [read(s) for s in samples], rounds)
            for kept in (0, DEFAULT_BYTES)
        )
        alone = f"{1 / (touched * decode):13.0f}" if decode else f"{'-':>13s}"
        print(
            f"  {label:20s} {touched:6.1f}  {plain:13.0f} {alone} {cold:8.0f} {warm:8.0f} {cold / plain:13.1f}"
        )


def decoding_seconds(case: OpenCase, codec: str, rounds: int) -> float:
    """CPU seconds in which the codec decodes a chunk that is in memory already; 0 without a codec."""
    if codec == "none":
        return 0.0
    files = sorted(file for file in Path(str(case.image.path), "c").rglob("*") if file.is_file())[:27]
    stored = [file.read_bytes() for file in files]
    decode = numcodecs.get_codec({"id": "zstd" if codec == "zstd" else "blosc"}).decode
    return cpu_seconds(lambda: [decode(data) for data in stored], rounds) / len(stored)


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
    parser.add_argument(
        "--codecs", nargs="+", choices=CODECS, default=["zstd"], help="the whole pipeline reads the first"
    )
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
    keep_freed_memory(torch.device("cpu"))
    for codec in arguments.codecs[1:]:
        with tempfile.TemporaryDirectory() as folder:
            time_reading(write_case(Path(folder), arguments.volume, codec), codec, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        case = write_case(Path(folder), arguments.volume, arguments.codecs[0])
        time_reading(case, arguments.codecs[0], arguments.rounds)
        for size in arguments.sizes:
            for kept in (0, DEFAULT_BYTES):
                time_training(case, size, arguments.rounds, kept)


if __name__ == "__main__":
    main()
