"""Counts how many voxels of the training regions each class of a label has, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import fingerprint_of
from volumen.data.caching.records import Records
from volumen.data.formats.volumes import Region, Volume
from volumen.data.index.label_values import stored_regions
from volumen.utils.boxes import Box


def class_counts(
    cases: Sequence[Any],
    boxes: Mapping[str, Sequence[Box]],
    target: str,
    channels: int,
    *,
    exclusive: bool,
    ignore: int | None = None,
    cache_dir: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Count the voxels of each class whose label is known; each stored chunk of a label is read once.

    Args:
        cases: opened cases.
        boxes: regions to count by case name, which do not overlap.
        target: name of the target.
        channels: channels of its head.
        exclusive: whether channel c is the label value c; else a voxel belongs to a channel where its label is not 0.
        ignore: label value that means unknown, or None.
        cache_dir: folder that caches the counts until a label or mask changes, or None.

    Returns:
        Voxels of each channel's class and, for each channel, known voxels: int64 arrays (channels,).
    """
    of_target = [case for case in cases if target in case.labels and boxes.get(case.name)]
    total = np.zeros((2, channels), np.int64)
    with Records.of(cache_dir, "class counts", [case.labels[target] for case in of_target]) as records:
        for case in of_target:
            label, mask = case.labels[target], case.masks.get(target)
            key = {
                "class counts of": fingerprint_of(label) if records.enabled else "",
                "mask": fingerprint_of(mask) if mask is not None and records.enabled else None,
                "boxes": [[list(span) for span in box] for box in boxes[case.name]],
                "channels": channels,
                "exclusive": exclusive,
                "ignore": ignore,
            }
            known = records.get(key) if records.enabled else None
            if known is None:
                known = {"counts": _count(label, mask, boxes[case.name], channels, exclusive, ignore)}
                records.put(key, known)
            total += known["counts"]
    return total[0], total[1]


def _count(
    label: Volume,
    mask: Volume | None,
    boxes: Sequence[Box],
    channels: int,
    exclusive: bool,
    ignore: int | None,
) -> np.ndarray:
    """Return the counts of one volume, (2, channels)."""
    counts = np.zeros((2, channels), np.int64)
    blocks, fills = stored_regions(label if mask is None else mask)
    read = 0
    for block in range(len(blocks)):
        for box in boxes:
            region = _overlap(blocks[block], box)
            if region is None:
                continue
            read += int(np.prod([part.stop - part.start for part in region]))
            inside = None if mask is None else mask.read(region)[0] > 0
            if inside is None or inside.any():
                counts += _of_values(label.read(region), inside, channels, exclusive, ignore)
    rest = sum(int(np.prod([stop - start for start, stop in box])) for box in boxes) - read
    fill = next(iter(fills), 0)
    if rest and mask is None and fill != ignore:
        counts[1] += rest
        if exclusive and 0 <= fill < channels:
            counts[0, int(fill)] += rest
        elif not exclusive and fill:
            counts[0] += rest
    return counts


def _of_values(
    values: np.ndarray, inside: np.ndarray | None, channels: int, exclusive: bool, ignore: int | None
) -> np.ndarray:
    """Return the counts of a block of labels (C, *space); only voxels with `inside` count."""
    counts = np.zeros((2, channels), np.int64)
    known = np.ones(values.shape[1:], bool) if inside is None else inside
    if exclusive:
        chosen = values[0][known if ignore is None else known & (values[0] != ignore)]
        found, times = np.unique(chosen, return_counts=True)
        counts[1] = len(chosen)
        for value, count in zip(found.tolist(), times.tolist(), strict=True):
            if 0 <= value < channels:
                counts[0, int(value)] = count
        return counts
    for channel in range(channels):
        own = values[min(channel, len(values) - 1)]
        valid = known if ignore is None else known & (own != ignore)
        counts[:, channel] = np.count_nonzero(valid & (own != 0)), np.count_nonzero(valid)
    return counts


def _overlap(region: Region, box: Box) -> Region | None:
    spans = [
        (max(part.start, start), min(part.stop, stop))
        for part, (start, stop) in itertools.zip_longest(region, box)
    ]
    return tuple(slice(a, b) for a, b in spans) if all(a < b for a, b in spans) else None
