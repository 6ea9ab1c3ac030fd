"""The valid-patch index: where in the labelled volumes training and validation patches may lie.

Patches start on a grid with half a patch as the default stride; the last one of a region is aligned with the
region's end. A patch is valid if, for at least one target, enough of it is labelled. "Labelled" means: inside
the target's mask if there is one, else a label other than 0; a target's ignore label is never labelled.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.boxes import Box, box_extent
from scripts.data.cells import window_extremes, window_sums
from scripts.data.index_cache import load_arrays, store_arrays
from scripts.data.label_counts import (
    CellCounts,
    CountRequest,
    LabelCounter,
    LabelReader,
    count_case,
    default_threads,
)
from scripts.data.progress import grow, hidden
from scripts.errors import VolumenError
from scripts.text import by

logger = logging.getLogger(__name__)

INDEX_VERSION = 2
"""Raised whenever the same parameters would give another index, so that old cache files are not used."""

MAX_GRID_CELLS = 2**29
"""Above this many cells the counts of one target alone would take 2 GB."""

MAX_CELLS = 2**25
"""Above this many cells of the counting grid, training positions are tied more closely to the patch grid."""


@dataclass(frozen=True)
class PatchLocation:
    """Where one patch lies.

    Args:
        case: index into the list of cases.
        start: first voxel per axis; negative, or too near the end, only where the region is smaller than the
            patch.
        size: patch size in voxels.
        bounds: the region of the volume that may be read; the rest of the patch and of its halo is padding.
    """

    case: int
    start: tuple[int, ...]
    size: tuple[int, ...]
    bounds: Box


@dataclass(frozen=True)
class PatchTable:
    """Patches of one kind, as arrays with one row per patch (N patches, D axes, K classes).

    Args:
        region: (N,) row of `PatchIndex.regions`.
        start: (N, D) first voxel, on the grid.
        share: (N,) labelled share of the patch, that of the best target.
        shifts: (N,) uint64; bit i is set where the patch, moved by the i-th of `PatchIndex.shifts`, stays
            valid.
        class_shifts: (K, N) uint64; the same where, besides, the k-th of `PatchIndex.classes` lies in the central part
            of the patch: half of it along every axis, to the nearest border of the counting grid, and up to the
            region's end for a patch that lies there. Also where a patch holds, off its centre, what no patch holds
            in its central part.
    """

    region: np.ndarray
    start: np.ndarray
    share: np.ndarray
    shifts: np.ndarray
    class_shifts: np.ndarray

    def __len__(self) -> int:
        return len(self.region)

    @classmethod
    def concatenate(cls, tables: Sequence[PatchTable], ndim: int, num_classes: int) -> PatchTable:
        """Join tables row by row; none gives an empty table."""
        empty = cls(
            region=np.zeros(0, np.int32),
            start=np.zeros((0, ndim), np.int32),
            share=np.zeros(0, np.float32),
            shifts=np.zeros(0, np.uint64),
            class_shifts=np.zeros((num_classes, 0), np.uint64),
        )
        every = [empty, *tables]
        return cls(
            region=np.concatenate([t.region for t in every]),
            start=np.concatenate([t.start for t in every]),
            share=np.concatenate([t.share for t in every]),
            shifts=np.concatenate([t.shifts for t in every]),
            class_shifts=np.concatenate([t.class_shifts for t in every], axis=1),
        )


@dataclass(frozen=True)
class PatchIndex:
    """All patches that may be drawn.

    Args:
        patch_size: voxels per axis.
        stride: of the grid, voxels per axis.
        regions: (case index, box) of every region that was searched.
        shifts: displacements from the grid, voxels per axis, of which a patch's bits tell which are allowed;
            the first is zero. Empty: any displacement up to half a stride inside the region is allowed.
        classes: (target, label value) pairs whose presence was recorded.
        foreground: the valid patches; with background sampling, those among them that hold a labelled object.
        background: known patches without any object; empty unless they were asked for.
    """

    patch_size: tuple[int, ...]
    stride: tuple[int, ...]
    regions: tuple[tuple[int, Box], ...]
    shifts: tuple[tuple[int, ...], ...]
    classes: tuple[tuple[str, int], ...]
    foreground: PatchTable
    background: PatchTable

    def __len__(self) -> int:
        """Return the number of foreground patches."""
        return len(self.foreground)

    def grid_location(self, row: int, *, background: bool = False) -> PatchLocation:
        """Return a patch where it lies on the grid."""
        table = self.background if background else self.foreground
        return self._location(table, row, (0,) * len(self.patch_size))

    def random_location(
        self,
        row: int,
        rng: np.random.Generator,
        *,
        background: bool = False,
        class_row: int | None = None,
    ) -> PatchLocation:
        """Return a patch moved at random by up to half a stride, so that it stays valid and inside its
        region.

        Along an axis on which the region is smaller than the patch, the region lies anywhere inside the
        patch.

        Args:
            row: row of the table.
            rng: source of randomness; the same state gives the same location.
            background: take the background table.
            class_row: keep this class of `classes` in the central part of the patch.
        """
        table = self.background if background else self.foreground
        if self.shifts:
            bits = int((table.shifts if class_row is None else table.class_shifts[class_row])[row])
            allowed = [shift for i, shift in enumerate(self.shifts) if bits >> i & 1]
            shift = allowed[int(rng.integers(len(allowed)))] if allowed else self.shifts[0]
        else:
            shift = self._free_shift(table, row, rng)
        location = self._location(table, row, shift)
        start = list(location.start)
        for axis, ((low, high), size) in enumerate(zip(location.bounds, self.patch_size)):
            if high - low < size:
                start[axis] = int(rng.integers(high - size, low + 1))
        return PatchLocation(location.case, tuple(start), location.size, location.bounds)

    def _free_shift(self, table: PatchTable, row: int, rng: np.random.Generator) -> tuple[int, ...]:
        _, box = self.regions[int(table.region[row])]
        shift = []
        for start, (low, high), size, stride in zip(
            table.start[row].tolist(), box, self.patch_size, self.stride
        ):
            reach = stride // 2
            first, last = max(low, start - reach), min(high - size, start + reach)
            shift.append(int(rng.integers(first, last + 1)) - start if last > first else 0)
        return tuple(shift)

    def _location(self, table: PatchTable, row: int, shift: Sequence[int]) -> PatchLocation:
        case, box = self.regions[int(table.region[row])]
        start = tuple(int(s) + int(d) for s, d in zip(table.start[row], shift))
        return PatchLocation(case, start, self.patch_size, box)


@dataclass(frozen=True)
class _Rules:
    """What makes a patch valid, and what is recorded of it."""

    patch_size: tuple[int, ...]
    stride: tuple[int, ...]
    targets: tuple[str, ...]
    min_labeled_ratio: float
    min_bbox_percent: float
    ignore_labels: dict[str, int]
    classes: tuple[tuple[str, int], ...]
    background: bool
    jitter: bool
    every_patch: bool
    objects_only: bool

    def request(self, target: str) -> CountRequest:
        return CountRequest(
            ignore=self.ignore_labels.get(target),
            known=self.background,
            foreground=self.background,
            extent=self.min_bbox_percent > 0,
            classes=tuple(value for name, value in self.classes if name == target),
            objects_only=self.objects_only,
        )


@dataclass
class _Region:
    """One region's grid: candidate patch starts, and how they map to the (possibly coarser) label volume."""

    row: int
    box: Box
    grid: list[np.ndarray]
    candidates: list[np.ndarray]
    edges: list[np.ndarray]
    first: list[np.ndarray]
    last: list[np.ndarray]
    core_first: list[np.ndarray]
    core_last: list[np.ndarray]
    best: float = field(default=0.0)

    @property
    def voxels(self) -> np.ndarray:
        """Number of label voxels in each candidate patch; broadcasts to (candidates per axis...)."""
        total = np.ones((), np.int64)
        for edges, first, last in zip(self.edges, self.first, self.last):
            size = edges[last] - edges[first]
            # Almost always all are equal, which spares a large array.
            total = np.multiply.outer(total, size[:1] if (size == size[0]).all() else size)
        return total


def find_valid_patches(
    cases: Sequence[Any],
    boxes: Mapping[str, Sequence[Box]],
    patch_size: Sequence[int],
    *,
    targets: Sequence[str],
    min_labeled_ratio: float = 0.10,
    min_bbox_percent: float = 0.0,
    stride: Sequence[int] | None = None,
    ignore_labels: Mapping[str, int | None] | None = None,
    classes: Mapping[str, Sequence[int]] | None = None,
    background: bool = False,
    jitter: bool = False,
    skip_patch_validation: bool = False,
    objects_only: bool = False,
    search_cases: Sequence[Any] | None = None,
    num_threads: int = 0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    relax: bool = False,
    allow_empty: bool = False,
    part: str = "training",
) -> PatchIndex:
    """Find the patches that are labelled well enough.

    Args:
        cases: opened cases (`OpenCase`): name, image, labels and masks by target.
        boxes: regions to search, by case name (`Split.train` or `Split.val`); cases without a region are
            skipped.
        patch_size: voxels per axis, in the volumes' axis order.
        targets: names of the label targets; a case may lack some of them, and one that lacks all gives no
            patch.
        min_labeled_ratio: least labelled share of a patch, 0 to 1, of its voxels inside the region. A patch
            without any labelled voxel is never valid.
        min_bbox_percent: least share, 0 to 1, of the patch that the bounding box of its labelled voxels
            fills. A patch is valid if one target meets both conditions.
        stride: voxels per axis between grid patches; None for half a patch.
        ignore_labels: label value that means unknown, by target.
        classes: label values, by target, whose presence is recorded for oversampling; `label_counts.ANY_OBJECT` for
            any but 0.
        background: also collect background patches: no voxel with a label other than 0, and at least
            `min_labeled_ratio` of one target known (inside its mask, not its ignore label). A patch is then
            counted as foreground only if it holds an object, also where its mask alone would make it valid.
        jitter: record which displacements from the grid keep each patch valid, for training.
        skip_patch_validation: take every patch of the grid, without reading labels.
        objects_only: within a mask, count only voxels with a label other than 0 as labelled: for a loss that counts
            only there (`compute_loss_on_labeled_only`), which a patch of masked background would not train.
        search_cases: the same cases opened at a coarser OME-Zarr level, to be searched instead: faster, and
            exact up to that level's resolution.
        num_threads: threads that read labels; 0 for one per CPU core, at most 8.
        cache_dir: folder for the index, or None for no cache.
        progress: show a progress bar.
        relax: where no patch reaches `min_labeled_ratio`, take half of the best share found instead and log a
            warning: for a ratio that is only a default, which small organs never reach.
        allow_empty: return an empty index where nothing is valid.
        part: what the patches are for, named in messages.

    Returns:
        The index, with patches ordered by case, region and position.

    Raises:
        VolumenError: no patch is valid; says the best labelled share found. Or a label cannot be read.
        ValueError: a size, stride or ratio is out of range.
    """
    rules = _Rules(
        patch_size=tuple(int(p) for p in patch_size),
        stride=_checked_stride(patch_size, stride),
        targets=tuple(targets),
        min_labeled_ratio=_checked_share("min_labeled_ratio", min_labeled_ratio),
        min_bbox_percent=_checked_share("min_bbox_percent", min_bbox_percent),
        ignore_labels={t: int(v) for t, v in (ignore_labels or {}).items() if v is not None},
        classes=tuple((t, int(v)) for t in targets for v in (classes or {}).get(t, ())),
        background=background,
        jitter=jitter,
        every_patch=skip_patch_validation,
        objects_only=objects_only,
    )
    regions = tuple((i, box) for i, case in enumerate(cases) for box in boxes.get(case.name, ()))
    searched = cases if search_cases is None else search_cases
    index = None
    key = None
    if cache_dir is not None and not skip_patch_validation:
        key = {**_cache_key(rules, cases, searched, regions), "relax": relax}
        index = _load(Path(cache_dir), key, rules, regions)
    if index is None:
        build = partial(_build, cases=cases, searched=searched, regions=regions, progress=progress)
        threads = num_threads or default_threads()
        index, best = build(rules, num_threads=threads)
        if not len(index) and relax and 0 < best[0] < rules.min_labeled_ratio:
            rules = replace(rules, min_labeled_ratio=best[0] / 2)
            logger.warning(
                "%s: no patch is labelled to min_labeled_ratio %g, at most to %.3g; %.3g is used instead",
                part,
                min_labeled_ratio,
                best[0],
                rules.min_labeled_ratio,
            )
            index, best = build(rules, num_threads=threads)
        if not len(index) and not allow_empty:
            raise _nothing_found(rules, cases, regions, best, part)
        if cache_dir is not None and key is not None:
            _store(Path(cache_dir), key, index)
    elif not len(index) and not allow_empty:
        raise _nothing_found(rules, cases, regions, None, part)
    logger.info(
        "%s: %d valid patches of %s in %d regions%s",
        part,
        len(index),
        by(rules.patch_size),
        len(regions),
        f", {len(index.background)} background patches" if background else "",
    )
    return index


def _checked_stride(patch_size: Sequence[int], stride: Sequence[int] | None) -> tuple[int, ...]:
    if any(int(p) < 1 for p in patch_size):
        raise ValueError(f"patch_size must be positive, got {tuple(patch_size)}")
    if stride is None:
        return tuple(max(1, int(p) // 2) for p in patch_size)
    if len(stride) != len(patch_size) or any(int(s) < 1 for s in stride):
        raise VolumenError(
            "dataset_config.patch_stride",
            expected=f"{len(patch_size)} positive numbers, one per axis of the patch",
            found=list(stride),
        )
    return tuple(int(s) for s in stride)


def _checked_share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share between 0 and 1, got {value}")
    return float(value)


def _build(
    rules: _Rules,
    *,
    cases: Sequence[Any],
    searched: Sequence[Any],
    regions: tuple[tuple[int, Box], ...],
    num_threads: int,
    progress: bool,
) -> tuple[PatchIndex, tuple[float, int | None]]:
    """Search all regions; also return the best labelled share found and the case it was found in."""
    shifts = _shift_table(rules, [box for _, box in regions])
    by_case: dict[int, list[_Region]] = {}
    for row, (case, box) in enumerate(regions):
        by_case.setdefault(case, []).append(_region(rules, row, box, shifts, cases[case], searched[case]))
    foreground: list[PatchTable] = []
    background: list[PatchTable] = []
    best: tuple[float, int | None] = (0.0, None)
    if rules.every_patch:
        foreground = [_every_patch(rules, region) for parts in by_case.values() for region in parts]
    else:
        for case, counters in _count(rules, searched, by_case, num_threads, progress):
            for position, region in enumerate(by_case[case]):
                counts = {target: counter.counts[position] for target, counter in counters.items()}
                good, empty = _select(rules, region, counts, shifts)
                foreground.append(good)
                background.append(empty)
                if region.best > best[0] or best[1] is None:
                    best = (region.best, case)
    ndim, num_classes = len(rules.patch_size), len(rules.classes)
    index = PatchIndex(
        patch_size=rules.patch_size,
        stride=rules.stride,
        regions=regions,
        shifts=() if rules.every_patch else shifts,
        classes=rules.classes,
        foreground=PatchTable.concatenate(foreground, ndim, num_classes),
        background=PatchTable.concatenate(background, ndim, num_classes),
    )
    return index, best


def _count(
    rules: _Rules,
    searched: Sequence[Any],
    by_case: Mapping[int, Sequence[_Region]],
    num_threads: int,
    progress: bool,
) -> Any:
    """Yield (case index, counters by target) as soon as all labels of a case are counted."""
    from tqdm import tqdm

    with tqdm(total=0, desc="valid patches", unit="block", disable=hidden(progress), leave=False) as bar:
        for case, parts in by_case.items():
            opened = searched[case]
            grids = [region.edges for region in parts]
            counters = {
                target: LabelCounter(
                    LabelReader(opened.labels[target], opened.masks.get(target), rules.request(target)), grids
                )
                for target in rules.targets
                if target in opened.labels
            }
            count_case(counters, num_threads, partial(grow, bar), bar.update)
            yield case, counters


def _shift_table(rules: _Rules, boxes: Sequence[Box]) -> tuple[tuple[int, ...], ...]:
    """Choose the displacements from the grid that are examined: at most 64, so that a patch's set fits 64
    bits.

    Per axis they cover half a stride to either side and differ modulo small powers of two, so that a patch
    does not always meet a network's strided convolutions in the same phase.
    """
    zero = (0,) * len(rules.patch_size)
    most = {1: 16, 2: 8}.get(len(zero), 4) if rules.jitter else 1
    for per_axis in sorted({most, max(1, most // 2), 1}, reverse=True):
        options = [_axis_shifts(stride, per_axis) for stride in rules.stride]
        cells = sum(
            math.prod(
                2 * len(option) * (extent // stride + 2)
                for option, extent, stride in zip(options, box_extent(box), rules.stride)
            )
            for box in boxes
        )
        if cells <= MAX_CELLS:
            break
    if cells > MAX_GRID_CELLS:
        raise VolumenError(
            "stride",
            f"the patch grid of {' '.join(map(str, rules.stride))} voxels has {cells:.1e} cells",
            expected=f"at most {MAX_GRID_CELLS:.1e}",
            remedy="use a larger stride or a coarser valid_patch_find_resolution",
        )
    return (zero, *(shift for shift in itertools.product(*options) if shift != zero))


def _axis_shifts(stride: int, count: int) -> list[int]:
    """Return at most `count` displacements in -stride/2 to stride/2, zero first."""
    shifts = [0]
    for step in range(-(count // 2), count - count // 2):
        value = round(step * stride / count) + step % 4
        if abs(value) <= stride // 2 and value not in shifts:
            shifts.append(value)
    return shifts


def _region(
    rules: _Rules, row: int, box: Box, shifts: Sequence[tuple[int, ...]], case: Any, searched: Any
) -> _Region:
    """Lay the grid over a region, and its patches' borders over the volume that is searched."""
    fine = tuple(case.image.shape)
    coarse = next((tuple(v.shape) for v in searched.labels.values()), fine)
    region = _Region(row, box, [], [], [], [], [], [], [])
    for axis, ((low, high), size, stride) in enumerate(zip(box, rules.patch_size, rules.stride)):
        grid = axis_starts(low, high, size, stride)
        moved = np.unique(np.add.outer(grid, sorted({shift[axis] for shift in shifts})))
        candidates = moved[(moved >= low) & (moved + size <= high)] if high - low >= size else grid
        factor = fine[axis] / coarse[axis]
        begin = np.minimum(np.floor(candidates / factor).astype(np.int64), coarse[axis] - 1)
        end = np.ceil(np.minimum(candidates + size, high) / factor).astype(np.int64)
        end = np.clip(end, begin + 1, coarse[axis])
        edges = np.unique(np.concatenate([begin, end]))
        region.grid.append(grid)
        region.candidates.append(candidates)
        region.edges.append(edges)
        region.first.append(np.searchsorted(edges, begin))
        region.last.append(np.searchsorted(edges, end))
        core_first, core_last = _core(edges, begin, end)
        region.core_first.append(core_first)
        region.core_last.append(core_last)
    return region


def _core(edges: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells of the central half of patches along an axis, to the nearest edge, of equals the outer one.

    The first patch's begins with the patch and the last one's ends with it, as no other could be more central there.
    Both results ascend with the patches.

    Args:
        edges: of the cells.
        begin, end: of the patches, ascending, among the edges.

    Returns:
        Index of the first cell and one past the last.
    """
    quarter = (end - begin) // 4
    first = _nearest(edges, begin + quarter)
    last = len(edges) - 1 - _nearest(-edges[::-1], -(end - quarter))
    first[0], last[-1] = np.searchsorted(edges, begin[0]), np.searchsorted(edges, end[-1])
    return first, np.maximum(last, first + 1)


def _nearest(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the index of the edge nearest to each value, the lower one of equals."""
    above = np.clip(np.searchsorted(edges, values), 1, len(edges) - 1)
    return np.where(values - edges[above - 1] <= edges[above] - values, above - 1, above)


def axis_starts(low: int, high: int, size: int, stride: int) -> np.ndarray:
    """Return the grid starts of patches along one axis of a region from `low` to `high`, ascending.

    The last patch ends where the region ends. A region smaller than the patch gets one patch, at its begin.
    """
    last = max(low, high - size)
    starts = np.arange(low, last + 1, stride, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)


def _every_patch(rules: _Rules, region: _Region) -> PatchTable:
    starts = np.stack(np.meshgrid(*region.grid, indexing="ij"), -1).reshape(-1, len(region.grid))
    count = len(starts)
    return PatchTable(
        region=np.full(count, region.row, np.int32),
        start=starts.astype(np.int32),
        share=np.full(count, np.nan, np.float32),
        shifts=np.ones(count, np.uint64),
        class_shifts=np.zeros((len(rules.classes), count), np.uint64),
    )


def _select(
    rules: _Rules,
    region: _Region,
    counts: Mapping[str, CellCounts],
    shifts: Sequence[tuple[int, ...]],
) -> tuple[PatchTable, PatchTable]:
    """Return the foreground and the background patches of a region."""
    shape = tuple(len(c) for c in region.candidates)
    voxels = region.voxels
    needed = np.maximum(1, np.ceil(rules.min_labeled_ratio * voxels - 1e-6)).astype(np.int64)
    valid = np.zeros(shape, bool)
    occupied = np.zeros(shape, bool)
    known = np.zeros(shape, bool)
    share = np.zeros(shape, np.float32)
    present = np.zeros((len(rules.classes), *shape), bool)
    for cells in counts.values():
        labelled = window_sums(cells.labelled, region.first, region.last)
        np.maximum(share, labelled / voxels, out=share, casting="same_kind")
        enough = labelled >= needed
        if rules.min_bbox_percent > 0:
            enough &= _box_voxels(cells, region) >= rules.min_bbox_percent * voxels - 1e-6
        valid |= enough
        if cells.foreground is not None and cells.known is not None:
            occupied |= window_sums(cells.foreground, region.first, region.last) > 0
            known |= window_sums(cells.known, region.first, region.last) >= needed
    region.best = float(share.max(initial=0.0))
    if rules.background:
        empty = known & ~occupied
        valid &= occupied
    else:
        empty = np.zeros(shape, bool)
    if rules.classes:
        covered = _covered(region, valid, shifts)
        for target, cells in counts.items():
            _mark_classes(rules, target, cells, region, covered, present)
    return (
        _table(region, valid, share, present, shifts),
        _table(region, empty, share, present, shifts),
    )


def _box_voxels(cells: CellCounts, region: _Region) -> np.ndarray:
    """Return the number of voxels in the bounding box of each candidate's labelled voxels."""
    volume = np.ones((), np.int64)
    for low, high in zip(cells.low, cells.high):
        first = window_extremes(low, region.first, region.last, np.minimum)
        last = window_extremes(high, region.first, region.last, np.maximum)
        volume = volume * np.maximum(0, last.astype(np.int64) - first)
    return volume


def _mark_classes(
    rules: _Rules,
    target: str,
    cells: CellCounts,
    region: _Region,
    covered: np.ndarray,
    present: np.ndarray,
) -> None:
    """Mark the candidates that hold a class in their central part, or what of it is `covered` by no such part."""
    rows = [i for i, (name, _) in enumerate(rules.classes) if name == target]
    if cells.classes is None:
        return
    for bit, row in enumerate(rows):
        holds = ((cells.classes >> np.uint64(bit)) & np.uint64(1)).astype(np.uint8)
        present[row] = window_sums(holds, region.core_first, region.core_last) > 0
        lonely = holds * ~covered
        if lonely.any():
            present[row] |= window_sums(lonely, region.first, region.last) > 0


def _covered(region: _Region, valid: np.ndarray, shifts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Tell which cells lie in the central part of a patch that can be drawn."""
    reached = np.zeros(valid.shape, np.uint8)
    for _, good, where in _moved(region, _on_grid(region, valid), valid, shifts):
        reached[tuple(axis[good] for axis in where)] = 1
    # The candidates whose central part holds a cell follow each other along every axis.
    cells = [np.arange(len(edges) - 1) for edges in region.edges]
    begin = [np.searchsorted(last, axis, side="right") for last, axis in zip(region.core_last, cells)]
    end = [np.searchsorted(first, axis, side="right") for first, axis in zip(region.core_first, cells)]
    return window_sums(reached, begin, end) > 0


def _on_grid(region: _Region, valid: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the indices, along the axes of the grid, of the grid patches that are valid."""
    home = [np.searchsorted(c, g) for c, g in zip(region.candidates, region.grid)]
    return np.nonzero(valid[np.ix_(*home)])


def _moved(
    region: _Region,
    chosen: tuple[np.ndarray, ...],
    valid: np.ndarray,
    shifts: Sequence[tuple[int, ...]],
) -> Iterator[tuple[int, np.ndarray, tuple[np.ndarray, ...]]]:
    """Yield each displacement's number, which of the chosen grid patches it keeps valid, and what they become.

    What they become are indices of candidates along every axis.
    """
    starts = [grid[index] for grid, index in zip(region.grid, chosen)]
    for i, shift in enumerate(shifts):
        inside = np.ones(len(starts[0]), bool)
        where = []
        for start, moved, candidates in zip(starts, shift, region.candidates):
            position = np.minimum(np.searchsorted(candidates, start + moved), len(candidates) - 1)
            inside &= candidates[position] == start + moved
            where.append(position)
        yield i, inside & valid[tuple(where)], tuple(where)


def _table(
    region: _Region,
    valid: np.ndarray,
    share: np.ndarray,
    present: np.ndarray,
    shifts: Sequence[tuple[int, ...]],
) -> PatchTable:
    """Collect the grid patches that are valid, with the displacements that keep them so."""
    chosen = _on_grid(region, valid)
    starts = [grid[index] for grid, index in zip(region.grid, chosen)]
    count = len(starts[0])
    bits = np.zeros(count, np.uint64)
    class_bits = np.zeros((len(present), count), np.uint64)
    home = chosen
    for i, good, where in _moved(region, chosen, valid, shifts):
        bits |= good.astype(np.uint64) << np.uint64(i)
        for row, holds in enumerate(present):
            class_bits[row] |= (good & holds[where]).astype(np.uint64) << np.uint64(i)
        if i == 0:
            home = where
    return PatchTable(
        region=np.full(count, region.row, np.int32),
        start=np.stack(starts, 1).astype(np.int32),
        share=share[home],
        shifts=bits,
        class_shifts=class_bits,
    )


def _nothing_found(
    rules: _Rules,
    cases: Sequence[Any],
    regions: Sequence[tuple[int, Box]],
    best: tuple[float, int | None] | None,
    part: str,
) -> VolumenError:
    where = "dataset_config.min_labeled_ratio"
    size = by(rules.patch_size)
    if not regions:
        return VolumenError(
            "tr_setup.tr_val_split", f"no region is left for {part}", remedy="change the split or add volumes"
        )
    if best is None or best[1] is None or best[0] == 0:
        return VolumenError(
            where,
            f"no {part} patch of {size} holds a labelled voxel of {', '.join(rules.targets)}",
            remedy="check that labels/ (and masks/, if any) are not empty there, or choose another split",
        )
    share, case = best
    hint = (
        f"set it to {_below(share)} or lower" if share < rules.min_labeled_ratio else "lower min_bbox_percent"
    )
    if rules.background and share >= rules.min_labeled_ratio:
        hint = "lower min_bbox_percent, or label objects in the masked part"
    return VolumenError(
        where,
        f"no {part} patch of {size} is labelled well enough",
        expected=f"a labelled share of at least {rules.min_labeled_ratio:g}",
        found=f"at most {share:.3g} (in {cases[case].name})" if case is not None else f"at most {share:.3g}",
        remedy=hint,
    )


def _below(share: float) -> str:
    """Round a share down to two significant digits."""
    digits = 1 - math.floor(math.log10(share))
    scale = 10.0**digits
    return f"{math.floor(share * scale) / scale:g}"


def _cache_key(
    rules: _Rules, cases: Sequence[Any], searched: Sequence[Any], regions: Sequence[tuple[int, Box]]
) -> dict[str, Any]:
    """Return everything that the index depends on, as plain data."""
    used = sorted({case for case, _ in regions})
    volumes = []
    for case in used:
        opened = searched[case]
        volumes.append(
            {
                "name": cases[case].name,
                "shape": list(cases[case].image.shape),
                "labels": {t: opened.labels[t].fingerprint() for t in rules.targets if t in opened.labels},
                "masks": {t: opened.masks[t].fingerprint() for t in rules.targets if t in opened.masks},
            }
        )
    return {
        "version": INDEX_VERSION,
        "rules": {name: getattr(rules, name) for name in _Rules.__dataclass_fields__},
        "max_cells": MAX_CELLS,
        "regions": [[case, box] for case, box in regions],
        "volumes": volumes,
    }


def _store(folder: Path, key: Mapping[str, Any], index: PatchIndex) -> None:
    arrays = {"shift_table": np.asarray(index.shifts, np.int64).reshape(-1, len(index.patch_size))}
    for kind in ("foreground", "background"):
        table = getattr(index, kind)
        arrays |= {f"{kind}_{name}": getattr(table, name) for name in PatchTable.__dataclass_fields__}
    store_arrays(folder, key, arrays)


def _load(
    folder: Path, key: Mapping[str, Any], rules: _Rules, regions: tuple[tuple[int, Box], ...]
) -> PatchIndex | None:
    arrays = load_arrays(folder, key)
    if arrays is None:
        return None
    tables = {
        kind: PatchTable(**{name: arrays[f"{kind}_{name}"] for name in PatchTable.__dataclass_fields__})
        for kind in ("foreground", "background")
    }
    return PatchIndex(
        patch_size=rules.patch_size,
        stride=rules.stride,
        regions=regions,
        shifts=tuple(tuple(row) for row in arrays["shift_table"].tolist()),
        classes=rules.classes,
        **tables,
    )
