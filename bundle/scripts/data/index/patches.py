"""Builds the index of valid patches: the allowed places of training and validation patches in labelled volumes.

Patches start on a grid with half a patch as the default stride; the last one of a region is aligned with the
region's end. A patch is valid if, for at least one target, enough of it is labelled. "Labelled" means: inside
the target's mask if there is one, else a label other than 0; a target's ignore label is never labelled.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import fingerprint_of
from volumen.data.caching.index_cache import load_arrays, store_arrays
from volumen.data.index.label_counts import LabelCounter, LabelReader, count_case, default_threads
from volumen.data.index.patch_grid import (
    MAX_CELLS,
    WHOLE_CELLS,
    GridRegion,
    PatchRules,
    check_cells,
    lay_grid,
    shift_table,
    subregions,
)
from volumen.data.index.patch_index import PatchIndex, PatchTable
from volumen.data.index.patch_selection import every_patch_of, select
from volumen.utils.boxes import Box
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.progress import grow, hidden
from volumen.utils.terminal.text import by, counted

logger = logging.getLogger(__name__)

INDEX_VERSION = 3
"""Increased whenever the same parameters would produce another index, so that old cache files are not used."""


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
    """Find the patches with enough labelled voxels.

    Args:
        cases: opened cases (`OpenCase`): name, image, labels and masks by target.
        boxes: regions to search, by case name (`Split.train` or `Split.val`); cases without a region are
            skipped.
        patch_size: voxels per axis, in the volumes' axis order.
        targets: names of the label targets; a case may lack some of them, and a case that lacks all has no patch.
        min_labeled_ratio: least labelled share of a patch, 0 to 1, of its voxels inside the region. A patch
            without any labelled voxel is never valid.
        min_bbox_percent: least share, 0 to 1, of the patch that the bounding box of its labelled voxels
            fills. A patch is valid if one target meets both conditions.
        stride: voxels per axis between grid patches; None for half a patch.
        ignore_labels: label value that means unknown, by target.
        classes: label values, by target, whose presence is recorded for oversampling; `label_counts.ANY_OBJECT` for
            any value except 0.
        background: also collect background patches: no voxel with a label other than 0, and at least
            `min_labeled_ratio` of one target known (inside its mask, not its ignore label). A patch then counts as
            foreground only if it contains an object, even if its mask alone would make it valid.
        jitter: record which displacements from the grid keep each patch valid, for training.
        skip_patch_validation: use every patch of the grid, without reading labels.
        objects_only: inside a mask, count only voxels with a label other than 0 as labelled: for a loss that is
            computed only there (`compute_loss_on_labeled_only`), to which masked background contributes nothing.
        search_cases: the same cases opened at a coarser OME-Zarr level, which is searched instead: faster, and
            exact up to that level's resolution.
        num_threads: threads that read labels; 0 for one per CPU core, at most 8.
        cache_dir: folder for the index, or None for no cache.
        progress: show a progress bar.
        relax: in a case of which no patch reaches `min_labeled_ratio`, use half of its best share instead and log a
            warning: for a ratio that is only a default, which small organs never reach.
        allow_empty: return an empty index if no patch is valid.
        part: purpose of the patches, named in messages.

    Returns:
        The index, with patches ordered by case, region and position.

    Raises:
        VolumenError: no patch is valid; states the best labelled share found. Or a label cannot be read.
        ValueError: a size, stride or ratio is out of range.
    """
    rules = PatchRules(
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
        index, shares, low = _build(
            rules,
            cases=cases,
            searched=searched,
            regions=regions,
            num_threads=num_threads or default_threads(),
            progress=progress,
            relax=relax,
        )
        best = max(((share, case) for case, share in shares.items()), default=(0.0, None), key=lambda b: b[0])
        if len(index) and low:
            _warn_of_low_shares(rules, cases, low, relax, part)
        if not len(index) and not allow_empty:
            raise _nothing_found(rules, cases, regions, best, part)
        if cache_dir is not None and key is not None:
            _store(Path(cache_dir), key, index)
    elif not len(index) and not allow_empty:
        raise _nothing_found(rules, cases, regions, None, part)
    logger.info(
        "%s: %s of %s in %s%s",
        part,
        counted(len(index), "valid patch"),
        by(rules.patch_size),
        counted(len(regions), "region"),
        f", {counted(len(index.background), 'background patch')}" if background else "",
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
    rules: PatchRules,
    *,
    cases: Sequence[Any],
    searched: Sequence[Any],
    regions: tuple[tuple[int, Box], ...],
    num_threads: int,
    progress: bool,
    relax: bool,
) -> tuple[PatchIndex, dict[int, float], list[int]]:
    """Search all regions.

    Returns:
        The index; the best labelled share of each searched case; and those of them that have a labelled voxel and no
        patch that reaches `min_labeled_ratio`.
    """
    shifts = shift_table(rules, [box for _, box in regions])
    by_case: dict[int, list[GridRegion]] = {}
    for row, (case, box) in enumerate(regions):
        by_case.setdefault(case, []).append(lay_grid(rules, row, box, shifts, cases[case], searched[case]))
    foreground: list[PatchTable] = []
    background: list[PatchTable] = []
    shares: dict[int, float] = {}
    low: list[int] = []
    if rules.every_patch:
        check_cells(rules, sum(region.patches for parts in by_case.values() for region in parts))
        foreground = [every_patch_of(rules, region) for parts in by_case.values() for region in parts]
    else:
        for case, parts, counters in _count(rules, searched, by_case, shifts, num_threads, progress):
            found = _select_all(rules, parts, counters, shifts)
            shares[case] = share = max((region.best for region in parts), default=0.0)
            # The best share may be that of a patch between those of the grid, so it may reach the ratio with no patch.
            if share and not any(len(good) for good, _ in found):
                low.append(case)
                if relax:
                    lower = replace(rules, min_labeled_ratio=min(share, rules.min_labeled_ratio) / 2)
                    found = _select_all(lower, parts, counters, shifts)
            ordered = all(a is b for a, b in zip_longest(parts, by_case[case]))
            foreground += _in_order([good for good, _ in found], ordered)
            background += _in_order([empty for _, empty in found], ordered)
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
    return index, shares, low


def _select_all(
    rules: PatchRules,
    parts: Sequence[GridRegion],
    counters: Mapping[str, LabelCounter],
    shifts: Sequence[tuple[int, ...]],
) -> list[tuple[PatchTable, PatchTable]]:
    """Return the foreground and the background patches of a case's subregions."""
    return [
        select(rules, region, {target: counter.counts[i] for target, counter in counters.items()}, shifts)
        for i, region in enumerate(parts)
    ]


def _warn_of_low_shares(
    rules: PatchRules, cases: Sequence[Any], low: Sequence[int], relax: bool, part: str
) -> None:
    """Warn of labelled cases that reach `min_labeled_ratio` nowhere: their ratio was lowered, or they have no patch."""
    more = f" and {len(low) - 3} more" if len(low) > 3 else ""
    none = f"{'it has' if len(low) == 1 else 'they have'} no patch"
    logger.warning(
        "%s: no patch of %s is labelled to min_labeled_ratio %g; %s",
        part,
        ", ".join(cases[case].name for case in low[:3]) + more,
        rules.min_labeled_ratio,
        "half of the best share of each is used there" if relax else none,
    )


def _in_order(tables: list[PatchTable], ordered: bool) -> list[PatchTable]:
    """Sort the patches of a case's subregions by region and position, like those of whole regions."""
    if ordered or not tables:
        return tables
    ndim, num_classes = tables[0].start.shape[1], len(tables[0].class_shifts)
    table = PatchTable.concatenate(tables, ndim, num_classes)
    return [table.rows(np.lexsort((*table.start.T[::-1], table.region)))]


def _count(
    rules: PatchRules,
    searched: Sequence[Any],
    by_case: Mapping[int, Sequence[GridRegion]],
    shifts: Sequence[tuple[int, ...]],
    num_threads: int,
    progress: bool,
) -> Iterator[tuple[int, list[GridRegion], dict[str, LabelCounter]]]:
    """Yield (case index, regions or subregions, counters by target) as soon as a case's labels are counted."""
    from tqdm import tqdm

    with tqdm(total=0, desc="valid patches", unit="block", disable=hidden(progress), leave=False) as bar:
        for case, parts in by_case.items():
            opened = searched[case]
            readers = {
                target: LabelReader(opened.labels[target], opened.masks.get(target), rules.request(target))
                for target in rules.targets
                if target in opened.labels
            }
            searched_parts = [
                subregion for region in parts for subregion in _subregions(rules, region, shifts, readers)
            ]
            check_cells(rules, sum(subregion.cells for subregion in searched_parts))
            grids = [subregion.edges for subregion in searched_parts]
            counters = {target: LabelCounter(reader, grids) for target, reader in readers.items()}
            count_case(counters, num_threads, partial(grow, bar), bar.update)
            yield case, searched_parts, counters


def _subregions(
    rules: PatchRules,
    region: GridRegion,
    shifts: Sequence[tuple[int, ...]],
    readers: Mapping[str, LabelReader],
) -> list[GridRegion]:
    """Return the subregions that any target's tiles overlap; the whole region if it is small."""
    if region.cells <= WHOLE_CELLS:
        return [region]
    found: dict[tuple, GridRegion] = {}
    for reader in readers.values():
        tiles = np.array(reader.tiles([region.edges]), np.int64).reshape(-1, len(region.grid))
        for subregion in subregions(rules, region, shifts, tiles, reader.tile):
            found[tuple(int(axis[0]) for axis in subregion.grid)] = subregion
    return list(found.values())


def _nothing_found(
    rules: PatchRules,
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
    rules: PatchRules, cases: Sequence[Any], searched: Sequence[Any], regions: Sequence[tuple[int, Box]]
) -> dict[str, Any]:
    """Return all inputs that determine the index, as plain data."""
    used = sorted({case for case, _ in regions})
    volumes = []
    for case in used:
        opened = searched[case]
        volumes.append(
            {
                "name": cases[case].name,
                "shape": list(cases[case].image.shape),
                "labels": {t: fingerprint_of(opened.labels[t]) for t in rules.targets if t in opened.labels},
                "masks": {t: fingerprint_of(opened.masks[t]) for t in rules.targets if t in opened.masks},
            }
        )
    return {
        "version": INDEX_VERSION,
        "rules": {name: getattr(rules, name) for name in PatchRules.__dataclass_fields__},
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
    folder: Path, key: Mapping[str, Any], rules: PatchRules, regions: tuple[tuple[int, Box], ...]
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
