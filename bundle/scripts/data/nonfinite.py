"""How many values of an image are NaN or infinite, counted block by block."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from volumen.data.formats.volumes import Region, Volume
from volumen.data.index.label_values import stored_regions
from volumen.data.index_cache import load_arrays, store_arrays
from volumen.utils.progress import hidden
from volumen.utils.threads import in_threads


class Nonfinite(NamedTuple):
    """What was found.

    Attributes:
        total: values that are NaN or infinite, over all channels.
        first: voxel of the first one in the order of reading, in spatial axes; empty where there is none.
    """

    total: int
    first: tuple[int, ...] = ()


def count_nonfinite(
    image: Volume,
    *,
    num_threads: int = 1,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> Nonfinite:
    """Count the NaN and infinite values of an image in one pass; images of whole numbers are not read.

    Args:
        image: a volume; chunks that are not stored are not read.
        num_threads: threads that read.
        cache_dir: folder in which the result is kept until the image changes, or None.
        progress: show a progress bar.
    """
    from tqdm import tqdm

    if np.dtype(image.dtype).kind != "f":
        return Nonfinite(0)
    key = {"nonfinite values": image.fingerprint()} if cache_dir is not None else {}
    kept = load_arrays(Path(cache_dir), key) if cache_dir is not None else None
    if kept is not None:
        return Nonfinite(int(kept["count"]), tuple(int(voxel) for voxel in kept["first"]))
    count, first = 0, np.zeros(0, np.int64)
    regions, _ = stored_regions(image)
    with tqdm(
        total=len(regions), desc="finite values", unit="block", disable=hidden(progress), leave=False
    ) as bar:
        for found, voxel in in_threads(lambda region: _in_block(image, region), regions, num_threads):
            if found and (not count or tuple(voxel) < tuple(first)):
                first = voxel
            count += found
            bar.update()
    if cache_dir is not None:
        store_arrays(Path(cache_dir), key, {"count": np.array(count), "first": first})
    return Nonfinite(count, tuple(int(voxel) for voxel in first))


def _in_block(image: Volume, region: Region) -> tuple[int, np.ndarray]:
    wrong = ~np.isfinite(image.read(region))
    if not wrong.any():
        return 0, np.zeros(0, np.int64)
    spatial = np.argwhere(wrong.any(axis=0))[0]
    return int(wrong.sum()), spatial + [part.start for part in region]
