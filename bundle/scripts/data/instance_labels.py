"""Whether the values of a label number objects, or classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.data.formats.volumes import Volume
from volumen.data.index.label_values import stored_regions

_BLOCKS = 6
"""Blocks of up to 4 million voxels that are looked at in a volume."""
_MOST_PIECES = 1.5
"""Pieces per value in a block up to which values number objects: some are cut by the block's border."""


def pieces_per_value(label: Volume, ignore: int | None = None) -> float | None:
    """Return the mean number of connected pieces of a value, in blocks all over a label.

    An object is one piece; the voxels of a class lie in many places as a rule. Pieces are connected by faces, edges
    or corners.

    Args:
        label: integers of one channel.
        ignore: value that means unknown.

    Returns:
        Pieces divided by values, both counted in each block and added up; None where no block has two values
        besides 0.
    """
    import cc3d

    regions, _ = stored_regions(label)
    values = pieces = 0
    step = max(1, len(regions) // _BLOCKS)
    for region in regions[: step * _BLOCKS : step]:
        block = label.read(region)[0]
        if ignore is not None:
            block = np.where(block == ignore, 0, block)
        numbers, compact = np.unique(block, return_inverse=True)
        foreground = len(numbers) - (0 in numbers)
        if foreground < 2:
            continue
        # Numbers 0, 1, 2, ...; without background they begin at 1.
        small = compact.reshape(block.shape).astype(np.uint32) + np.uint32(0 not in numbers)
        _, found = cc3d.connected_components(small, connectivity=8 if block.ndim == 2 else 26, return_N=True)
        values += foreground
        pieces += found
    return pieces / values if values else None


def look_like_instances(labels: Sequence[Volume], ignore: int | None = None, *, volumes: int = 3) -> bool:
    """Tell whether each value of some labels is one connected piece: of the first ones that have two values."""
    found = []
    for label in labels:
        pieces = pieces_per_value(label, ignore)
        if pieces is not None:
            found.append(pieces)
        if len(found) == volumes:
            break
    return bool(found) and max(found) <= _MOST_PIECES
