"""Opening a volume by its content, whatever its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from volumen.data.formats.channel_files import ChannelFiles, channel_paths
from volumen.data.formats.detection import detect_format, split_inner
from volumen.data.formats.urls import is_url, local_path, without_scheme
from volumen.data.formats.volumes import LazyVolume, Volume, single_level
from volumen.utils.memory_pool import share_memory_between_threads


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
    when they are needed (`simplecache::https://...` stores them on disk); other files, each slice of a folder of slices
    included, are fetched whole, once.

    Args:
        path: file, zarr folder, N5 container, precomputed volume, WEBKNOSSOS dataset or layer, folder of TIFF, PNG or
            DICOM slices, or URL; `FILE.h5:/NAME` for a dataset of an HDF5 file;
            CASE_{0000,0001}.nii.gz for an image whose channels are files of their own.
        axes: letters of the stored axes, such as "zyx", "cyx", "yxc"; necessary only if metadata and shape are
            ambiguous. The axes of NIfTI are fixed.
        level: resolution level of a pyramid, 0 is the finest.
        ndim: number of spatial axes if known (a label has those of its image).
        labels: whether it is a label or a mask: PNG files with a palette or fewer than 8 bits are then read as numbers.

    Raises:
        AmbiguousAxesError: the shape can be interpreted in two ways.
        SingleLevelError: a level above 0 was requested of a volume that has only one.
        VolumenError: the file is missing, unreadable, of unknown format, truncated, or no image.
    """
    source = local_path(path)
    if is_url(source):
        share_memory_between_threads()
    several = channel_paths(source)
    if len(several) > 1:
        options: dict[str, Any] = {"axes": axes, "level": level, "ndim": ndim, "labels": labels}
        return ChannelFiles(str(source), [open_volume(one, **options) for one in several])
    volume = _open_by_content(source, axes, level, ndim, labels)
    volume.source = str(source).rstrip("/")
    return volume


def _open_by_content(
    path: str | os.PathLike, axes: str | None, level: int, ndim: int | None, labels: bool
) -> LazyVolume:
    kind = detect_format(path)
    if kind == "zarr":
        from volumen.data.formats.zarr_arrays.volume import open_zarr

        if is_url(path) and str(path).endswith((".zip", ".ozx")):
            path = _fetched(path)
        return open_zarr(str(path), axes=axes, level=level, ndim=ndim)
    if kind == "precomputed":
        from volumen.data.formats.precomputed.volume import open_precomputed

        return open_precomputed(without_scheme(str(path)), level=level, ndim=ndim)
    if kind == "n5":
        from volumen.data.formats.n5_volume import open_n5

        return open_n5(without_scheme(str(path)), axes=axes, level=level, ndim=ndim, labels=labels)
    if kind == "webknossos":
        from volumen.data.formats.webknossos.volume import open_webknossos

        return open_webknossos(str(path), level=level, ndim=ndim, labels=labels)
    if kind == "hdf5":
        from volumen.data.formats.extra.hdf5_volume import open_hdf5

        file, inner = split_inner(_fetched(path))
        return open_hdf5(Path(file), inner, axes=axes, level=level, ndim=ndim, labels=labels)
    if level:
        raise single_level(path, level)
    if kind == "stack":
        from volumen.data.formats.slice_stack import open_stack

        return open_stack(str(path).rstrip("/"), axes=axes, ndim=ndim, labels=labels)
    path = _fetched(path)
    if kind == "dicom":
        from volumen.data.formats.extra.dicom_series import open_dicom

        return open_dicom(Path(path), ndim=ndim)
    if kind == "metaimage":
        from volumen.data.formats.meta_image import open_meta_image

        return open_meta_image(Path(path), ndim=ndim)
    if kind == "mrc":
        from volumen.data.formats.extra.mrc_volume import open_mrc

        return open_mrc(Path(path), ndim=ndim)
    if kind == "nrrd":
        from volumen.data.formats.extra.nrrd_volume import open_nrrd

        return open_nrrd(Path(path), ndim=ndim)
    if kind == "tif":
        from volumen.data.formats.tiff.volume import open_tiff

        return open_tiff(Path(path), axes=axes, ndim=ndim)
    if kind == "png":
        from volumen.data.formats.png_volume import open_png

        return open_png(Path(path), axes=axes, ndim=ndim, labels=labels)
    from volumen.data.formats.nifti_volume import open_nifti

    return open_nifti(Path(path), ndim=ndim)


def _fetched(path: str | os.PathLike) -> str | os.PathLike:
    """Return the local copy of a file at a URL; other paths are unchanged."""
    if not is_url(path):
        return path
    from volumen.data.formats.fetch import fetch_file

    return fetch_file(str(path))
