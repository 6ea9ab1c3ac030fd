"""Counts the NaN and infinite values of an image, block by block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from volumen.data.caching.fingerprints import fingerprint_of
from volumen.data.caching.records import Records
from volumen.data.formats.volumes import Region, Volume
from volumen.data.index.label_values import Blocks, stored_regions
from volumen.utils.terminal.progress import grow
from volumen.utils.threads import in_threads


class Nonfinite(NamedTuple):
    """Result of the count.

    Attributes:
        total: values that are NaN or infinite, over all channels.
        first: spatial index of the first such voxel in reading order; empty if there is none.
    """

    total: int
    first: tuple[int, ...] = ()


def count_nonfinite(
    image: Volume,
    *,
    num_threads: int = 1,
    records: Records | None = None,
    bar: Any | None = None,
) -> Nonfinite:
    """Count the NaN and infinite values of an image in one pass; images of whole numbers are not read.

    Args:
        image: a volume; chunks that are not stored are not read.
        num_threads: threads that read.
        records: records of "nonfinite values" that store the result until the image changes, or None.
        bar: progress bar whose total grows by the blocks to read, or None.
    """
    if np.dtype(image.dtype).kind != "f":
        return Nonfinite(0)
    key: dict[str, str] = {}
    if records is not None and records.enabled:
        key = {"nonfinite values": fingerprint_of(image)}
        known = records.get(key)
        if known is not None:
            return Nonfinite(int(known["count"]), tuple(int(voxel) for voxel in known["first"]))
    count, first = 0, np.zeros(0, np.int64)
    regions, absent = stored_regions(image)
    if not all(math.isfinite(value) for value in absent):
        regions = Blocks(image.shape, regions.size)  # blocks that are not stored count too
    if bar is not None:
        grow(bar, len(regions))
    for found, voxel in in_threads(lambda region: _in_block(image, region), regions, num_threads):
        if found and (not count or tuple(voxel) < tuple(first)):
            first = voxel
        count += found
        if bar is not None:
            bar.update()
    if records is not None:
        records.put(key, {"count": np.array(count), "first": first})
    return Nonfinite(count, tuple(int(voxel) for voxel in first))


def _in_block(image: Volume, region: Region) -> tuple[int, np.ndarray]:
    wrong = ~np.isfinite(image.read(region))
    if not wrong.any():
        return 0, np.zeros(0, np.int64)
    spatial = np.argwhere(wrong.any(axis=0))[0]
    return int(wrong.sum()), spatial + [part.start for part in region]
