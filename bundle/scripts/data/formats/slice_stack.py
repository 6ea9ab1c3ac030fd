"""Reads a folder of numbered TIFF or PNG files, on disk or at a URL; each file is a slice of one volume."""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import digest
from volumen.data.formats.axes import AxisMap
from volumen.data.formats.detection import split_suffix, stack_files, stack_order
from volumen.data.formats.fetch import fetch_file, file_states
from volumen.data.formats.png_volume import PngVolume, open_png
from volumen.data.formats.tiff.volume import TiffVolume, open_tiff
from volumen.data.formats.urls import child, is_url, names_in
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

_Slice = TiffVolume | PngVolume


class SliceStack(LazyVolume):
    """A volume of 2D images, ordered by number along Z; only the files and rows of a region are read.

    A file at a URL is fetched whole when a region first needs it.
    """

    def __init__(
        self, folder: str, files: tuple[str, ...], first: _Slice, axes: str | None, labels: bool = False
    ) -> None:
        space = (len(files), *first.shape)
        axis_map = (
            AxisMap(space, (0, 1, 2))
            if first.channels == 1
            else AxisMap((first.channels, *space), (1, 2, 3), 0)
        )
        super().__init__(folder, axis_map, first.dtype, chunks=(1, *first.chunks))
        self._files = files
        self._axes = axes
        self._labels = labels
        self.samples, self.remark = first.samples, first.remark

    def _open(self) -> _Slices:
        return _Slices()

    def _read_stored(self, region: Region) -> np.ndarray:
        depth, plane = region[-3], region[-2:]
        slices: _Slices = self.handle
        out = np.empty([part.stop - part.start for part in region], self.dtype)
        for number in range(depth.start, depth.stop):
            found = slices.get(number, self._slice).read(plane)
            out[..., number - depth.start, :, :] = found if self.channels > 1 else found[0]
        return out

    def _slice(self, number: int) -> _Slice:
        path = child(self.path, self._files[number])
        found = _open_slice(path, self._axes, self._labels)
        for what, own, required in (
            ("shape", found.shape, self.shape[1:]),
            ("channels", found.channels, self.channels),
            ("type", found.dtype, self.dtype),
        ):
            if own != required:
                raise VolumenError(
                    path,
                    expected=f"{what} {required}, as the first slice has",
                    found=own,
                    remedy="save all slices alike",
                )
        return found

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and modification times, or of what a server states instead."""
        if is_url(self.path):
            return digest([*file_states(self.path, self._files), self.shape, self.channels, self.dtype])
        statuses = [os.stat(os.path.join(self.path, name)) for name in self._files]  # noqa: PTH116, PTH118
        lines = [f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in zip(self._files, statuses)]
        return digest([*lines, self.shape, self.channels, self.dtype])


class _Slices:
    """Cache of opened slices; `OpenHandles` closes their files if too many are open."""

    def __init__(self) -> None:
        self._opened: dict[int, _Slice] = {}
        self._lock = threading.Lock()

    def get(self, number: int, make: Any) -> _Slice:
        found = self._opened.get(number)
        if found is None:
            found = make(number)
            with self._lock:
                found = self._opened.setdefault(number, found)
        return found


def open_stack(
    folder: str, *, axes: str | None = None, ndim: int | None = None, labels: bool = False
) -> SliceStack:
    """Open a folder of numbered 2D TIFF or PNG files as a volume.

    Args:
        folder: path or URL of files whose names differ in one number; 2 comes before 10.
        axes: letters of the volume's axes; z is the axis of the numbers.
        ndim: 3, or None if it is not known.
        labels: see `open_volume`.

    Raises:
        VolumenError: there are no such files, or the first is not 2D or cannot be read.
    """
    files = stack_order(names_in(folder))
    if not files:
        raise VolumenError(
            folder,
            expected="a zarr, TIFF or NIfTI volume, or numbered TIFF or PNG slices",
            found="a folder without zarr metadata",
        )
    if ndim not in (None, 3):
        raise VolumenError(
            folder,
            expected=f"an image of {ndim} axes",
            found=f"a folder of {len(files)} slices",
            remedy="move the slices up, one image each, if they are no volume",
        )
    inner = None if axes is None else axes.lower().replace("z", "")
    _warn_of_gaps(folder, files)
    if is_url(folder):
        logger.info("%s: its %d slices are fetched as they are needed", folder, len(files))
    return SliceStack(folder, files, _open_slice(child(folder, files[0]), inner, labels), inner, labels)


def holds_slices(folder: Path) -> bool:
    """Return, without logging, whether a folder contains the 2D slices of one volume rather than numbered volumes."""
    files = stack_files(folder)
    try:
        return bool(files) and _open_slice(str(folder / files[0]), None, labels=True) is not None
    except VolumenError:
        return False


def _open_slice(path: str, axes: str | None, labels: bool = False) -> _Slice:
    file = fetch_file(path, level=logging.DEBUG) if is_url(path) else Path(path)
    if split_suffix(path)[1] == "png":
        return open_png(file, axes=axes, ndim=2, labels=labels)
    return open_tiff(file, axes=axes, ndim=2)


def _warn_of_gaps(folder: str, files: tuple[str, ...]) -> None:
    """Warn of slices that seem to be missing, since all later slices would have wrong positions."""
    varying = [re.findall(r"\d+", name) for name in files]
    numbers = [
        [int(digits) for digits in column] for column in zip(*varying, strict=True) if len(set(column)) > 1
    ]
    if len(numbers) != 1:
        return
    steps = np.diff(numbers[0])
    usual = int(np.min(steps))
    odd = np.flatnonzero(steps != usual)
    if odd.size:
        after = files[int(odd[0])]
        logger.warning("%s: slices seem to be missing, the first after %s", folder, after)
