"""TIFF and NIfTI files of a finished prediction, written slab by slab from its zarr arrays."""

from __future__ import annotations

import glob
import gzip
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from volumen.inference.output.block_log import LOG, RECIPE, STATE_FOLDER, difference
from volumen.inference.output.ome_zarr import ZarrOutput
from volumen.utils.atomic import UNFINISHED, write_atomically
from volumen.utils.errors import VolumenError

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
        affine: np.ndarray | None,
        compress: bool,
    ) -> None:
        """Write the files from finished arrays, then the record; the working arrays go.

        Args:
            arrays: the finished prediction.
            attributes: recipe and what else the record holds.
            affine: NIfTI affine of the image, or None.
            compress: whether TIFF pages are compressed; NIfTI goes by its name.
        """
        for target, path in self.files.items():
            # The format goes by the end of the name, so the mark of an unfinished file comes in front.
            partial = path.with_name(f".partial-{path.name}")
            if path.suffix in (".tif", ".tiff"):
                write_tiff(partial, arrays, target, compress=compress)
            else:
                write_nifti(partial, arrays, target, affine)
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


def write_tiff(path: Path, arrays: ZarrOutput, target: str, *, compress: bool) -> None:
    """Write a target as TIFF pages, axes (C)ZYX or (C)YX; BigTIFF above 4 GB."""
    import tifffile

    stored = arrays.stored[target]
    shape: tuple[int, ...] = (*((stored.channels,) if stored.channels > 1 else ()), *arrays.shape)
    axes = "CZYX"[-len(shape) :] if len(arrays.shape) == 3 else "CYX"[-len(shape) :]

    def pages() -> Iterator[np.ndarray]:
        if len(arrays.shape) == 2:
            for channel in range(stored.channels):
                yield arrays.read(target, tuple(slice(0, n) for n in arrays.shape))[channel]
            return
        for slab in slabs(arrays, target):
            yield from slab

    size = int(np.prod(shape)) * stored.dtype.itemsize
    tifffile.imwrite(
        path,
        pages(),
        shape=shape,
        dtype=stored.dtype,
        photometric="minisblack",
        bigtiff=size > 3 << 30,
        compression="zlib" if compress else None,
        metadata={"axes": axes, "spacing": list(arrays.spacing), "unit": arrays.unit},
    )


def write_nifti(path: Path, arrays: ZarrOutput, target: str, affine: np.ndarray | None) -> None:
    """Write a target as NIfTI, axes (X, Y, Z[, C]), with the image's affine moved to the region's start."""
    import nibabel

    stored = arrays.stored[target]
    dtype = np.dtype(np.float32) if stored.dtype == np.float16 else stored.dtype
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    space = arrays.shape[::-1]
    channels = (stored.channels,) if stored.channels > 1 else ()
    header.set_data_shape((*space, *([1] * (3 - len(space))), *channels))
    if affine is None:
        affine = np.diag([*arrays.spacing[::-1], *([1.0] * (4 - len(space)))])
        affine[3, 3] = 1.0
    moved = affine.astype(np.float64)
    moved[:3, 3] += moved[:3, : len(space)] @ np.array(arrays.origin[::-1], dtype=np.float64)
    header.set_sform(moved, code=2)
    header.set_qform(moved, code=2)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    with open_plain(path) as stream:
        header.write_to(stream)
        for slab in slabs(arrays, target):
            # C order over (Z, Y, X) is the file's Fortran order over (X, Y, Z).
            stream.write(np.ascontiguousarray(slab, dtype=dtype).tobytes())


@contextmanager
def open_plain(path: Path) -> Iterator[Any]:
    """Open a file to write, through gzip if its name ends so; the same content gives the same bytes."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed:
                yield packed
        else:
            yield raw
