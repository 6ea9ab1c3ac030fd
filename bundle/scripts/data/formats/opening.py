"""Opening a volume by its content, whatever its name."""

from __future__ import annotations

import os
from pathlib import Path

from volumen.data.formats.detection import detect_format
from volumen.data.formats.urls import is_url, local_path
from volumen.data.formats.volumes import LazyVolume, Volume, single_level


def open_volume(
    path: str | os.PathLike,
    *,
    axes: str | None = None,
    level: int = 0,
    ndim: int | None = None,
    labels: bool = False,
) -> Volume:
    """Open a volume; its content, not its name, decides its format.

    A path may also be a URL that fsspec can open, chained ones included. Chunks of zarr (v2, v3, OME-Zarr) are fetched
    when they are needed (`simplecache::https://...` stores them on disk); TIFF, PNG, each slice of a folder of slices,
    and NIfTI are fetched whole, once.

    Args:
        path: file, zarr folder, folder of TIFF or PNG slices, or URL.
        axes: letters of the stored axes, such as "zyx", "cyx", "yxc"; necessary only if metadata and shape are
            ambiguous. The axes of NIfTI are fixed.
        level: resolution level of an OME-Zarr pyramid, 0 is the finest.
        ndim: number of spatial axes if known (a label has those of its image).
        labels: whether it is a label or a mask: PNG files with a palette or fewer than 8 bits are then read as numbers.

    Raises:
        AmbiguousAxesError: the shape can be interpreted in two ways.
        SingleLevelError: a level above 0 was requested of a volume that has only one.
        VolumenError: the file is missing, unreadable, of unknown format, truncated, or no image.
    """
    source = local_path(path)
    volume = _open_by_content(source, axes, level, ndim, labels)
    volume.source = str(source).rstrip("/")
    return volume


def _open_by_content(
    path: str | os.PathLike, axes: str | None, level: int, ndim: int | None, labels: bool
) -> LazyVolume:
    kind = detect_format(path)
    if kind == "zarr":
        from volumen.data.formats.zarr_arrays.volume import open_zarr

        return open_zarr(str(path), axes=axes, level=level, ndim=ndim)
    if level:
        raise single_level(path, level)
    if kind == "stack":
        from volumen.data.formats.slice_stack import open_stack

        return open_stack(str(path).rstrip("/"), axes=axes, ndim=ndim, labels=labels)
    if is_url(path):
        from volumen.data.formats.fetch import fetch_file

        path = fetch_file(str(path))
    if kind == "tif":
        from volumen.data.formats.tiff.volume import open_tiff

        return open_tiff(Path(path), axes=axes, ndim=ndim)
    if kind == "png":
        from volumen.data.formats.png_volume import open_png

        return open_png(Path(path), axes=axes, ndim=ndim, labels=labels)
    from volumen.data.formats.nifti_volume import open_nifti

    return open_nifti(Path(path), ndim=ndim)
