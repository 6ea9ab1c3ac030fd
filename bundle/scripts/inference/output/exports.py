"""TIFF and NIfTI files of a finished prediction, written slab by slab from its zarr arrays."""

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
from volumen.inference.output.block_log import LOG, RECIPE, STATE_FOLDER, difference
from volumen.inference.output.ome_zarr import ZarrOutput
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import UNFINISHED, write_atomically

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

SUFFIXES = {".tif": "tif", ".tiff": "tif", ".nii": "nifti", ".nii.gz": "nifti", ".zarr": "zarr"}
DEFAULT_SUFFIX = {"tif": ".tif", "nifti": ".nii.gz", "zarr": ".zarr"}


def format_of(output: str, wanted: str | None) -> tuple[str, str]:
    """Return (format, suffix of the name or "") of an output.

    Args:
        output: path that the user gave.
        wanted: "zarr", "tif" or "nifti"; None to go by the name, zarr for a folder.

    Raises:
        VolumenError: the name says another format than the one wanted.
    """
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if output.endswith(s)), "")
    named = SUFFIXES.get(suffix)
    if wanted and named and wanted != named:
        raise VolumenError(output, expected=f"a name for --format {wanted}", found=suffix)
    return wanted or named or "zarr", suffix


class FileExport:
    """The files of one volume's prediction beside a `<name>.volumen.json` that says what made them.

    Args:
        folder: where the files go.
        name: what their names begin with.
        names: targets; a single one may have the file without its name in it.
        suffix: ".tif", ".nii", ...
        plain: whether the single target's file is called by the name alone.
    """

    def __init__(self, folder: Path, name: str, names: tuple[str, ...], suffix: str, *, plain: bool) -> None:
        bare = plain and len(names) == 1
        self.files = {
            target: folder / (f"{name}{suffix}" if bare else f"{name}_{target}{suffix}") for target in names
        }
        self.sidecar = folder / f"{name}.volumen.json"
        self.working = folder / f".{name}.volumen.zarr"

    def settle(self, recipe: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Return whether the files are there already; remove those of another prediction if allowed.

        Raises:
            VolumenError: files are there that no prediction made, or another one without `overwrite`.
        """
        old: dict[str, Any] = {}
        try:
            old = json.loads(self.sidecar.read_text())
        except (OSError, ValueError):
            going_on = (self.working / STATE_FOLDER / RECIPE).exists()
            for path in self.files.values():
                if path.exists() and not going_on:
                    raise VolumenError(
                        path, "exists and no prediction made it", remedy="choose another output"
                    ) from None
            return False
        change = difference(old["recipe"], recipe)
        if change and not overwrite:
            raise VolumenError(
                self.sidecar,
                f"holds another prediction: {change}",
                remedy="choose another output, or replace that one with --overwrite",
            )
        shutil.rmtree(self.working, ignore_errors=True)  # killed after the record was written
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
        """Write the files from finished arrays, then the record; the working arrays go.

        Args:
            arrays: the finished prediction.
            attributes: recipe and what else the record holds.
            image: what was predicted, of which NIfTI files take the affine.
            compress: whether TIFF pages are compressed; NIfTI goes by its name.
        """
        for target, path in self.files.items():
            # The format goes by the end of the name, so the mark of an unfinished file comes in front.
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
        # Half removed it must not say that blocks are finished.
        (self.working / STATE_FOLDER / LOG).unlink(missing_ok=True)
        shutil.rmtree(self.working)


def slabs(arrays: ZarrOutput, target: str) -> Iterator[np.ndarray]:
    """Yield an array's slabs along the first spatial axis, channel by channel: (depth, *rest)."""
    depth = arrays.block_shape[0]
    rest = tuple(slice(0, n) for n in arrays.shape[1:])
    for channel in range(arrays.stored[target].channels):
        for start in range(0, arrays.shape[0], depth):
            box = (slice(start, min(start + depth, arrays.shape[0])), *rest)
            yield arrays.read(target, box)[channel]


def write_tiff(path: Path, arrays: ZarrOutput, target: str, *, compress: bool, identity: str) -> None:
    """Write a target as OME-TIFF, axes (C)ZYX or (C)YX; BigTIFF above 4 GB.

    The voxel size stands in the OME-XML, and that of a pixel in the resolution tags too, for programs without OME.

    Args:
        path: the file.
        arrays: the finished prediction.
        target: which of its targets.
        compress: whether pages are compressed.
        identity: text of which the file's UUID is made, so that the same prediction gives the same bytes.
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
    """Return the type of a file's values: OME-TIFF and NIfTI know no float16."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _physical_sizes(arrays: ZarrOutput) -> dict[str, Any]:
    """Return the voxel size as OME-XML has it; without a unit it counts in pixels, and not in micrometers."""
    found: dict[str, Any] = {}
    for axis, size in zip("ZYX"[-len(arrays.shape) :], arrays.spacing, strict=True):
        found[f"PhysicalSize{axis}"] = size
        found[f"PhysicalSize{axis}Unit"] = OME_SYMBOLS.get(arrays.unit or "", "pixel")
    return found


def _resolution(arrays: ZarrOutput) -> dict[str, Any]:
    """Return the resolution tags: pixels per centimetre, where the unit is known."""
    centimetres = None if arrays.unit is None else factor(arrays.unit, "centimeter")
    if centimetres is None:
        return {}
    height, width = (1.0 / (size * centimetres) for size in arrays.spacing[-2:])
    if max(height, width) >= 1 << 31:
        return {}  # more than a tag can hold: voxels of a few picometers
    return {"resolution": (width, height), "resolutionunit": "CENTIMETER"}


def write_nifti(path: Path, arrays: ZarrOutput, target: str, affine: np.ndarray | None) -> None:
    """Write a target as NIfTI, axes (X, Y, Z[, C]), with the image's affine moved to the region's start.

    An image without an affine gives its voxel size and the place of its first voxel. Units that NIfTI does not know
    become micrometers, or millimeters above 100 of them.
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
            # C order over (Z, Y, X) is the file's Fortran order over (X, Y, Z).
            stream.write(np.ascontiguousarray(slab, dtype=dtype).tobytes())


def _nifti_unit(arrays: ZarrOutput) -> tuple[str, float]:
    """Return NIfTI's name of a unit, and by what sizes in the arrays' unit are multiplied to be in it."""
    known = {"meter": "meter", "millimeter": "mm", "micrometer": "micron"}
    unit = arrays.unit
    if unit is None:
        return "unknown", 1.0
    if unit in known:
        return known[unit], 1.0
    by = factor(unit, "micrometer")
    if by is None:
        return "unknown", 1.0
    if min(arrays.spacing) * by > 100:
        return "mm", float(factor(unit, "millimeter") or 1)
    return "micron", by


@contextmanager
def open_plain(path: Path) -> Iterator[Any]:
    """Open a file to write, through gzip if its name ends so; the same content gives the same bytes."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed:
                yield packed
        else:
            yield raw
