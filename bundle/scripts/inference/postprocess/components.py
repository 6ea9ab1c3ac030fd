"""Connected components of label maps, block by block with stitching.

The components of each block are found independently, and then joined across the faces between blocks by union-find.
Memory holds one block and some numbers per component. Two voxels are neighbours if they share a face; for this
connectivity, stitching across faces is exact. `volumen.inference.postprocess.cleaning` applies it to arrays on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from volumen.inference.postprocess.blocks import Region, neighbours
from volumen.inference.rules import CleaningRules
from volumen.utils.connected import roots_of

Load = Callable[..., Mapping[str, np.ndarray]]
"""Returns arrays of `survey_block` from the number of the block and the names of the arrays."""


@dataclass(frozen=True)
class Components:
    """Components of a volume, by consecutive numbers over all blocks.

    Args:
        offsets: number before the first component of each block, and after the last block, int64 (blocks + 1,).
        root: number of the joined component, by number, int64.
        size: voxels of the joined component, by its number, int64 (0 for numbers that were joined to another).
        value: label value, by number.
        at_border: whether the joined component touches the volume's border, by its number.
    """

    offsets: np.ndarray
    root: np.ndarray
    size: np.ndarray
    value: np.ndarray
    at_border: np.ndarray


def label_block(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the components of equal, nonzero values of a block, and their count; neighbours share a face."""
    import cc3d

    labels, count = cc3d.connected_components(
        np.ascontiguousarray(values), connectivity=6 if values.ndim == 3 else 4, return_N=True
    )
    return labels, int(count)


def survey_block(data: np.ndarray, box: Region, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return the properties of a block's components, numbered from 1.

    Args:
        data: labels of the block.
        box: region of the block.
        shape: shape of the volume.

    Returns:
        `sizes`, voxels of each, int64; `values`, label value of each, int64; `border`, whether each touches the
        volume's border; the component numbers on the outermost planes towards other blocks, uint32: `low0` and
        `high0` for axis 0, and so on.
    """
    labels, count = label_block(data)
    flat = labels.reshape(-1)
    values = np.zeros(count + 1, np.int64)
    values[flat] = data.reshape(-1)
    planes = {}
    for axis, (part, n) in enumerate(zip(box, shape, strict=True)):
        if part.start > 0:
            planes[f"low{axis}"] = np.take(labels, 0, axis).astype(np.uint32)
        if part.stop < n:
            planes[f"high{axis}"] = np.take(labels, -1, axis).astype(np.uint32)
    sizes = np.bincount(flat, minlength=count + 1)
    border = _touches_border(labels, count, box, shape)
    return {"sizes": sizes[1:], "values": values[1:], "border": border[1:], **planes}


def combine(load: Load, counts: tuple[int, ...]) -> Components:
    """Join the components of blocks across their faces.

    Args:
        load: returns the results of `survey_block`.
        counts: blocks per axis.
    """
    blocks = math.prod(counts)
    offsets = np.zeros(blocks + 1, np.int64)
    sizes, values, border = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.zeros(1, bool)]
    for number in range(blocks):
        survey = load(number, "sizes", "values", "border")
        sizes.append(survey["sizes"])
        values.append(survey["values"])
        border.append(survey["border"])
        offsets[number + 1] = offsets[number] + len(survey["sizes"])
    size, value, at_border = np.concatenate(sizes), np.concatenate(values), np.concatenate(border)
    joins = []
    for number, before, axis in neighbours(counts):
        high, low = load(before, f"high{axis}")[f"high{axis}"], load(number, f"low{axis}")[f"low{axis}"]
        meet = (high > 0) & (low > 0)
        last, first = high[meet] + offsets[before], low[meet] + offsets[number]
        pairs = np.stack([last, first], axis=1)[value[last] == value[first]]
        joins.append(np.unique(pairs, axis=0))
    total = int(offsets[-1])
    root = roots_of(total + 1, joins)
    joined_size = np.bincount(root, weights=size, minlength=total + 1).astype(np.int64)
    joined_border = np.bincount(root, weights=at_border, minlength=total + 1) > 0
    return Components(offsets, root, joined_size, value, joined_border)


def _touches_border(labels: np.ndarray, count: int, box: Region, shape: tuple[int, ...]) -> np.ndarray:
    touches = np.zeros(count + 1, bool)
    for axis, (part, n) in enumerate(zip(box, shape, strict=True)):
        if part.start == 0:
            touches[np.unique(np.take(labels, 0, axis))] = True
        if part.stop == n:
            touches[np.unique(np.take(labels, -1, axis))] = True
    return touches


def kept_components(components: Components, rules: CleaningRules) -> np.ndarray:
    """Return which components remain by the rules of size: bool by number."""
    keep = components.size >= max(rules.min_size, 1)
    keep[0] = False
    if rules.keep_largest is not None:
        keep &= _largest(components, rules.keep_largest)
    return keep[components.root]


def _largest(components: Components, count: int) -> np.ndarray:
    keep = np.zeros(len(components.size), bool)
    roots = np.flatnonzero(components.size)
    for value in np.unique(components.value[roots]):
        of_value = roots[components.value[roots] == value]
        # A stable sort: among equal sizes, the first in the volume remains.
        order = np.argsort(-components.size[of_value], kind="stable")
        keep[of_value[order[:count]]] = True
    return keep


def small_holes(components: Components, largest: int) -> np.ndarray:
    """Return which components of the background are holes of up to `largest` voxels: bool by number."""
    hole = (components.size > 0) & ~components.at_border & (components.size <= largest)
    hole[0] = False
    return hole[components.root]


def background(data: np.ndarray) -> np.ndarray:
    """Return 1 where labels are 0, and 0 elsewhere."""
    return (data == 0).astype(np.uint8)


def keep_chosen(data: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return a block's labels without the components that were not chosen.

    Args:
        data: labels of the block.
        chosen: bool per component of the block.
    """
    labels, _ = label_block(data)
    return np.where(np.concatenate([[False], chosen])[labels], data, 0).astype(data.dtype)


def fill_chosen(data: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return a block's labels, 1 in the components of its background that were chosen.

    Args:
        data: labels of the block, 0 or 1.
        chosen: bool per component of the block's background.
    """
    labels, _ = label_block(background(data))
    return np.where(np.concatenate([[False], chosen])[labels], 1, data).astype(data.dtype)


def clean_array(labels: np.ndarray, rules: CleaningRules) -> np.ndarray:
    """Return a label map in memory, cleaned by all rules.

    Args:
        labels: (*space).
        rules: the rules.
    """
    whole = tuple(slice(0, n) for n in labels.shape)

    def components(data: np.ndarray) -> Components:
        survey = survey_block(data, whole, labels.shape)
        return combine(lambda *_: survey, (1,) * labels.ndim)

    if rules.fill_holes:
        holes = small_holes(components(background(labels)), rules.fill_holes)
        labels = fill_chosen(labels, holes[1:])
    return keep_chosen(labels, kept_components(components(labels), rules)[1:])
