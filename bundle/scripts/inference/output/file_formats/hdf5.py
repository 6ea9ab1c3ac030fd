"""Writes HDF5 files, with the attributes that ilastik, Fiji, funlib and volumen read."""

from __future__ import annotations

import json
from pathlib import Path

from volumen.data.formats.extra.library import library
from volumen.inference.output.file_formats.slabs import first_voxel, scale_to, slabs, wide
from volumen.inference.output.ome_zarr import ZarrOutput

DATASET = "main"
"""Name of the dataset, as PyTorch Connectomics calls it."""


def write_hdf5(path: Path, arrays: ZarrOutput, target: str, *, compress: bool) -> None:
    """Write a target as the only dataset of an HDF5 file, axes (C)ZYX or (C)YX, in chunks of a block.

    Attributes: `axistags` (ilastik), `resolution`, `offset` and `units` (funlib), `element_size_um` (Fiji); the last
    three only if the unit is known.

    Args:
        path: the file.
        arrays: the finished prediction.
        target: the target to write.
        compress: whether chunks are compressed (gzip, which every HDF5 library has).
    """
    h5py = library("h5py", path)
    stored = arrays.stored[target]
    lead = (stored.channels,) if stored.channels > 1 else ()
    ndim = len(arrays.shape)
    chunks = tuple(min(c, n) for c, n in zip(arrays.block_shape, arrays.shape, strict=True))
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            DATASET,
            shape=(*lead, *arrays.shape),
            dtype=wide(stored.dtype),
            chunks=(*(1 for _ in lead), *chunks),
            compression="gzip" if compress else None,
            compression_opts=4 if compress else None,
            shuffle=compress,
            track_times=False,
        )
        start = channel = 0
        for slab in slabs(arrays, target):
            place = (channel, slice(start, start + len(slab))) if lead else slice(start, start + len(slab))
            dataset[place] = slab
            start += len(slab)
            if start == arrays.shape[0]:
                start, channel = 0, channel + 1
        axes = "czyx"[-ndim - len(lead) :] if ndim == 3 else ("cyx" if lead else "yx")
        flags = {axis: 1 if axis == "c" else 2 for axis in axes}
        tags = [{"key": axis, "typeFlags": flags[axis], "resolution": 0, "description": ""} for axis in axes]
        dataset.attrs["axistags"] = json.dumps({"axes": tags})
        dataset.attrs["resolution"] = arrays.spacing
        dataset.attrs["offset"] = first_voxel(arrays)
        if arrays.unit is not None:
            dataset.attrs["units"] = arrays.unit
        by = scale_to(arrays, "micrometer")
        if by is not None:
            sizes = [size * by for size in arrays.spacing]
            dataset.attrs["element_size_um"] = [1.0] * (3 - ndim) + sizes
