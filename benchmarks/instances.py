"""Instances by the graph against whole-volume calls of the library: CPU seconds, peak memory and errors, by size.

Simulated walls or affinities of cells, as bytes. Every row is a process of its own with one thread.

    python benchmarks/instances.py                      # walls and affinities at 256^3, against the library
    python benchmarks/instances.py --sizes 128,256,512  # the graph alone, arrays on disk: memory by size
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TILE = 128
"""Side of the cube of cells that is repeated."""
CELLS = 150
OFFSETS = ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (-9, 0, 0), (0, -9, 0), (0, 0, -9))
WALLS, AFFINITIES = "walls", "affinities"
LIBRARY, GRAPH, DISK = "library", "graph", "graph on disk"


def tile() -> tuple[Any, Any]:
    """Return a cube of numbered cells that continues on its other side, int32, and walls between them, float32."""
    import numpy as np
    from scipy import ndimage
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    points = rng.random((CELLS, 3)) * TILE
    grid = np.stack(np.meshgrid(*[np.arange(TILE) + 0.5] * 3, indexing="ij"), -1)
    cells = (cKDTree(points, boxsize=TILE).query(grid)[1] + 1).astype(np.int32)
    edge = np.zeros(cells.shape, bool)
    for axis in range(3):
        for step in (-1, 1):
            edge |= np.roll(cells, step, axis) != cells
    noise = ndimage.gaussian_filter(rng.normal(size=cells.shape), 1.0, mode="wrap")
    blurred = ndimage.gaussian_filter(edge.astype(np.float32), 0.7, mode="wrap")
    return cells, np.clip(1.2 * blurred + 0.15 * noise / noise.std(), 0, 1)


def heads_of(what: str, cells: Any, walls: Any) -> Any:
    """Return the simulated head of a tile, uint8 (C, *tile)."""
    import numpy as np

    if what == WALLS:
        return np.rint(255 * walls).astype(np.uint8)[None]
    rng = np.random.default_rng(1)
    found = np.zeros((len(OFFSETS), *cells.shape), np.uint8)
    for values, offset in zip(found, OFFSETS, strict=True):
        same = np.roll(cells, tuple(-step for step in offset), (0, 1, 2)) == cells
        values[...] = np.rint(255 * np.abs(same - 0.4 * rng.random(cells.shape)))
    return found


def source_of(what: str) -> Any:
    """Return how the graph reads the head."""
    from volumen.inference.postprocess.graph.sources import Source
    from volumen.inference.rules import InstanceRules

    if what == WALLS:
        return Source(InstanceRules("head"), (1.0, 1.0, 1.0))
    return Source(InstanceRules(affinities="head"), (1.0, 1.0, 1.0), OFFSETS)


def by_library(what: str, head: Any) -> Any:
    """Return instances by whole-volume calls of bioimage-cpp, as its authors' elf chains them."""
    import bioimage_cpp as bic
    import cc3d
    import edt
    import numpy as np
    from scipy import ndimage

    values = head.astype(np.float32) / 255
    if what == AFFINITIES:
        values[3:] = 1 - values[3:]
        return bic.segmentation.mutex_watershed(values, OFFSETS, 3)
    wall = values[0]
    smooth = ndimage.gaussian_filter(edt.edt(wall < 0.5, parallel=1), 2.0)
    top = (wall < 0.5) & (ndimage.maximum_filter(smooth, size=3) == smooth)
    seeds = cc3d.connected_components(top, connectivity=26).astype(np.int32)
    height = (0.8 * wall + 0.2 / (1 + smooth)).astype(np.float32)
    fragments = bic.segmentation.watershed(height, seeds).astype(np.uint32)
    graph = bic.graph.region_adjacency_graph(fragments, number_of_threads=1)
    features = bic.graph.features.edge_map_features(graph, fragments, wall, number_of_threads=1)
    policy = bic.graph.agglomeration.GaspClusterPolicy(linkage="mean")
    weights, sizes = 0.5 - features[:, 0].astype(np.float64), features[:, 1].astype(np.float64)
    return policy.optimize(graph, weights, edge_sizes=sizes)[fragments] + 1


def on_disk(source: Any, head: Any, shape: tuple[int, ...], folder: Path) -> None:
    """Find instances of an array on disk, block by block, as a prediction does."""
    import zarr

    from volumen.inference.postprocess.blocks import aligned_block
    from volumen.inference.postprocess.graph.volume import VolumeGraph
    from volumen.inference.postprocess.instance_output import BLOCK_VOXELS

    local, final = (
        zarr.create_array(folder / name, shape=shape, chunks=(64,) * 3, dtype="uint32")
        for name in ("local", "final")
    )
    graph = VolumeGraph(shape, aligned_block((), shape, (64,) * 3, BLOCK_VOXELS), source, folder / "graph")
    graph.create()

    def heads(box: Any) -> Any:
        return {"head": head[(slice(None), *box)]}

    for number in range(graph.count):
        graph.find_fragments(number, heads, lambda _: None, local.__setitem__, lambda: None)
    graph.join()
    for number in range(graph.count):
        graph.find_edges(number, local.__getitem__, heads, lambda _: None, lambda: None)
    graph.agglomerate()
    for number in range(graph.count):
        box, values = graph.numbered(number, local.__getitem__)
        final[box] = values


def child(what: str, how: str, side: int) -> None:
    """Measure one row, and print it as JSON."""
    import numpy as np
    import zarr

    from volumen.inference.postprocess.graph.volume import instances_of
    from volumen.metrics.objects.contingency import overlaps
    from volumen.metrics.objects.partition import adapted_rand_error, voi_merge, voi_split

    cells, walls = tile()
    head, source = heads_of(what, cells, walls), source_of(what)
    instances_of({"head": head[:, :24, :24, :24]}, source)  # loads the compiled code
    times = -(-side // TILE)
    row: dict[str, float] = {}
    if how == DISK:
        with tempfile.TemporaryDirectory() as folder:
            shape = (times * TILE,) * 3
            array = zarr.create_array(
                Path(folder) / "head",
                shape=(len(head), *shape),
                chunks=(len(head), 64, 64, 64),
                dtype="uint8",
            )
            for index in np.ndindex(times, times, times):
                place = tuple(slice(i * TILE, (i + 1) * TILE) for i in index)
                array[(slice(None), *place)] = head
            row["before"] = _peak()
            start = time.process_time()
            on_disk(source, array, shape, Path(folder))
            row["seconds"] = time.process_time() - start
            stored = {"fragments": "sizes.npy", "edges": "edges/regions_table.npy"}
            row |= {key: len(np.load(Path(folder) / "graph" / name)) for key, name in stored.items()}
    else:
        part = (slice(0, side),) * 3
        whole = np.ascontiguousarray(np.tile(head, (1, times, times, times))[(slice(None), *part)])
        row["before"] = _peak()
        start = time.process_time()
        found = by_library(what, whole) if how == LIBRARY else instances_of({"head": whole}, source)
        row["seconds"] = time.process_time() - start
        row["peak"] = _peak()
        # A cell that continues in the next tile is one object, so its copies are numbered by components.
        import cc3d

        truth = cc3d.connected_components(np.tile(cells, (times,) * 3)[part], connectivity=6)
        counts = overlaps(found.astype(np.uint32), truth)
        row |= {
            "rand": adapted_rand_error(counts),
            "voi": voi_split(counts) + voi_merge(counts),
            "instances": len(np.unique(found)),
        }
    row.setdefault("peak", _peak())
    print(json.dumps(row))


def _peak() -> float:
    """Return the peak resident memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(what: str, how: str, side: int) -> dict[str, float]:
    """Return a row, measured in a process of its own."""
    words = [sys.executable, __file__, "--child", what, how, str(side)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=256, help="side of the cubes that are compared (256)")
    parser.add_argument("--sizes", help="sides of cubes on disk, by commas: memory of the graph alone")
    parser.add_argument("--what", choices=(WALLS, AFFINITIES), help="only these heads")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1], int(options.child[2]))
        return
    for what in [options.what] if options.what else [WALLS, AFFINITIES]:
        if options.sizes:
            print(
                f"{what:11} {'voxels':>9} {'CPU s':>8} {'us a voxel':>10} {'before MB':>9} {'peak MB':>8} "
                f"{'fragments':>9} {'edges of regions':>16}"
            )
            for side in map(int, options.sizes.split(",")):
                row = measure(what, DISK, side)
                each = 1e6 * row["seconds"] / side**3
                print(
                    f"{'':11} {side:>7}^3 {row['seconds']:8.1f} {each:10.2f} {row['before']:9.0f} {row['peak']:8.0f} "
                    f"{row['fragments']:9} {row['edges']:16}"
                )
            continue
        print(
            f"{what:11} {'CPU s':>8} {'of library':>10} {'more MB':>8} {'Rand error':>10} {'VOI':>6} {'instances':>9}"
        )
        library = measure(what, LIBRARY, options.side)
        for how, row in ((LIBRARY, library), (GRAPH, measure(what, GRAPH, options.side))):
            print(
                f"{how:11} {row['seconds']:8.1f} {row['seconds'] / library['seconds']:10.2f} "
                f"{row['peak'] - row['before']:8.0f} {row['rand']:10.4f} {row['voi']:6.3f} {row['instances']:9}"
            )


if __name__ == "__main__":
    main()
