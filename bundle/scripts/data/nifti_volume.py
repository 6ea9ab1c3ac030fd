"""NIfTI files, read lazily by nibabel and turned to (Z, Y, X)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.axes import AxisMap
from scripts.data.fingerprints import file_fingerprint
from scripts.data.volumes import LazyVolume, Region
from scripts.errors import VolumenError


class NiftiVolume(LazyVolume):
    """A NIfTI image: stored (X, Y, Z[, channels]), given as (channels, Z, Y, X).

    A plain `.nii` is memory-mapped. A `.nii.gz` has no random access: reading a region decompresses the file
    from its start up to that region.
    """

    def __init__(self, path: Path, image: Any, axis_map: AxisMap) -> None:
        proxy = image.dataobj
        scaled = (proxy.slope, proxy.inter) != (1.0, 0.0)
        dtype = np.dtype(np.float32) if scaled else np.dtype(proxy.dtype)
        sizes = [float(size) for size in image.header.get_zooms()]
        self.compressed = path.name.lower().endswith(".gz")
        super().__init__(
            str(path),
            axis_map,
            dtype,
            spacing=axis_map.of_space(sizes),
            unit=_unit(image.header),
            chunks=None if self.compressed else _plane(axis_map.shape),
            affine=np.asarray(image.affine, dtype=float),
        )

    def _open(self) -> Any:
        return _load(Path(self.path)).dataobj

    def _read_stored(self, region: Region) -> np.ndarray:
        try:
            with self._lock:
                return np.array(self.handle[region])
        except VolumenError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise VolumenError(
                self.path, f"is truncated or corrupt ({reason})", remedy="copy it again"
            ) from error

    def fingerprint(self) -> str:
        return file_fingerprint(Path(self.path), self.shape, self.dtype)


def open_nifti(path: Path, *, ndim: int | None = None) -> NiftiVolume:
    """Open a NIfTI file.

    Args:
        path: `.nii` or `.nii.gz`.
        ndim: 2 takes a volume of one slice as an image.

    Raises:
        VolumenError: the header is damaged, or the file holds more than space and channels.
    """
    image = _load(path)
    shape = tuple(int(size) for size in image.shape)
    spatial = min(len(shape), 3)
    extra = [axis for axis in range(spatial, len(shape)) if shape[axis] != 1]
    if spatial < 2 or len(extra) > 1:
        raise VolumenError(
            path, expected="(X, Y[, Z][, channels])", found=f"shape {shape}", remedy="split it"
        )
    if ndim == 2 and spatial == 3 and shape[2] == 1:
        spatial = 2
    if ndim is not None and spatial != ndim:
        raise VolumenError(path, expected=f"{ndim} spatial axes", found=f"shape {shape}")
    axis_map = AxisMap(shape, tuple(reversed(range(spatial))), extra[0] if extra else None)
    if np.dtype(image.dataobj.dtype).kind not in "biuf":
        raise VolumenError(path, expected="numbers", found=f"values of type {image.dataobj.dtype}")
    volume = NiftiVolume(path, image, axis_map)
    if not volume.compressed:
        _check_size(path, image.dataobj)
    return volume


def _load(path: Path) -> Any:
    import nibabel

    try:
        return nibabel.load(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise VolumenError(
            path, f"its NIfTI header cannot be read ({reason})", remedy="copy it again"
        ) from error


def _check_size(path: Path, proxy: Any) -> None:
    needed = int(proxy.offset) + int(np.prod(proxy.shape)) * proxy.dtype.itemsize
    found = path.stat().st_size
    if found < needed:
        raise VolumenError(
            path,
            expected=f"{needed} bytes for shape {proxy.shape}",
            found=f"{found} bytes",
            remedy="copy it again",
        )


def _plane(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape[1:]) if len(shape) == 3 else shape


def _unit(header: Any) -> str | None:
    unit = header.get_xyzt_units()[0]
    return None if unit == "unknown" else unit
