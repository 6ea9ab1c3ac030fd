"""Divides volumes into k folds for cross-validation: each part validates once, while all others train.

Whole volumes are divided where there are enough of them; else each labelled volume is cut into slabs. The folds depend
on the shapes, the labels, the groups and the seed alone, not on the patch, so that networks with different patches
have the same folds.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from volumen.data.sampling.split import MIN_REGION, Profiles, Split, label_weights
from volumen.utils.boxes import Box, whole_box
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

KEY = "dataset_config.fold"
_DRAWS = 256
_SWAPS = 4000
# Slabs may be narrower than equal ones by this factor, for a more even share of the labels.
_NARROWER = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Part:
    """What is never divided between two folds: a group of volumes, a volume, or a slab of one.

    Args:
        boxes: its regions by name of the volume.
        labels: labelled voxels in it by target, or class of a target.
    """

    boxes: Mapping[str, Box]
    labels: Mapping[str, float]


def read_fold(text: str) -> tuple[int, int]:
    """Return number and count of a fold such as "0/5".

    Raises:
        VolumenError: there is no such fold.
    """
    number, count = (int(part) for part in text.split("/"))
    if count < 2 or number >= count:
        raise VolumenError(
            KEY,
            expected=f"0/{count} to {count - 1}/{count}" if count > 1 else "at least two folds, such as 0/5",
            found=text,
        )
    return number, count


def make_folds(
    shapes: Mapping[str, Sequence[int]],
    count: int,
    train_fraction: float,
    seed: int,
    labelled: Profiles | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[Split]:
    """Divide volumes into folds; the same arguments always give the same folds.

    Volumes without labels always train, except those of a group that validates. Each fold has a similar number of
    parts, and a similar share of the labels of each target and class.

    Args:
        shapes: spatial shape by case name.
        count: number of folds, at least 2.
        train_fraction: value of the setting, which is recorded.
        seed: chooses among equally good folds.
        labelled: places of labels; without it, labels are assumed everywhere.
        groups: group of each case; the cases of one group validate together. None: each case for itself.

    Returns:
        A split per fold. Every voxel of a labelled volume validates in exactly one of them.

    Raises:
        VolumenError: fewer groups than folds, or volumes too small to be cut.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    weights = {name: label_weights(shape, labelled, name) for name, shape in shapes.items()}
    names = [name for name in sorted(shapes) if any(weights[name].values())]
    if not names:
        raise VolumenError(KEY, "no volume has labels, so there is nothing to validate on")
    if groups is not None:
        parts = _grouped(shapes, names, weights, groups, count)
    elif len(names) >= count:
        parts = [Part({name: whole_box(shapes[name])}, weights[name]) for name in names]
    else:
        pieces = count // math.gcd(count, len(names))
        parts = [
            part
            for name in names
            for part in _slabs(name, tuple(shapes[name]), pieces, (labelled or {}).get(name, {}))
        ]
        logger.info(
            "%d folds of %s: each is cut into %d slabs", count, counted(len(names), "labelled volume"), pieces
        )
    chosen = _assign(parts, count, seed)
    splits = [
        _split(shapes, parts, chosen == number, train_fraction, seed, f"fold {number}/{count}")
        for number in range(count)
    ]
    _warn_of_missing(parts, chosen, count)
    return splits


def held_out_groups(
    shapes: Mapping[str, Sequence[int]],
    train_fraction: float,
    seed: int,
    groups: Mapping[str, str],
    labelled: Profiles | None = None,
) -> Split:
    """Split volumes into training and validation so that no group is on both sides.

    Args:
        shapes, labelled: as for `make_folds`.
        train_fraction: share of the groups with labels that trains; 1 means no validation.
        seed: chooses among equally good splits.
        groups: group of each case.

    Raises:
        VolumenError: a single group has labels.
    """
    if train_fraction == 1:
        return Split({name: [whole_box(shape)] for name, shape in shapes.items()}, {}, train_fraction, seed)
    weights = {name: label_weights(shape, labelled, name) for name, shape in shapes.items()}
    names = [name for name in sorted(shapes) if any(weights[name].values())]
    parts = _grouped(shapes, names, weights, groups, 2)
    held = min(max(1, round(len(parts) * (1 - train_fraction))), len(parts) - 1)
    rng = np.random.default_rng(seed)
    shares = _shares(parts)
    draws = [rng.permutation(len(parts))[:held] for _ in range(_DRAWS)]
    best = min(draws, key=lambda drawn: _unlike(shares[drawn].sum(axis=0), 1 - train_fraction))
    mine = np.isin(np.arange(len(parts)), best)
    return _split(shapes, parts, mine, train_fraction, seed, "groups")


def _grouped(
    shapes: Mapping[str, Sequence[int]],
    labelled: Sequence[str],
    weights: Mapping[str, Mapping[str, float]],
    groups: Mapping[str, str],
    least: int,
) -> list[Part]:
    found: dict[str, list[str]] = {}
    for name in sorted(shapes):
        found.setdefault(groups[name], []).append(name)
    used = {group: names for group, names in found.items() if set(names) & set(labelled)}
    if len(used) < least:
        raise VolumenError(
            "dataset_config.group_by",
            expected=f"at least {least} groups with labels, so that none of {least} parts is empty",
            found=f"{len(used)}: {', '.join(sorted(used)[:5])}",
            remedy="use fewer folds, or another grouping",
        )
    parts = []
    for names in used.values():
        keys = {key for name in names for key in weights[name]}
        parts.append(
            Part(
                {name: whole_box(shapes[name]) for name in names},
                {key: sum(weights[name].get(key, 0.0) for name in names) for key in sorted(keys)},
            )
        )
    return parts


def _slabs(
    name: str, shape: tuple[int, ...], count: int, profiles: Mapping[str, Sequence[np.ndarray]]
) -> list[Part]:
    """Cut a volume into slabs with similar shares of the labels, along the axis that fits them best."""
    axes = sorted(range(len(shape)), key=lambda axis: (-shape[axis], axis))
    usable = [axis for axis in axes if shape[axis] >= count * MIN_REGION]
    if not usable:
        raise VolumenError(
            name,
            f"too small to be cut into {count} folds (shape {shape}; each needs {MIN_REGION} voxels along an axis)",
            remedy="use fewer folds, or add a volume",
        )
    best: tuple[float, int, list[int]] | None = None
    for rank, axis in enumerate(usable):
        counts = [np.asarray(of_target[axis], float) for of_target in profiles.values()]
        present = [counts_of / counts_of.sum() for counts_of in counts if counts_of.sum()]
        shares = np.array(present or [np.full(shape[axis], 1 / shape[axis])])
        for narrower in _NARROWER:
            cuts = _cuts(shares.mean(axis=0), count, max(MIN_REGION, int(narrower * shape[axis] / count)))
            held = np.add.reduceat(shares, cuts[:-1], axis=1)
            # Equal slabs along the longest axis, unless others share the labels clearly better.
            score = float(np.abs(held * count - 1).mean() + 10 * (held == 0).mean()) + 0.2 * (1 - narrower)
            score += 0.1 * rank
            if best is None or score < best[0] - 1e-12:
                best = (score, axis, cuts)
    assert best is not None
    _, axis, cuts = best
    box = whole_box(shape)
    return [
        Part(
            {name: (*box[:axis], (start, stop), *box[axis + 1 :])},
            {target: float(np.sum(of_target[axis][start:stop])) for target, of_target in profiles.items()}
            or {"": float(stop - start)},
        )
        for start, stop in itertools.pairwise(cuts)
    ]


def _cuts(share: np.ndarray, count: int, width: int) -> list[int]:
    """Return the borders of `count` slabs that hold about equal shares and are at least `width` voxels wide."""
    extent = len(share)
    total = np.concatenate([[0.0], np.cumsum(share)])
    cuts = [0]
    for number in range(1, count):
        place = int(np.searchsorted(total, total[-1] * number / count))
        cuts.append(min(max(place, cuts[-1] + width), extent - (count - number) * width))
    return [*cuts, extent]


def _shares(parts: Sequence[Part]) -> np.ndarray:
    """Return the share of each part (rows) in the labels of each target and class (columns), and in their number."""
    keys = sorted({key for part in parts for key in part.labels})
    counts = np.array([[part.labels.get(key, 0.0) for key in keys] for part in parts])
    counts = counts[:, counts.sum(axis=0) > 0]
    return counts / counts.sum(axis=0)


def _unlike(held: np.ndarray, wanted: float) -> float:
    """Return how much the shares that a part of the data holds differ from the wanted one; none at all is worst."""
    return float(np.abs(held - wanted).mean() / wanted + 10.0 * ((held <= 0) | (held >= 1)).mean())


def _assign(parts: Sequence[Part], count: int, seed: int) -> np.ndarray:
    """Return the fold of each part, with a similar number of volumes and similar shares of all labels in each fold."""
    rng = np.random.default_rng(seed)
    shares = _shares(parts)
    sizes = np.array([len(part.boxes) for part in parts])
    best, lowest = np.zeros(len(parts), int), math.inf
    for _ in range(_DRAWS):
        folds = _draw(sizes, count, rng)
        score = _spread(shares, folds, count)
        if score < lowest - 1e-12:
            best, lowest = folds, score
    for first, second in rng.integers(len(parts), size=(_SWAPS, 2)):
        if best[first] == best[second] or sizes[first] != sizes[second]:
            continue
        swapped = best.copy()
        swapped[first], swapped[second] = best[second], best[first]
        score = _spread(shares, swapped, count)
        if score < lowest - 1e-12:
            best, lowest = swapped, score
    return best


def _draw(sizes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Give the parts, large ones first, each to the smallest fold; parts of one size in a random order."""
    folds, filled = np.zeros(len(sizes), int), np.zeros(count, int)
    order = rng.permutation(len(sizes))
    for part in order[np.argsort(-sizes[order], kind="stable")]:
        folds[part] = int(np.argmin(filled))
        filled[folds[part]] += sizes[part]
    return folds


def _spread(shares: np.ndarray, folds: np.ndarray, count: int) -> float:
    held = np.zeros((count, shares.shape[1]))
    np.add.at(held, folds, shares)
    return float(np.abs(held * count - 1).mean() + 10.0 * (held <= 0).mean())


def _split(
    shapes: Mapping[str, Sequence[int]],
    parts: Sequence[Part],
    mine: np.ndarray,
    fraction: float,
    seed: int,
    rule: str,
) -> Split:
    """Return the split in which some parts validate and everything else trains."""
    val: dict[str, list[Box]] = {}
    for part, validates in zip(parts, mine, strict=True):
        for name, box in part.boxes.items() if validates else ():
            val.setdefault(name, []).append(box)
    train: dict[str, list[Box]] = {}
    for name, shape in shapes.items():
        if boxes := _rest(tuple(shape), sorted(val.get(name, []))):
            train[name] = boxes
    return Split(train, {name: _joined(sorted(val[name])) for name in sorted(val)}, fraction, seed, rule)


def _rest(shape: tuple[int, ...], taken: Sequence[Box]) -> list[Box]:
    """Return the slabs of a volume between those that are taken, which are cut along one axis."""
    whole = whole_box(shape)
    if not taken:
        return [whole]
    axis = next((axis for axis, span in enumerate(taken[0]) if span != whole[axis]), 0)
    borders = [0, *(border for box in taken for border in box[axis]), shape[axis]]
    spans = [(a, b) for a, b in zip(borders[::2], borders[1::2], strict=True) if b > a]
    return [(*whole[:axis], span, *whole[axis + 1 :]) for span in spans]


def _joined(boxes: Sequence[Box]) -> list[Box]:
    """Join slabs that follow each other, so that no window ends between them."""
    joined: list[Box] = []
    for box in boxes:
        last = joined[-1] if joined else None
        axis = next((axis for axis, span in enumerate(box) if last and span != last[axis]), None)
        if last is not None and axis is not None and last[axis][1] == box[axis][0]:
            joined[-1] = (*box[:axis], (last[axis][0], box[axis][1]), *box[axis + 1 :])
        else:
            joined.append(box)
    return joined


def _warn_of_missing(parts: Sequence[Part], chosen: np.ndarray, count: int) -> None:
    """Warn of what a fold cannot validate."""
    for key in sorted({key for part in parts for key in part.labels}):
        total = [part.labels.get(key, 0.0) for part in parts]
        held = np.bincount(chosen, weights=total, minlength=count)
        if empty := [str(number) for number in np.flatnonzero(held <= 0)] if sum(total) else []:
            logger.warning(
                "fold %s of %d: no voxel of %s in the validation part", ", ".join(empty), count, key
            )
