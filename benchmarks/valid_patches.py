"""CPU time of the valid-patch index against merely decoding every stored label chunk once, and its peak memory.

The label is 1024 x 512 x 512 uint8 in zarr chunks of 64^3, 5 % of it labelled in compact places, no mask. The index
is exact, at full resolution, for patches of 64^3 with a stride of half a patch. Run:

    OMP_NUM_THREADS=1 PYTHONPATH=bundle python benchmarks/valid_patches.py
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SHAPE, CHUNK, PATCH = (1024, 512, 512), 64, 64
FLOORS = ("zarr", "our reader", "our reader, no cache")


def write_label(path: Path, *, absent_chunks: bool) -> None:
    """Write balls of label 1 to 3 until 5 % of the volume is labelled."""
    import zarr

    rng = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    axis = np.arange(-64, 64)
    square = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    while np.count_nonzero(label) < 0.05 * label.size:
        corner = [int(rng.integers(0, size - 128)) for size in SHAPE]
        part = label[tuple(slice(c, c + 128) for c in corner)]
        part[square < rng.uniform(30, 64) ** 2] = rng.integers(1, 4)
    array = zarr.create_array(
        path,
        shape=SHAPE,
        chunks=(CHUNK,) * 3,
        dtype="u1",
        config={"write_empty_chunks": not absent_chunks},
    )
    array[:] = label


def measure(path: Path, repeats: int) -> dict[str, float]:
    """Return median CPU seconds of the index and of ways to decode the stored chunks, and the peak memory in MB."""
    import zarr

    from volumen.data.caching.block_cache import BLOCKS
    from volumen.data.formats.opening import open_volume
    from volumen.data.formats.zarr_arrays.stored_chunks import stored_blocks
    from volumen.data.index.patches import find_valid_patches
    from volumen.utils.boxes import whole_box

    volume = open_volume(path)
    known = stored_blocks(volume)
    assert known is not None
    regions = [tuple(slice(i * CHUNK, (i + 1) * CHUNK) for i in index) for index in known.indices.tolist()]
    array = zarr.open_array(path, mode="r")
    case = SimpleNamespace(name="a", image=volume, labels={"t": volume}, masks={})

    def decode_by_zarr() -> None:
        for region in regions:
            array[region]

    def decode_by_reader() -> None:
        for region in regions:
            volume.read(region)

    def decode_bare() -> None:
        before = BLOCKS.max_bytes
        BLOCKS.resize(0)
        decode_by_reader()
        BLOCKS.resize(before)

    def index(**options: object) -> Callable[[], object]:
        return lambda: find_valid_patches(
            [case],
            {"a": [whole_box(SHAPE)]},
            (PATCH,) * 3,
            targets=["t"],
            num_threads=1,
            progress=False,
            **options,  # type: ignore[arg-type]
        )

    ways = {
        "zarr": decode_by_zarr,
        "our reader": decode_by_reader,
        "our reader, no cache": decode_bare,
        "index": index(),
        "index with 64 displacements per patch": index(jitter=True),
        "index with background and 3 classes": index(background=True, classes={"t": [1, 2, 3]}),
        "index with bounding boxes": index(min_bbox_percent=0.5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            BLOCKS.clear()
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    result = {name: statistics.median(values) for name, values in seconds.items()}
    return {**result, "chunks": len(regions)}


def peak_of_one_index(path: Path) -> dict[str, float]:
    """Return the peak memory in MB of a process that imports what it needs and builds the index once."""
    from volumen.data.formats.opening import open_volume
    from volumen.data.index.patches import find_valid_patches
    from volumen.utils.boxes import whole_box

    volume = open_volume(path)
    case = SimpleNamespace(name="a", image=volume, labels={"t": volume}, masks={})
    boxes = {"a": [whole_box(SHAPE)]}
    index = find_valid_patches(
        [case], boxes, (PATCH,) * 3, targets=["t"], num_threads=1, progress=False, jitter=True
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak": peak, "patches": len(index)}


def in_subprocess(what: str, path: Path, repeats: int) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, "--path", str(path), "--repeats", str(repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--measure", choices=["time", "peak"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        act = {
            "time": lambda: measure(arguments.path, arguments.repeats),
            "peak": lambda: peak_of_one_index(arguments.path),
        }
        print(json.dumps(act[arguments.measure]()))
        return
    with tempfile.TemporaryDirectory() as folder:
        for title, absent in (("empty chunks absent", True), ("every chunk stored", False)):
            path = Path(folder, title.replace(" ", "_") + ".zarr")
            write_label(path, absent_chunks=absent)
            found = in_subprocess("time", path, arguments.repeats)
            peak = in_subprocess("peak", path, 1)
            print(f"{title}: {found.pop('chunks')} stored chunks, {peak['patches']} valid patches")
            for name, seconds in found.items():
                what = f"decode each stored chunk once: {name}" if name in FLOORS else name
                ratios = "  ".join(f"{seconds / found[floor]:5.2f} to {floor}" for floor in FLOORS)
                print(f"  {what:52s} {seconds:6.3f} CPU s  {ratios}")
            print(f"  peak memory, imports included {peak['peak']:.0f} MB")


if __name__ == "__main__":
    main()
