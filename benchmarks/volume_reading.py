# ruff: noqa: E402
"""Time reading patches of TIFF, NIfTI and zarr volumes against the libraries that define the formats.

References, each in the same run on the same patches: zarr-python's slicing of a zarr array, tifffile's zarr view of
a TIFF stack, nibabel's slicing of a `.nii`. "Cold" empties the cache of decoded blocks before each patch; "warm"
keeps it, as training does. One thread; CPU seconds, medians of rounds.

    python benchmarks/volume_reading.py [--size 64] [--volume 256] [--rounds 5]
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

import nibabel
import numpy as np
import tifffile
import zarr
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundle"))

from volumen.data.block_cache import BLOCKS
from volumen.data.formats.volumes import open_volume

Region = tuple[slice, ...]
Reader = Callable[[Region], np.ndarray]


def main() -> None:
    """Print patches per CPU second and the ratio to the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="patch edge in voxels")
    parser.add_argument("--volume", type=int, default=256, help="volume edge in voxels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, default=20, help="patches per round")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(args.volume,) * 3).astype("f4")
    array = (gaussian_filter(noise, 1) * 400 + 128).clip(0, 255).astype("u1")
    corners = rng.integers(0, args.volume - args.size + 1, (args.patches, 3))
    patches = [tuple(slice(int(i), int(i) + args.size) for i in corner) for corner in corners]
    print(f"{'volume':26s}{'reference':>11s}{'cold':>11s}{'warm':>11s}   patches per CPU second (ratio)")
    with tempfile.TemporaryDirectory() as folder:
        for name, path, reference in volumes(Path(folder), array):
            volume = open_volume(path)
            np.testing.assert_array_equal(volume.read(patches[0])[0], reference(patches[0]))
            base = rate(reference, patches, args.rounds, cold=False)
            cold = rate(volume.read, patches, args.rounds, cold=True)
            warm = rate(volume.read, patches, args.rounds, cold=False)
            print(f"{name:26s}{base:11.0f}{cold:11.0f}{warm:11.0f}   ({cold / base:.1f}, {warm / base:.1f})")


def volumes(folder: Path, array: np.ndarray) -> Iterator[tuple[str, Path, Reader]]:
    """Write one volume after the other; give its name, its path and the reference's reader."""
    for name, options in (
        ("zarr v2", {"zarr_format": 2}),
        ("zarr v3", {}),
        ("zarr v3, shards of 128^3", {"shards": (128,) * 3}),
    ):
        path = folder / f"{name}.zarr"
        zarr.create_array(path, data=array, chunks=(64, 64, 64), **options)
        yield name, path, zarr.open(path, mode="r").__getitem__
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


def rate(read: Reader, patches: list[Region], rounds: int, *, cold: bool) -> float:
    """Return patches per CPU second, the median of rounds after one to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        spent = 0.0
        for patch in patches:
            if cold:
                BLOCKS.clear()
            start = time.process_time()
            read(patch)
            spent += time.process_time() - start
        seconds.append(spent)
    return len(patches) / statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
