"""Builds the index of patches that show something, from the images alone: empty space is left out.

A patch stands for the part of the volume that is nearest to its centre. A part is empty if in every channel its
standard deviation is below a share of that of the volume's parts with the most contrast. So a volume's own statistics
decide, and noise around an object counts as empty where the object has far more contrast.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from volumen.data.caching.fingerprints import fingerprint_of
from volumen.data.caching.index_cache import load_arrays, store_arrays
from volumen.data.formats.zarr_arrays.stored_chunks import stored_blocks
from volumen.data.index.label_counts import default_threads
from volumen.data.index.patch_grid import axis_starts
from volumen.data.index.patch_index import PatchIndex, PatchTable
from volumen.utils.boxes import Box
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.progress import grow, hidden
from volumen.utils.terminal.text import by, counted

logger = logging.getLogger(__name__)

VERSION = 1
"""Increased whenever the same parameters would give another index."""
MOST_PLACES = 20_000
"""Of a larger volume as many places are drawn at random, so that starting takes minutes for a volume of any size."""
REFERENCE = 99.0
"""Percentile of the standard deviations of a volume's places that counts as full contrast."""


@dataclass(frozen=True)
class _Places:
    """The grid of patches in one region: starts per axis, and the borders of the parts that they stand for."""

    row: int
    starts: list[np.ndarray]
    edges: list[np.ndarray]

    @property
    def total(self) -> int:
        return math.prod(len(axis) for axis in self.starts)


def find_patches_with_contrast(
    cases: Sequence[Any],
    boxes: Mapping[str, Sequence[Box]],
    patch_size: Sequence[int],
    *,
    stride: Sequence[int] | None = None,
    empty_below: float = 0.1,
    every_place: bool = False,
    seed: int = 0,
    most: int = MOST_PLACES,
    num_threads: int = 0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> PatchIndex:
    """Find the patches that show something.

    Args:
        cases: opened cases (`OpenCase`), of which only the images are read, once.
        boxes: regions to search, by case name.
        patch_size: voxels per axis.
        stride: voxels per axis between patches of the grid; None for half a patch.
        empty_below: share of a volume's contrast, 0 to 1; below it a place is empty. A constant place is always empty.
        every_place: take every place without reading one, up to `most` of each volume.
        seed: chooses the places of a volume with more than `most`.
        most: largest number of places of a volume that are read.
        num_threads: threads that read; 0 for one per CPU core, at most 8.
        cache_dir: folder for the index, or None for no cache.
        progress: show a progress bar.

    Returns:
        The index, with patches ordered by case, region and position; a patch may be moved by up to half a stride.

    Raises:
        VolumenError: every place of every image is constant.
    """
    patch = tuple(int(size) for size in patch_size)
    step = tuple(max(1, size // 2) for size in patch) if stride is None else tuple(int(s) for s in stride)
    regions = tuple((i, box) for i, case in enumerate(cases) for box in boxes.get(case.name, ()))
    key = {
        "contrast": VERSION,
        "patch": patch, "stride": step, "empty_below": empty_below, "seed": seed, "most": most,
        "regions": [[case, box] for case, box in regions],
        "images": [[case.name, list(case.image.shape), fingerprint_of(case.image)] for case in cases],
    }  # fmt: skip
    cached = None if every_place else cache_dir
    arrays = None if cached is None else load_arrays(Path(cached), key)
    if arrays is None:
        arrays = _measured(
            cases, regions, patch, step, empty_below, every_place, seed, most, num_threads, progress
        )
        if cached is not None:
            store_arrays(Path(cached), key, arrays)
    _report(cases, regions, arrays, patch)
    rows = len(arrays["region"])
    table = PatchTable(
        region=arrays["region"], start=arrays["start"], share=arrays["contrast"],
        shifts=np.zeros(rows, np.uint64), class_shifts=np.zeros((0, rows), np.uint64),
    )  # fmt: skip
    return PatchIndex(
        patch_size=patch, stride=step, regions=regions, shifts=(), classes=(),
        foreground=table, background=PatchTable.concatenate([], len(patch), 0),
    )  # fmt: skip


def _measured(
    cases: Sequence[Any], regions: Sequence[tuple[int, Box]], patch: tuple[int, ...], step: tuple[int, ...],
    empty_below: float, every_place: bool, seed: int, most: int, num_threads: int, progress: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return region, start and contrast (a share of the volume's) of the places that are not empty, and counts."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    read = np.zeros(len(cases), np.int64)
    with (
        tqdm(
            total=0, desc="places with contrast", unit="place", disable=hidden(progress), leave=False
        ) as bar,
        ThreadPoolExecutor(num_threads or default_threads()) as pool,
    ):
        for number, case in enumerate(cases):
            grids = [
                _lay(row, box, patch, step) for row, (owner, box) in enumerate(regions) if owner == number
            ]
            share = max(1, most // max(1, len(grids)))
            drawn = [_drawn(grid, case.image, share, [seed, number, grid.row]) for grid in grids]
            grow(bar, sum(map(len, drawn)))
            deviations = [
                np.ones((len(cells), 1))
                if every_place
                else np.array([_counting(bar, one) for one in pool.map(_reader(case.image, grid), cells)])
                for grid, cells in zip(grids, drawn)
            ]
            read[number] = sum(map(len, drawn))
            for grid, cells, contrast in zip(grids, drawn, _contrasts(deviations)):
                kept = (contrast > 0) & (contrast >= empty_below)
                starts = np.stack([axis[cells[:, i]] for i, axis in enumerate(grid.starts)], 1)
                found.append((np.full(int(kept.sum()), grid.row), starts[kept], contrast[kept]))
    empty = (np.zeros(0, np.int64), np.zeros((0, len(patch)), np.int64), np.zeros(0))
    region, start, contrast = (np.concatenate(parts) for parts in zip(empty, *found))
    return {
        "region": region.astype(np.int32),
        "start": start.astype(np.int32),
        "contrast": contrast.astype(np.float32),
        "read": read,
    }


def _lay(row: int, box: Box, patch: Sequence[int], step: Sequence[int]) -> _Places:
    """Lay the grid of patches over a region; the borders of the parts lie midway between the centres of patches."""
    starts = [axis_starts(low, high, size, gap) for (low, high), size, gap in zip(box, patch, step)]
    edges = [
        np.concatenate([[low], (axis[1:] + axis[:-1] + size) // 2, [high]])
        for (low, high), axis, size in zip(box, starts, patch)
    ]
    return _Places(row, starts, edges)


def _drawn(grid: _Places, image: Any, most: int, seed: Sequence[int]) -> np.ndarray:
    """Return the cells (N, D) of a grid to read, in order: all that may show something, or a random part of them."""
    shape = [len(axis) for axis in grid.starts]
    stored = stored_blocks(image, probe=False)
    if stored is not None and len(stored.indices) < stored.total:
        cells = stored.cells(grid.edges)  # chunks that are not stored are constant
        if len(cells) <= most:
            return cells
        rows = np.random.default_rng(seed).permutation(len(cells))[:most]
        return cells[np.sort(rows)]
    if grid.total <= most:
        flat = np.arange(grid.total)
    else:
        # Twice as many draws as needed, since a place may be drawn twice; a permutation of billions would not fit.
        draws = np.random.default_rng(seed).integers(grid.total, size=2 * most)
        flat = np.sort(draws[np.sort(np.unique(draws, return_index=True)[1])][:most])
    return np.stack(np.unravel_index(flat, shape), 1)


def _reader(image: Any, grid: _Places) -> Any:
    def deviation(cell: np.ndarray) -> np.ndarray:
        """Return the standard deviation of a part per channel, of its finite values."""
        region = tuple(slice(int(axis[index]), int(axis[index + 1])) for axis, index in zip(grid.edges, cell))
        values = np.asarray(image.read(region)).reshape(image.channels, -1)
        if values.dtype.kind != "f":
            return values.std(axis=1, dtype=np.float64)
        finite = [channel[np.isfinite(channel)] for channel in values]
        return np.array([channel.std(dtype=np.float64) if channel.size else 0.0 for channel in finite])

    return deviation


def _counting(bar: Any, value: np.ndarray) -> np.ndarray:
    bar.update()
    return value


def _contrasts(deviations: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return per region the contrast (N,) of its places: the largest over channels of the share of the volume's."""
    together = np.concatenate([part for part in deviations if len(part)] or [np.zeros((1, 1))])
    full = np.percentile(together, REFERENCE, axis=0)
    # With few places of contrast the percentile may be that of constant ones.
    full = np.where(full > 0, full, together.max(axis=0))
    return [
        (part / np.where(full > 0, full, 1.0)).max(axis=1) if len(part) else np.zeros(0)
        for part in deviations
    ]


def _report(
    cases: Sequence[Any],
    regions: Sequence[tuple[int, Box]],
    arrays: Mapping[str, np.ndarray],
    patch: Sequence[int],
) -> None:
    """Log how many places show something; warn of volumes without any.

    Raises:
        VolumenError: no volume has such a place.
    """
    owners = np.array([case for case, _ in regions], np.int64)
    kept = np.bincount(owners[arrays["region"]], minlength=len(cases))
    searched = sorted(set(owners.tolist()))
    blank = [cases[number].image.source for number in searched if not kept[number]]
    if len(blank) == len(searched):
        more = f" and {len(blank) - 3} more" if len(blank) > 3 else ""
        raise VolumenError(
            ", ".join(blank[:3]) + more,
            expected="images with contrast",
            found="the same value everywhere",
            remedy="check that these are the images, and that they are written whole",
        )
    if blank:
        logger.warning(
            "%s%s: left out, the same value everywhere",
            ", ".join(blank[:3]), f" and {len(blank) - 3} more" if len(blank) > 3 else "",
        )  # fmt: skip
    logger.info(
        "pretraining: %d of %s of %s have contrast, in %s",
        int(kept.sum()), counted(int(arrays["read"].sum()), "place"), by(patch),
        counted(int((kept > 0).sum()), "volume"),
    )  # fmt: skip
