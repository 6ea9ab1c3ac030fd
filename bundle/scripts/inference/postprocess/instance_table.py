"""Describes the instances of a finished prediction: size, middle and colour of each, in the metadata of its array."""

from __future__ import annotations

import colorsys
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.inference.postprocess.blocks import block_box, block_counts

if TYPE_CHECKING:
    from volumen.inference.output.ome_zarr import ZarrOutput

logger = logging.getLogger(__name__)

MOST_DESCRIBED = 10_000
"""More instances than this are not described: viewers read the metadata of an array as a whole."""
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class InstanceTable:
    """The instances of an array.

    Args:
        numbers: (N,) int64, ascending.
        voxels: (N,) int64.
        middles: (N, D) float64, mean of the voxels' numbers per axis.
    """

    numbers: np.ndarray
    voxels: np.ndarray
    middles: np.ndarray


def measure_instances(arrays: ZarrOutput, name: str) -> InstanceTable | None:
    """Return the table of an array of instances, block by block; None if it has more than `MOST_DESCRIBED`.

    Args:
        arrays: the finished arrays.
        name: the array, with numbers from 1.
    """
    shape, ndim = arrays.shape, len(arrays.shape)
    voxels = np.zeros(MOST_DESCRIBED + 1, np.int64)
    sums = np.zeros((MOST_DESCRIBED + 1, ndim))
    counts = block_counts(shape, arrays.block_shape)
    for block in range(int(np.prod(counts))):
        box = block_box(block, shape, arrays.block_shape)
        labels = arrays.read(name, box)[0]
        if int(labels.max(initial=0)) > MOST_DESCRIBED:
            return None
        place = np.nonzero(labels)
        numbers = labels[place]
        if not numbers.size:
            continue
        voxels += np.bincount(numbers, minlength=len(voxels))
        for axis in range(ndim):
            along = (place[axis] + box[axis].start).astype(np.float64)
            sums[:, axis] += np.bincount(numbers, weights=along, minlength=len(voxels))
    found = np.flatnonzero(voxels)
    return InstanceTable(found, voxels[found], sums[found] / voxels[found, None])


def describe_instances(arrays: ZarrOutput, name: str) -> None:
    """Write colours and properties of the instances into the metadata of their OME-Zarr label.

    Properties: `voxels`, and `centroid` in the unit of the image, per axis.

    Args:
        arrays: the finished arrays.
        name: the array.
    """
    import zarr

    table = measure_instances(arrays, name)
    if table is None:
        logger.info("%s: more than %d instances, which are not listed in its metadata", name, MOST_DESCRIBED)
        return
    group = zarr.open_group(arrays.root / arrays.groups[name], mode="r+")
    metadata: dict[str, Any] = dict(group.attrs["ome"])  # type: ignore[arg-type]
    places = np.array(arrays.place) + (table.middles + np.array(arrays.origin)) * np.array(arrays.spacing)
    metadata["image-label"] = {
        **metadata["image-label"],
        "colors": [
            {"label-value": int(number), "rgba": [*colour_of(int(number)), 255]} for number in table.numbers
        ],
        "properties": [
            {"label-value": int(number), "voxels": int(size), "centroid": [round(float(v), 6) for v in place]}
            for number, size, place in zip(table.numbers, table.voxels, places, strict=True)
        ],
    }
    group.attrs["ome"] = metadata


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the colour (red, green, blue) of an instance: hues of consecutive numbers are far apart."""
    hue, shade = number * _GOLDEN % 1.0, 0.75 + 0.25 * (number * _GOLDEN * _GOLDEN % 1.0)
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.75, shade))
    return red, green, blue
