"""Writes TIFF and NIfTI files of a finished prediction, slab by slab, from its zarr arrays."""

from __future__ import annotations

import glob
import gzip
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np

from volumen.data.space.units import OME_SYMBOLS, factor
from volumen.inference.output.block_log import LOG, PROVENANCE, STATE_FOLDER, difference
from volumen.inference.output.ome_zarr import ZarrOutput
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import UNFINISHED, write_atomically

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

SUFFIXES = {".tif": "tif", ".tiff": "tif", ".nii": "nifti", ".nii.gz": "nifti", ".zarr": "zarr"}
DEFAULT_SUFFIX = {"tif": ".tif", "nifti": ".nii.gz", "zarr": ".zarr"}


def format_of(output: str, required: str | None) -> tuple[str, str]:
    """Return (format, suffix of the name or "") of an output.

    Args:
        output: path that the user gave.
        required: "zarr", "tif" or "nifti"; None: from the name, zarr for a folder.

    Raises:
        VolumenError: the name has the suffix of another format than the required one.
    """
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if output.endswith(s)), "")
    named = SUFFIXES.get(suffix)
    if required and named and required != named:
        raise VolumenError(output, expected=f"a name for --format {required}", found=suffix)
    return required or named or "zarr", suffix


class FileExport:
    """The files of one volume's prediction, and the `<name>.volumen.json` with their provenance.

    Args:
        folder: folder of the files.
        name: start of the file names.
        names: targets.
        suffix: ".tif", ".nii", ...
        plain: whether the file name of a single target omits the target.
    """

    def __init__(self, folder: Path, name: str, names: tuple[str, ...], suffix: str, *, plain: bool) -> None:
        bare = plain and len(names) == 1
        self.files = {
            target: folder / (f"{name}{suffix}" if bare else f"{name}_{target}{suffix}") for target in names
        }
        self.sidecar = folder / f"{name}.volumen.json"
        self.working = folder / f".{name}.volumen.zarr"

    def resolve(self, provenance: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Return whether the files exist already; remove those of another prediction if allowed.

        Raises:
            VolumenError: there are files of another origin, or of another prediction and `overwrite` is false.
        """
        old: dict[str, Any] = {}
        try:
            old = json.loads(self.sidecar.read_text())
        except (OSError, ValueError):
            interrupted = (self.working / STATE_FOLDER / PROVENANCE).exists()
            for path in self.files.values():
                if path.exists() and not interrupted:
                    raise VolumenError(
                        path, "exists and no prediction made it", remedy="choose another output"
                    ) from None
            return False
        change = difference(old["recipe"], provenance)
        if change and not overwrite:
            raise VolumenError(
                self.sidecar,
                f"holds another prediction: {change}",
                remedy="choose another output, or replace that one with --overwrite",
            )
        shutil.rmtree(self.working, ignore_errors=True)  # a process was killed after it wrote the record
        if not overwrite and all(path.exists() for path in self.files.values()):
            return True
        for name in old["files"]:
            (self.sidecar.parent / name).unlink(missing_ok=True)
        self.sidecar.unlink()
        return False

    def write(
        self,
        arrays: ZarrOutput,
        attributes: Mapping[str, Any],
        *,
        image: Volume,
        compress: bool,
    ) -> None:
        """Write the files from finished arrays, then the record, and remove the working arrays.

        Args:
            arrays: the finished prediction.
            attributes: the provenance and other entries of the record.
            image: the predicted image; NIfTI files have its affine.
            compress: whether TIFF pages are compressed; the suffix decides it for NIfTI.
        """
        for target, path in self.files.items():
            # The mark of an unfinished file is a prefix, since the suffix decides the format.
            partial = path.with_name(f".partial-{path.name}")
            if path.suffix in (".tif", ".tiff"):
                made_by = f"{json.dumps(attributes, sort_keys=True)} {target}"
                write_tiff(partial, arrays, target, compress=compress, identity=made_by)
            else:
                write_nifti(partial, arrays, target, image.affine)
            partial.replace(path)
        for leftover in self.sidecar.parent.glob(f".{glob.escape(self.sidecar.name)}{UNFINISHED[1:]}"):
            leftover.unlink(missing_ok=True)
        record = {**attributes, "files": [path.name for path in self.files.values()]}
        write_atomically(self.sidecar, json.dumps(record, indent=1).encode())
        # The log first: after an interrupted removal it must not list blocks whose files no longer exist.
        (self.working / STATE_FOLDER / LOG).unlink(missing_ok=True)
        shutil.rmtree(self.working)


def slabs(arrays: ZarrOutput, target: str) -> Iterator[np.ndarray]:
    """Yield the slabs of an array along the first spatial axis, channel by channel: (depth, *rest)."""
    depth = arrays.block_shape[0]
    rest = tuple(slice(0, n) for n in arrays.shape[1:])
    for channel in range(arrays.stored[target].channels):
        for start in range(0, arrays.shape[0], depth):
            box = (slice(start, min(start + depth, arrays.shape[0])), *rest)
            yield arrays.read(target, box)[channel]


def write_tiff(path: Path, arrays: ZarrOutput, target: str, *, compress: bool, identity: str) -> None:
    """Write a target as OME-TIFF, axes (C)ZYX or (C)YX; BigTIFF above 4 GB.

    The OME-XML states the voxel size; the resolution tags state the pixel size too, for programs that do not read OME.

    Args:
        path: the file.
        arrays: the finished prediction.
        target: the target to write.
        compress: whether pages are compressed.
        identity: text from which the file's UUID is computed, so that the same prediction has the same bytes.
    """
    import tifffile

    stored = arrays.stored[target]
    dtype = _wide(stored.dtype)
    shape: tuple[int, ...] = (*((stored.channels,) if stored.channels > 1 else ()), *arrays.shape)
    axes = "CZYX"[-len(shape) :] if len(arrays.shape) == 3 else "CYX"[-len(shape) :]

    def pages() -> Iterator[np.ndarray]:
        if len(arrays.shape) == 2:
            for channel in range(stored.channels):
                yield arrays.read(target, tuple(slice(0, n) for n in arrays.shape))[channel].astype(dtype)
            return
        for slab in slabs(arrays, target):
            yield from slab.astype(dtype)

    size = int(np.prod(shape)) * dtype.itemsize
    tifffile.imwrite(
        path,
        pages(),
        shape=shape,
        dtype=dtype,
        photometric="minisblack",
        bigtiff=size > 3 << 30,
        compression="zlib" if compress else None,
        ome=True,
        metadata={
            "axes": axes,
            "Name": target,
            "UUID": f"urn:uuid:{uuid5(NAMESPACE_OID, identity)}",
            **_physical_sizes(arrays),
        },
        **_resolution(arrays),
    )


def _wide(dtype: np.dtype) -> np.dtype:
    """Return the type of a file's values: float32 for float16, which OME-TIFF and NIfTI lack."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _physical_sizes(arrays: ZarrOutput) -> dict[str, Any]:
    """Return the voxel size for OME-XML; without a unit it is in pixels, not in OME's default of micrometers."""
    found: dict[str, Any] = {}
    for axis, size in zip("ZYX"[-len(arrays.shape) :], arrays.spacing, strict=True):
        found[f"PhysicalSize{axis}"] = size
        found[f"PhysicalSize{axis}Unit"] = OME_SYMBOLS.get(arrays.unit or "", "pixel")
    return found


def _resolution(arrays: ZarrOutput) -> dict[str, Any]:
    """Return the resolution tags in pixels per centimetre; empty if the unit is unknown."""
    centimetres = None if arrays.unit is None else factor(arrays.unit, "centimeter")
    if centimetres is None:
        return {}
    height, width = (1.0 / (size * centimetres) for size in arrays.spacing[-2:])
    if max(height, width) >= 1 << 31:
        return {}  # voxels of a few picometers: more than a tag can store
    return {"resolution": (width, height), "resolutionunit": "CENTIMETER"}


def write_nifti(path: Path, arrays: ZarrOutput, target: str, affine: np.ndarray | None) -> None:
    """Write a target as NIfTI, axes (X, Y, Z[, C]), with the image's affine moved to the region's start.

    For an image without an affine, it is computed from the voxel size and the place of the first voxel. Units that
    NIfTI lacks are converted to micrometers, or to millimeters if a voxel has more than 100 micrometers.
    """
    import nibabel

    stored = arrays.stored[target]
    dtype = _wide(stored.dtype)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    space = arrays.shape[::-1]
    channels = (stored.channels,) if stored.channels > 1 else ()
    header.set_data_shape((*space, *([1] * (3 - len(space))), *channels))
    unit, by = _nifti_unit(arrays)
    if affine is None:
        affine = np.diag([*(size * by for size in arrays.spacing[::-1]), *([1.0] * (4 - len(space)))])
        affine[: len(space), 3] = [value * by for value in arrays.place[::-1]]
    moved = affine.astype(np.float64)
    moved[:3, 3] += moved[:3, : len(space)] @ np.array(arrays.origin[::-1], dtype=np.float64)
    header.set_sform(moved, code=2)
    header.set_qform(moved, code=2)
    header.set_xyzt_units(unit)
    header["vox_offset"] = 352
    with open_plain(path) as stream:
        header.write_to(stream)
        for slab in slabs(arrays, target):
            # NIfTI stores (X, Y, Z) in Fortran order, which is C order over (Z, Y, X).
            stream.write(np.ascontiguousarray(slab, dtype=dtype).tobytes())


def _nifti_unit(arrays: ZarrOutput) -> tuple[str, float]:
    """Return NIfTI's name of a unit, and the factor from the arrays' unit to it."""
    names = {"meter": "meter", "millimeter": "mm", "micrometer": "micron"}
    unit = arrays.unit
    if unit is None:
        return "unknown", 1.0
    if unit in names:
        return names[unit], 1.0
    by = factor(unit, "micrometer")
    if by is None:
        return "unknown", 1.0
    if min(arrays.spacing) * by > 100:
        return "mm", float(factor(unit, "millimeter") or 1)
    return "micron", by


@contextmanager
def open_plain(path: Path) -> Iterator[Any]:
    """Open a file for writing, compressed if its suffix is `.gz`; the same content results in the same bytes."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed:
                yield packed
        else:
            yield raw
