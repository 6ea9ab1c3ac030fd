"""Decides whether the values of a label are numbers of objects (instances) or classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.data.formats.volumes import Volume
from volumen.data.index.label_values import stored_regions

_BLOCKS = 6
"""Number of blocks of up to 4 million voxels that are examined in a volume."""
_MAX_COMPONENTS = 1.5
"""Connected components per value in a block up to which values are instances; a block's border cuts some."""


def components_per_value(label: Volume, ignore: int | None = None) -> float | None:
    """Return the mean number of connected components per value, in blocks spread over a label.

    An object has one component; a class usually has many. Voxels are connected by faces, edges or corners.

    Args:
        label: integers of one channel.
        ignore: label value that means unknown.

    Returns:
        Components divided by values, each summed over the blocks; None if no block has two values besides 0.
    """
    import cc3d

    regions, _ = stored_regions(label)
    values = components = 0
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
        components += found
    return components / values if values else None


def look_like_instances(labels: Sequence[Volume], ignore: int | None = None, *, volumes: int = 3) -> bool:
    """Return whether each value is about one connected component, in the first labels that have two values."""
    found = []
    for label in labels:
        components = components_per_value(label, ignore)
        if components is not None:
            found.append(components)
        if len(found) == volumes:
            break
    return bool(found) and max(found) <= _MAX_COMPONENTS
