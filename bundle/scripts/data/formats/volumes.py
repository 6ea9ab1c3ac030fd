"""Lazy volumes: one small protocol for all file formats, which are read region by region."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from volumen.data.formats.axes import AxisMap, map_axes
from volumen.data.formats.open_handles import HANDLES
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError

Region = tuple[slice, ...]


@runtime_checkable
class Volume(Protocol):
    """An image or label volume of which any region can be read.

    Attributes:
        path: place of its voxels (a path, a URL, or a name for arrays in memory).
        source: path that the user opened, for messages: a zarr array's group, the URL of a fetched file, or `path`.
        shape: spatial shape, (Z, Y, X) or (Y, X).
        channels: number of channels, at least 1.
        dtype: type of the values that `read` returns, in native byte order.
        geometry: voxel size per spatial axis, its unit, and origin and direction of the axes, as far as known.
        spacing: `geometry.spacing`.
        unit: `geometry.unit`, the name of OME-Zarr ("nanometer", "millimeter", ...).
        chunks: spatial shape of the blocks that are stored, and therefore decoded, as one.
        affine: (4, 4) NIfTI affine over (X, Y, Z) voxel indices, or None.
    """

    path: str
    source: str

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def spacing(self) -> tuple[float, ...] | None: ...
    @property
    def unit(self) -> str | None: ...
    @property
    def chunks(self) -> tuple[int, ...]: ...
    @property
    def affine(self) -> np.ndarray | None: ...

    def fingerprint(self) -> str:
        """Return a short hash that changes with the stored content; cheap, reads no voxels from disk."""
        ...

    def read(self, region: Region) -> np.ndarray:
        """Return (channels, *region shape) in the stored type, as a copy.

        Args:
            region: one slice with unit step per spatial axis, inside the volume.
        """
        ...


def check_region(region: Region, shape: tuple[int, ...]) -> Region:
    """Return the region with explicit bounds on every axis.

    Raises:
        ValueError: the region has another number of axes, a step, or exceeds the volume.
    """
    if len(region) != len(shape):
        raise ValueError(f"region must have {len(shape)} slices for shape {shape}, got {region}")
    checked = []
    for part, size in zip(region, shape):
        start = 0 if part.start is None else int(part.start)
        stop = size if part.stop is None else int(part.stop)
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(f"region must lie inside shape {shape} with unit step, got {region}")
        checked.append(slice(start, stop))
    return tuple(checked)


def describe_volume(volume: Volume) -> str:
    """Return one line with a volume's path, shape, channels and type."""
    kind, channels = type(volume).__name__, volume.channels
    return f"{kind}({volume.path!r}, shape={volume.shape}, channels={channels}, dtype={volume.dtype})"


class HasGeometry:
    """Provides the voxel size and unit of a class with a geometry."""

    geometry: Geometry

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Size of a voxel per spatial axis, in `unit`."""
        return self.geometry.spacing

    @property
    def unit(self) -> str | None:
        """Unit of the spacing."""
        return self.geometry.unit


class LazyVolume(HasGeometry, ABC):
    """A volume in a file, which each process opens at its first read.

    Pickling and forking drop the open handle, so a volume can be sent to any worker process or inherited by it.
    """

    def __init__(
        self,
        path: str,
        axis_map: AxisMap,
        dtype: np.dtype,
        *,
        geometry: Geometry | None = None,
        chunks: tuple[int, ...] | None = None,
        affine: np.ndarray | None = None,
    ) -> None:
        self.path = self.source = path
        self.axis_map = axis_map
        self.shape = axis_map.shape
        self.channels = axis_map.channels
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self.geometry = geometry or Geometry()
        self.chunks = tuple(min(c, s) if s else 1 for c, s in zip(chunks or self.shape, self.shape))
        self.affine = affine
        self._forget_handle()

    def _forget_handle(self) -> None:
        self._handle: Any = None
        self._owner = -1
        self._lock = threading.RLock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_handle", "_owner", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_handle()

    def __repr__(self) -> str:
        return describe_volume(self)

    @property
    def handle(self) -> Any:
        """The open file, opened by this process."""
        handle = self._handle
        if handle is None or self._owner != os.getpid():
            handle = self._open_here()
        return handle

    def _open_here(self) -> Any:
        if self._owner not in (-1, os.getpid()):
            # A forked child may inherit the lock while a thread of its parent held it.
            self._forget_handle()
        with self._lock:
            handle = self._handle
            if handle is None:
                handle = self._handle = self._open()
                self._owner = os.getpid()
                HANDLES.add(self)
            return handle

    def drop_handle(self) -> None:
        """Release the open file; it closes after the last read that uses it, and the next read opens it again."""
        self._handle = None

    @abstractmethod
    def _open(self) -> Any:
        """Open the file."""

    @abstractmethod
    def _read_stored(self, region: Region) -> np.ndarray:
        """Read a region of the stored array as a copy, with all stored axes."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short hash of sizes, modification times and metadata."""

    def read(self, region: Region) -> np.ndarray:
        region = check_region(region, self.shape)
        if any(part.start == part.stop for part in region):
            return np.empty((self.channels, *(part.stop - part.start for part in region)), self.dtype)
        stored = self._read_stored(self.axis_map.stored_region(region))
        return self.axis_map.channels_first(stored).astype(self.dtype, copy=False)


class ArrayVolume(HasGeometry):
    """A volume over an array in memory, or over one that can be sliced like it (dask, zarr), without a copy.

    Args:
        array: array, (Z, Y, X) or (Y, X), or with channels according to `axes`.
        axes: letters of the array's axes, such as "czyx"; by default inferred as in `open_volume`.
        spacing: voxel size per spatial axis.
        unit: unit of the spacing.
        path: name for messages.
        ndim: number of spatial axes if the shape is ambiguous.
        affine: (4, 4) NIfTI affine over (X, Y, Z) voxel indices.
        geometry: voxel size and place in space, instead of `spacing` and `unit`.
    """

    def __init__(
        self,
        array: Any,
        *,
        axes: str | None = None,
        spacing: tuple[float, ...] | None = None,
        unit: str | None = None,
        path: str = "array",
        ndim: int | None = None,
        affine: np.ndarray | None = None,
        geometry: Geometry | None = None,
    ) -> None:
        self.path = self.source = path
        self.array = array
        self.axis_map = map_axes(path, array.shape, requested=axes, ndim=ndim)
        self.shape = self.axis_map.shape
        self.channels = self.axis_map.channels
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        self.geometry = geometry or stated_geometry(spacing, unit_name(unit))
        self.affine = affine
        self.chunks = self._block_shape()

    def _block_shape(self) -> tuple[int, ...]:
        stored = getattr(self.array, "chunks", None)
        if not stored:
            return self.shape
        sizes = [c if isinstance(c, int) else max(c) for c in stored]
        return self.axis_map.of_space(sizes)

    def __repr__(self) -> str:
        return describe_volume(self)

    def fingerprint(self) -> str:
        """Return a hash of the whole array if it is in memory, else of the identifier of a lazy array."""
        from volumen.data.caching.fingerprints import array_fingerprint

        return array_fingerprint(self.array)

    def read(self, region: Region) -> np.ndarray:
        stored = self.axis_map.stored_region(check_region(region, self.shape))
        block = self.axis_map.channels_first(np.asarray(self.array[stored]))
        return np.array(block, dtype=self.dtype)


class SingleLevelError(VolumenError):
    """A resolution level was requested of a volume that has only one."""


def single_level(path: object, level: int) -> SingleLevelError:
    """Return the error for a level of a volume that has only one."""
    return SingleLevelError(
        path,
        f"has a single resolution, not a level {level}",
        remedy="set dataset_config.ome_zarr_resolution to 0",
    )
