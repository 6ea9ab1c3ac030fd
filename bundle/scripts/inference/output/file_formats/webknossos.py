"""Writes WEBKNOSSOS datasets: a layer per target, zarr 3 arrays with all magnifications."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.formats.webknossos.properties import PROPERTIES, SEGMENTATION, mag_name
from volumen.inference.output.chunk_files import zarr_codec
from volumen.inference.output.file_formats.slabs import final_path, first_voxel, scale_to, wide
from volumen.inference.output.ome_zarr import ZarrOutput, is_label_map
from volumen.utils.files.atomic import write_atomically

logger = logging.getLogger(__name__)

CHUNK, SHARD = 32, 256
"""Voxels per axis of a chunk and of a file."""
_ELEMENTS = {"float32": "float", "float64": "double"}
_LAYER = "layer.json"
_INTEGRAL = 0.01


def write_layer(path: Path, arrays: ZarrOutput, target: str, *, compress: str) -> None:
    """Write a target as a layer: an array (C, X, Y, Z) per magnification, in the coordinates of the dataset.

    Args:
        path: the folder to create; it also holds the layer's entry for the dataset's description.
        arrays: the finished prediction.
        target: a target of one channel.
        compress: compression of the chunks, as for `ZarrOutput`.
    """
    stored = arrays.stored[target]
    labels = is_label_map(stored)
    dtype = wide(stored.dtype)
    start = _start(final_path(path), arrays)
    path.mkdir(parents=True)
    largest, mags = 0, []
    for level in range(len(arrays.factors) + 1):
        factor = _to_3d(arrays.level_scale(level), 1)
        first = [low // f for low, f in zip(start, factor, strict=True)]
        name = mag_name(factor[::-1])
        found = _write_mag(path / name, arrays, target, level, first, dtype, compress)
        largest = max(largest, found)
        mags.append(
            {
                "mag": list(factor[::-1]),
                "path": f"./{final_path(path).name}/{name}",
                "axisOrder": {"c": 0, "x": 1, "y": 2, "z": 3},
            }
        )
    size = _to_3d(arrays.shape, 1)
    entry: dict[str, Any] = {
        "name": final_path(path).name,
        "category": SEGMENTATION if labels else "color",
        "boundingBox": {
            "topLeft": start[::-1],
            "width": size[2],
            "height": size[1],
            "depth": size[0],
        },
        "elementClass": _ELEMENTS.get(dtype.name, dtype.name),
        "dataFormat": "zarr3",
        "numChannels": 1,
        "mags": mags,
    }
    if labels:
        entry["largestSegmentId"] = largest
    (path / _LAYER).write_text(json.dumps(entry))


def add_attachment(layer: Path, kind: str, name: str, file: str) -> None:
    """Name a file of a layer in the layer's entry for the dataset's description.

    Args:
        layer: the folder that `write_layer` created.
        kind: what the file is for, such as agglomerates.
        name: under which WEBKNOSSOS shows it.
        file: path in the layer's folder, HDF5.
    """
    entry = json.loads((layer / _LAYER).read_text())
    found = {"name": name, "path": f"./{final_path(layer).name}/{file}", "dataFormat": "hdf5"}
    entry.setdefault("attachments", {}).setdefault(kind, []).append(found)
    (layer / _LAYER).write_text(json.dumps(entry))


def first_voxel_of(layer: Path) -> list[int]:
    """Return the first voxel (x, y, z) of a layer in the coordinates of the dataset."""
    return list(json.loads((layer / _LAYER).read_text())["boundingBox"]["topLeft"])


def write_description(dataset: Path, arrays: ZarrOutput, layers: Sequence[Path]) -> None:
    """Write the description of a dataset from those of its finished layers."""
    by = scale_to(arrays, "nanometer")
    sizes = [size * (by or 1.0) for size in _to_3d(arrays.spacing, arrays.spacing[0])]
    name = dataset.name.removesuffix(".webknossos")
    content = {
        "id": {"name": name, "team": ""},
        "name": name,
        "dataLayers": [json.loads((layer / _LAYER).read_text()) for layer in layers],
        "scale": {"factor": sizes[::-1], "unit": "nanometer"},
        "version": 1,
    }
    write_atomically(dataset / PROPERTIES, json.dumps(content, indent=1).encode())


def _start(path: Path, arrays: ZarrOutput) -> list[int]:
    """Return the first voxel (Z, Y, X) in the coordinates of the dataset, which count whole voxels from 0 on."""
    exact = [place / size for place, size in zip(first_voxel(arrays), arrays.spacing, strict=True)]
    whole = [max(round(value), 0) for value in exact]
    if scale_to(arrays, "nanometer") is None:
        logger.warning(
            "%s: the image states no unit of length; the dataset counts its voxel size in nanometers", path
        )
    off = max(abs(a - b) for a, b in zip(exact, whole, strict=True))
    if off > _INTEGRAL:
        logger.warning("%s: lies %.3g voxels off, since a dataset counts whole voxels from 0 on", path, off)
    return list(_to_3d(whole, 0))


def _write_mag(
    folder: Path,
    arrays: ZarrOutput,
    target: str,
    level: int,
    first: Sequence[int],
    dtype: np.dtype,
    compress: str,
) -> int:
    """Write one magnification, file by file; return its largest value."""
    import zarr

    shape = _to_3d(arrays.level_shape(level), 1)
    stop = [low + n for low, n in zip(first, shape, strict=True)]
    array = zarr.create_array(
        folder,
        shape=(1, *stop[::-1]),
        chunks=(1, *[CHUNK] * 3),
        shards=(1, *[SHARD] * 3),
        dtype=dtype,
        dimension_names=["c", "x", "y", "z"],
        compressors=zarr_codec(compress, dtype),
        fill_value=0,
    )
    largest = 0
    ranges = [range(low // SHARD, -(-high // SHARD)) for low, high in zip(first, stop, strict=True)]
    for index in product(*ranges):
        box = [
            slice(max(i * SHARD, low), min((i + 1) * SHARD, high))
            for i, low, high in zip(index, first, stop, strict=True)
        ]
        inside = tuple(slice(p.start - low, p.stop - low) for p, low in zip(box, first, strict=True))
        values = arrays.read(target, inside[-len(arrays.shape) :], level)[0]
        values = values.reshape([p.stop - p.start for p in box])
        if values.any():
            largest = max(largest, int(values.max()))
            array[(slice(0, 1), *box[::-1])] = values.transpose()[None].astype(dtype)
    return largest


def _to_3d(values: Sequence, lead: Any) -> tuple:
    return (*[lead] * (3 - len(values)), *values)
