# ruff: noqa: E402
"""Time reading patches of zarr, TIFF and NIfTI volumes against the libraries that define the formats.

References, each in the same run on the same patches. Of zarr arrays: zarr-python's slicing, and TensorStore where
it is installed. Of others: tifffile's zarr view of a TIFF stack, nibabel's slicing of a `.nii`. "Cold" stores no
decoded blocks; "warm" does, as training does, with the same bound for ours and TensorStore, once all patches were read.
zarr-python has no such cache. One thread; CPU seconds, medians of rounds in which the readers take turns.

At the end a process that has read by TensorStore forks, as a data loader does on Linux, and the child reads as well.

    python benchmarks/volume_reading.py [--size 64] [--volume 256] [--rounds 5] [--only zarr]
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "BLOSC_NTHREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numcodecs
import numpy as np
import tifffile
import zarr
import zarr.codecs
from scipy.ndimage import gaussian_filter

try:
    import tensorstore
except ImportError:
    tensorstore = None

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from volumen.data.caching.block_cache import BLOCKS, DEFAULT_BYTES
from volumen.data.formats.opening import open_volume

Region = tuple[slice, ...]
Reader = Callable[[Region], np.ndarray]


def main() -> None:
    """Print patches per CPU second and the ratio to the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="patch edge in voxels")
    parser.add_argument("--volume", type=int, default=256, help="volume edge in voxels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, default=20, help="patches per round")
    parser.add_argument("--only", choices=("zarr", "others"), help="leave the other formats out")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(args.volume,) * 3).astype("f4")
    array = (gaussian_filter(noise, 1) * 400 + 128).clip(0, 255).astype("u1")
    corners = rng.integers(0, args.volume - args.size + 1, (args.patches, 3))
    patches = [tuple(slice(int(i), int(i) + args.size) for i in corner) for corner in corners]
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "others":
            compare_zarr(Path(folder), array, patches, args.rounds)
        if args.only != "zarr":
            compare_others(Path(folder), array, patches, args.rounds)


def compare_zarr(folder: Path, array: np.ndarray, patches: list[Region], rounds: int) -> None:
    """Print a row for each kind of zarr array: zarr-python, TensorStore and ours."""
    columns = ("zarr", "ours", "warm", *(("TensorStore", "warm") if tensorstore else ()))
    print(f"{'chunks of 64^3':26s}" + "".join(f"{name:>12s}" for name in columns))
    for name, path in zarr_arrays(folder, array):
        volume = open_volume(path)
        plain = zarr.open(path, mode="r").__getitem__
        np.testing.assert_array_equal(volume.read(patches[0])[0], plain(patches[0]))
        readers = [(plain, 0), (volume.read, 0), (volume.read, DEFAULT_BYTES)]
        readers += [(open_tensorstore(path, cached), 0) for cached in (0, DEFAULT_BYTES) if tensorstore]
        print(f"{name:26s}" + "".join(f"{value:12.0f}" for value in rates(readers, patches, rounds)))
    if tensorstore is not None and hasattr(os, "fork"):
        print(f"TensorStore in a process that was forked: {read_in_fork(path, patches[0])}")


def zarr_arrays(folder: Path, array: np.ndarray) -> Iterator[tuple[str, Path]]:
    """Write one zarr array after the other; give its name and its path."""
    codecs = {
        2: {"zstd": numcodecs.Zstd(3), "blosc lz4": numcodecs.Blosc("lz4"), "none": None},
        3: {
            "zstd": zarr.codecs.ZstdCodec(level=3),
            "blosc lz4": zarr.codecs.BloscCodec(cname="lz4"),
            "none": None,
        },
    }
    for version, shards in ((2, None), (3, None), (3, (128,) * 3)):
        for codec, compressor in codecs[version].items():
            name = f"v{version} {codec}{', shards of 128^3' if shards else ''}"
            options: dict[str, Any] = {"zarr_format": version, "compressors": compressor, "shards": shards}
            zarr.create_array(folder / f"{name}.zarr", data=array, chunks=(64, 64, 64), **options)
            yield name, folder / f"{name}.zarr"


def open_tensorstore(path: Path, cached: int) -> Reader:
    """Return TensorStore's reader of a zarr array, with one thread and a cache of `cached` bytes."""
    context = {
        "data_copy_concurrency": {"limit": 1},
        "file_io_concurrency": {"limit": 1},
        "cache_pool": {"total_bytes_limit": cached},
    }
    spec = {
        "driver": "zarr3" if (path / "zarr.json").is_file() else "zarr",
        "kvstore": {"driver": "file", "path": str(path)},
        # Faster: it does not ask the system whether a chunk in the cache has changed since. Ours always asks.
        "recheck_cached_data": False,
    }
    store = tensorstore.open(spec, read=True, context=tensorstore.Context(context)).result()
    return lambda region: store[region].read().result()


def read_in_fork(path: Path, region: Region) -> str:
    """Read a region in a process that is forked from this one; tell how that ended."""
    child = os.fork()
    if child == 0:
        open_tensorstore(path, 0)(region)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "works" if code == 0 else f"dies with exit code {code}"


def compare_others(folder: Path, array: np.ndarray, patches: list[Region], rounds: int) -> None:
    """Print a row for each TIFF and NIfTI volume: the format's library and ours."""
    print(f"{'':26s}{'reference':>12s}{'ours':>12s}{'warm':>12s}")
    for name, path, reference in other_volumes(folder, array):
        volume = open_volume(path)
        np.testing.assert_array_equal(volume.read(patches[0])[0], reference(patches[0]))
        readers = [(reference, 0), (volume.read, 0), (volume.read, DEFAULT_BYTES)]
        base, cold, warm = rates(readers, patches, rounds)
        print(f"{name:26s}{base:12.0f}{cold:12.0f}{warm:12.0f}   ({cold / base:.1f}, {warm / base:.1f})")


def other_volumes(folder: Path, array: np.ndarray) -> Iterator[tuple[str, Path, Reader]]:
    """Write one volume after the other; give its name, its path and the reference's reader."""
    for name, options in (
        ("TIFF, raw", {}),
        ("TIFF, deflated pages", {"compression": "zlib"}),
        ("TIFF, deflated tiles", {"compression": "zlib", "tile": (128, 128)}),
    ):
        path = folder / f"{name}.tif"
        tifffile.imwrite(path, array, photometric="minisblack", **options)
        with tifffile.TiffFile(path) as tiff:
            yield name, path, zarr.open(tiff.series[0].aszarr(), mode="r").__getitem__
    path = folder / "a.nii"
    nibabel.Nifti1Image(array.T, np.eye(4)).to_filename(path)
    proxy = nibabel.load(path).dataobj
    yield "NIfTI", path, lambda region: np.asarray(proxy[region[::-1]]).T


def rates(readers: list[tuple[Reader, int]], patches: list[Region], rounds: int) -> list[float]:
    """Return patches per CPU second of readers, medians of rounds; a round runs one reader after the other.

    Args:
        readers: each with the bytes of decoded blocks that our cache may hold. (To empty a large cache before each
            patch would measure how the C library returns memory to the system and gets it again.)
        patches: what is read; once before the clock starts.
        rounds: number of rounds.
    """
    seconds: list[list[float]] = [[] for _ in readers]
    for _ in range(rounds):
        for (read, cached), spent in zip(readers, seconds):
            BLOCKS.clear()
            BLOCKS.resize(cached)
            for patch in patches:
                read(patch)
            start = time.process_time()
            for patch in patches:
                read(patch)
            spent.append(time.process_time() - start)
    return [len(patches) / statistics.median(spent) for spent in seconds]


if __name__ == "__main__":
    main()
