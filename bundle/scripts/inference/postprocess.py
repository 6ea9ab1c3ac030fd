"""Cleaning of label maps by connected components, block by block with stitching.

A block is labelled by itself; components are then joined across the faces between blocks by union-find.
Memory holds one block, the faces towards blocks not yet seen, and one number per component. Neighbours are
voxels that share a face, which is what stitching across faces finds exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from scripts.errors import VolumenError

Region = tuple[slice, ...]
Read = Callable[[Region], np.ndarray]
Write = Callable[[Region, np.ndarray], None]


@dataclass(frozen=True)
class CleaningRules:
    """What is done to a label map, in this order.

    Args:
        min_size: components of fewer voxels are removed.
        keep_largest: components kept of each class, the largest ones; None for all.
        fill_holes: background that the border of the volume cannot be reached from is filled, up to this
            many voxels a hole; 0 for none. Only where there is one class.
    """

    min_size: int = 0
    keep_largest: int | None = None
    fill_holes: int = 0

    def __post_init__(self) -> None:
        if (
            self.min_size < 0
            or self.fill_holes < 0
            or (self.keep_largest is not None and self.keep_largest < 1)
        ):
            raise VolumenError(
                "postprocess",
                expected="min_size and fill_holes of at least 0, keep_largest of at least 1",
                found=f"{self.min_size}, {self.fill_holes}, {self.keep_largest}",
            )

    @property
    def does_nothing(self) -> bool:
        return not (self.min_size or self.keep_largest or self.fill_holes)


@dataclass(frozen=True)
class Components:
    """Components of a volume, by the numbers that its blocks gave them.

    Args:
        offsets: block to the number before its first component.
        root: number to the number of the joined component, int64.
        size: joined number to its voxels, int64 (0 for numbers that were joined to another).
        value: number to the label value of its voxels.
        at_border: joined number to whether the component touches the volume's border.
    """

    offsets: dict[tuple[int, ...], int]
    root: np.ndarray
    size: np.ndarray
    value: np.ndarray
    at_border: np.ndarray


def blocks_of(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Region]]:
    """Yield (number, place) of every block in order, the last axis fastest."""
    for index in itertools.product(*(range(math.ceil(n / b)) for n, b in zip(shape, block, strict=True))):
        yield (
            index,
            tuple(slice(i * b, min((i + 1) * b, n)) for i, b, n in zip(index, block, shape, strict=True)),
        )


def label_block(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the components of equal, nonzero values of a block and their number; face neighbours."""
    import cc3d

    labels, count = cc3d.connected_components(
        np.ascontiguousarray(values), connectivity=6 if values.ndim == 3 else 4, return_N=True
    )
    return labels, int(count)


def find_components(read: Read, shape: tuple[int, ...], block: tuple[int, ...]) -> Components:
    """Find the components of equal, nonzero values of a volume.

    Args:
        read: gives the labels of a region.
        shape: shape of the volume.
        block: shape of a block.
    """
    offsets: dict[tuple[int, ...], int] = {}
    sizes, values, border = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.zeros(1, bool)]
    joins: list[np.ndarray] = []
    faces: dict[tuple[tuple[int, ...], int], tuple[np.ndarray, np.ndarray]] = {}
    total = 0
    for index, box in blocks_of(shape, block):
        data = read(box)
        labels, count = label_block(data)
        offsets[index] = total
        sizes.append(np.bincount(labels.reshape(-1), minlength=count + 1)[1:])
        of_value = np.zeros(count + 1, np.int64)
        of_value[labels.reshape(-1)] = data.reshape(-1)
        values.append(of_value[1:])
        border.append(_touches_border(labels, count, box, shape)[1:])
        numbers = np.where(labels > 0, labels.astype(np.int64) + total, 0)
        for axis in range(len(shape)):
            before = (*index[:axis], index[axis] - 1, *index[axis + 1 :])
            first = np.take(numbers, 0, axis), np.take(data, 0, axis)
            if (before, axis) in faces:
                joins.append(_joined(faces.pop((before, axis)), first))
            if box[axis].stop < shape[axis]:
                faces[index, axis] = np.take(numbers, -1, axis), np.take(data, -1, axis)
        total += count
    size, value, at_border = np.concatenate(sizes), np.concatenate(values), np.concatenate(border)
    root = join(total + 1, joins)
    joined_size = np.bincount(root, weights=size, minlength=total + 1).astype(np.int64)
    joined_border = np.bincount(root, weights=at_border, minlength=total + 1) > 0
    return Components(offsets, root, joined_size, value, joined_border)


def _joined(last: tuple[np.ndarray, np.ndarray], first: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the pairs of numbers that meet at a face with equal values: (pairs, 2)."""
    meet = (last[0] > 0) & (first[0] > 0) & (last[1] == first[1])
    return np.unique(np.stack([last[0][meet], first[0][meet]], axis=1), axis=0)


def _touches_border(labels: np.ndarray, count: int, box: Region, shape: tuple[int, ...]) -> np.ndarray:
    touches = np.zeros(count + 1, bool)
    for axis, (part, n) in enumerate(zip(box, shape, strict=True)):
        if part.start == 0:
            touches[np.unique(np.take(labels, 0, axis))] = True
        if part.stop == n:
            touches[np.unique(np.take(labels, -1, axis))] = True
    return touches


def join(count: int, pairs: list[np.ndarray]) -> np.ndarray:
    """Return for each number the smallest one that pairs connect it with: int64 (count,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
    groups, group = connected_components(graph, directed=False)
    smallest = np.full(groups, count, np.int64)
    np.minimum.at(smallest, group, np.arange(count))
    return smallest[group]


def clean(
    read: Read, write: Write, shape: tuple[int, ...], block: tuple[int, ...], rules: CleaningRules
) -> None:
    """Clean a label map by the rules of component size.

    Args:
        read: gives the labels of a region; must keep giving the old ones while `write` writes.
        write: takes the new labels of a region.
        shape: shape of the volume.
        block: shape of a block.
        rules: what is done; `fill_holes` is not, see `fill`.
    """
    components = find_components(read, shape, block)
    keep = components.size >= max(rules.min_size, 1)
    keep[0] = False
    if rules.keep_largest is not None:
        keep &= _largest(components, rules.keep_largest)
    for index, box in blocks_of(shape, block):
        data = read(box)
        labels, count = label_block(data)
        offset = components.offsets[index]
        kept = np.concatenate([[False], keep[components.root[offset + 1 : offset + count + 1]]])
        write(box, np.where(kept[labels], data, 0).astype(data.dtype))


def clean_array(labels: np.ndarray, rules: CleaningRules) -> np.ndarray:
    """Return a label map in memory, cleaned by all rules.

    Args:
        labels: (*space).
        rules: what is done.
    """
    result = labels
    for step in (
        lambda read, write: fill(read, write, labels.shape, labels.shape, rules.fill_holes),
        lambda read, write: clean(read, write, labels.shape, labels.shape, rules),
    ):
        source, result = result, np.empty_like(labels)
        step(source.__getitem__, result.__setitem__)
    return result


def _largest(components: Components, count: int) -> np.ndarray:
    keep = np.zeros(len(components.size), bool)
    roots = np.flatnonzero(components.size)
    for value in np.unique(components.value[roots]):
        of_value = roots[components.value[roots] == value]
        # A stable order: of equal sizes, the first in the volume.
        order = np.argsort(-components.size[of_value], kind="stable")
        keep[of_value[order[:count]]] = True
    return keep


def fill(read: Read, write: Write, shape: tuple[int, ...], block: tuple[int, ...], largest: int) -> None:
    """Fill holes of a binary label map: background components that do not touch the volume's border.

    Args:
        read: gives the labels, 0 or 1, of a region; must keep giving the old ones while `write` writes.
        write: takes the new labels of a region.
        shape: shape of the volume.
        block: shape of a block.
        largest: holes of more voxels stay.
    """

    def background(box: Region) -> np.ndarray:
        return (read(box) == 0).astype(np.uint8)

    components = find_components(background, shape, block)
    hole = (components.size > 0) & ~components.at_border & (components.size <= largest)
    hole[0] = False
    for index, box in blocks_of(shape, block):
        data = read(box)
        labels, count = label_block((data == 0).astype(np.uint8))
        offset = components.offsets[index]
        filled = np.concatenate([[False], hole[components.root[offset + 1 : offset + count + 1]]])
        write(box, np.where(filled[labels], 1, data).astype(data.dtype))
