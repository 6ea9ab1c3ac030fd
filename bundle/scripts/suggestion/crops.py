"""Small volumes as OME-Zarr 0.5 with their place and voxel size, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from volumen.data.space.geometry import GRID, Geometry, stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.files.atomic import sync_folder

CHUNK = {2: 1024, 3: 64}


def create_volume(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype,
    geometry: Geometry,
    *,
    start: Sequence[int] | None = None,
    channels: int = 1,
    fill: float = 0,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """Create an OME-Zarr image of one level; return its array, (*space) or (channels, *space).

    Args:
        path: the group, which must not exist.
        shape: spatial shape.
        dtype: type of the values.
        geometry: of the volume that `start` is a voxel of; places of OME-Zarr know no directions, so those of NIfTI
            are left out, as in a prediction.
        start: first voxel; None: that of the volume.
        channels: channels; a single one has no axis.
        fill: value of voxels that are not written.
        attributes: further attributes of the group.
    """
    import zarr

    lead = (channels,) if channels > 1 else ()
    names = "zyx"[-len(shape) :]
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [_multiscale(path.name, names, geometry, start, lead)],
    }
    group.attrs.update(dict(attributes or {}))
    chunks = (*lead, *(min(CHUNK[len(shape)], n) for n in shape))
    return group.create_array(
        "0",
        shape=(*lead, *shape),
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        dimension_names=["c"] * bool(lead) + list(names),
    )


def write_volume(
    path: Path, values: np.ndarray, geometry: Geometry, start: Sequence[int], **options: Any
) -> None:
    """Write an array (channels, *space) as OME-Zarr under a temporary name, then rename it.

    Args:
        path: the group; an earlier one is replaced.
        values: the voxels.
        geometry, start: see `create_volume`.
        options: further ones of `create_volume`.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:16]}.tmp")
    try:
        array = create_volume(
            temporary, values.shape[1:], values.dtype, geometry, start=start, channels=len(values), **options
        )
        array[...] = values if len(values) > 1 else values[0]
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Give a finished folder its name; an earlier folder of the name is removed afterwards."""
    old = path.with_name(f".{path.name}.{uuid4().hex[:16]}.tmp")
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def crop_geometry(geometry: Geometry, start: Sequence[int]) -> Geometry:
    """Return the geometry that a crop's file states: see `create_volume`."""
    spacing = geometry.spacing or (1.0,) * len(start)
    origin = (
        geometry.origin if geometry.frame == GRID and geometry.origin is not None else (0.0,) * len(start)
    )
    place = tuple(o + s * step for o, s, step in zip(origin, start, spacing, strict=True))
    return stated_geometry(spacing, geometry.unit, origin=place)


def _multiscale(
    name: str, axes: str, geometry: Geometry, start: Sequence[int] | None, lead: tuple[int, ...]
) -> dict[str, Any]:
    placed = crop_geometry(geometry, start or (0,) * len(axes))
    unit = unit_name(placed.unit)
    spaces = [{"name": axis, "type": "space", **({"unit": unit} if unit else {})} for axis in axes]
    level: dict[str, Any] = {"path": "0"}
    # A whole volume states no voxel size that its image does not state.
    if start is not None or geometry.spacing is not None:
        level["coordinateTransformations"] = [
            {"type": "scale", "scale": [1.0] * len(lead) + list(placed.spacing or ())},
            {"type": "translation", "translation": [0.0] * len(lead) + list(placed.origin or ())},
        ]
    return {
        "name": name.removesuffix(".zarr"),
        "axes": [{"name": "c", "type": "channel"}] * bool(lead) + spaces,
        "datasets": [level],
    }
