"""Writes the files of a finished prediction, slab by slab, from its zarr arrays."""

from __future__ import annotations

import glob
import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import NAMESPACE_OID, uuid5

import numpy as np

from volumen.data.formats.extra.library import library
from volumen.data.formats.urls import is_url
from volumen.data.formats.webknossos.properties import PROPERTIES
from volumen.data.space.units import OME_SYMBOLS, factor
from volumen.inference.output.block_log import LOG, PROVENANCE, STATE_FOLDER, difference
from volumen.inference.output.file_formats import mrc
from volumen.inference.output.file_formats.hdf5 import write_hdf5
from volumen.inference.output.file_formats.neuroglancer_state import (
    BASE,
    LayerContent,
    layer,
    viewer_state,
)
from volumen.inference.output.file_formats.nrrd import write_nrrd
from volumen.inference.output.file_formats.precomputed import write_precomputed
from volumen.inference.output.file_formats.slabs import PARTIAL, slabs, wide
from volumen.inference.output.file_formats.webknossos import write_description, write_layer
from volumen.inference.output.ome_zarr import ZarrOutput, is_label_map
from volumen.inference.output.stored import OutputSpec
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import UNFINISHED, write_atomically

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

SUFFIXES = {
    ".tif": "tif",
    ".tiff": "tif",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".zarr": "zarr",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".mrc": "mrc",
    ".rec": "mrc",
    ".nrrd": "nrrd",
    ".precomputed": "precomputed",
    ".webknossos": "webknossos",
}
DEFAULT_SUFFIX = {
    "tif": ".tif",
    "nifti": ".nii.gz",
    "zarr": ".zarr",
    "hdf5": ".h5",
    "mrc": ".mrc",
    "nrrd": ".nrrd",
    "precomputed": ".precomputed",
    "webknossos": ".webknossos",
}
MULTISCALE = ("precomputed", "webknossos")
"""Formats with coarser levels, besides zarr."""
_LIBRARIES = {"hdf5": "h5py", "mrc": "mrcfile"}
"""Packages of the extra `formats` that write a format."""


def format_of(output: str, required: str | None) -> tuple[str, str]:
    """Return (format, suffix of the name or "") of an output.

    Args:
        output: path that the user gave.
        required: a key of `DEFAULT_SUFFIX`; None: from the name, zarr for a folder.

    Raises:
        VolumenError: the name has the suffix of another format than the required one.
    """
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if output.endswith(s)), "")
    named = SUFFIXES.get(suffix)
    if required and named and required != named:
        raise VolumenError(output, expected=f"a name for --format {required}", found=suffix)
    return required or named or "zarr", suffix


def check_export(kind: str, stored: Sequence[OutputSpec], output: str) -> None:
    """Refuse outputs that a format cannot hold, and formats whose package is missing, before anything is predicted.

    Args:
        kind: a key of `DEFAULT_SUFFIX`.
        stored: how the outputs are stored.
        output: the output, named in errors.

    Raises:
        VolumenError: names the first output that does not fit, and what does.
    """
    if kind in _LIBRARIES:
        library(_LIBRARIES[kind], output)
    for item in stored:
        if kind == "webknossos" and item.channels > 1:
            raise VolumenError(
                output,
                expected="outputs of one channel, since a layer of WEBKNOSSOS shows no others",
                found=f"{item.head.name} with {item.channels} channels",
                remedy="choose another --format, other --targets, or --dtype labels",
            )
        if kind == "mrc" and not mrc.holds(item.dtype, item.channels):
            several = f"{item.channels} channels" if item.channels > 1 else f"{item.dtype.name} values"
            raise VolumenError(
                output,
                expected="outputs of one channel and at most 16 bits, since MRC holds no others",
                found=f"{item.head.name} with {several}",
                remedy="choose --format hdf5, nrrd or zarr, or other --targets",
            )


class FileExport:
    """The files of one volume's prediction, and the `<name>.volumen.json` with their provenance.

    In a format of folders, each target is a folder; the layers of a WEBKNOSSOS dataset lie in one folder.

    Args:
        folder: folder of the files.
        name: start of the file names.
        names: targets.
        suffix: ".tif", ".nii", ...
        plain: whether the file name of a single target omits the target.
    """

    def __init__(self, folder: Path, name: str, names: tuple[str, ...], suffix: str, *, plain: bool) -> None:
        bare = plain and len(names) == 1
        self.kind = SUFFIXES[suffix]
        self.dataset = folder / f"{name}{suffix}" if self.kind == "webknossos" else None
        if self.dataset is not None:
            self.files = {target: self.dataset / target for target in names}
        else:
            self.files = {
                target: folder / (f"{name}{suffix}" if bare else f"{name}_{target}{suffix}")
                for target in names
            }
        self.sidecar = folder / f"{name}.volumen.json"
        self.state = folder / f"{name}.neuroglancer.json" if self.kind == "precomputed" else None
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
        for name in (*old["files"], *([self.state.name] if self.state else [])):
            _remove(self.sidecar.parent / name)
        if self.dataset is not None:
            (self.dataset / PROPERTIES).unlink(missing_ok=True)
        self.sidecar.unlink()
        return False

    def write(
        self,
        arrays: ZarrOutput,
        attributes: Mapping[str, Any],
        *,
        image: Volume,
        compress: str,
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Write the files from finished arrays, then the record, and remove the working arrays.

        Args:
            arrays: the finished prediction.
            attributes: the provenance and other entries of the record.
            image: the predicted image; NIfTI and NRRD files have its affine.
            compress: compression of zarr arrays, or "none"; other formats are compressed in their own way unless it is
                "none". The suffix decides it for NIfTI, and MRC has no compression.
            classes: names of the classes by target.
        """
        packed = compress != "none"
        if self.dataset is not None:
            self.dataset.mkdir(exist_ok=True)
        for target, path in self.files.items():
            partial = path.with_name(f"{PARTIAL}{path.name}")
            _remove(partial)
            if self.kind == "tif":
                made_by = f"{json.dumps(attributes, sort_keys=True)} {target}"
                write_tiff(partial, arrays, target, compress=packed, identity=made_by)
            elif self.kind == "hdf5":
                write_hdf5(partial, arrays, target, compress=packed)
            elif self.kind == "mrc":
                mrc.write_mrc(partial, arrays, target)
            elif self.kind == "nrrd":
                write_nrrd(partial, arrays, target, image.affine, compress=packed)
            elif self.kind == "precomputed":
                names = (classes or {}).get(target)
                write_precomputed(partial, arrays, target, compress=packed, classes=names)
            elif self.kind == "webknossos":
                write_layer(partial, arrays, target, compress=compress)
            else:
                write_nifti(partial, arrays, target, image.affine)
            if path.is_dir():
                _remove(path)  # of a run that was interrupted; a folder cannot be replaced
            partial.replace(path)
        if self.dataset is not None:
            write_description(self.dataset, arrays, list(self.files.values()))
        if self.state is not None:
            write_atomically(self.state, json.dumps(self._viewer_state(arrays, image), indent=1).encode())
        for leftover in self.sidecar.parent.glob(f".{glob.escape(self.sidecar.name)}{UNFINISHED[1:]}"):
            leftover.unlink(missing_ok=True)
        record = {**attributes, "files": [self._relative(path) for path in self.files.values()]}
        write_atomically(self.sidecar, json.dumps(record, indent=1).encode())
        # The log first: after an interrupted removal it must not list blocks whose files no longer exist.
        (self.working / STATE_FOLDER / LOG).unlink(missing_ok=True)
        shutil.rmtree(self.working)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.sidecar.parent).as_posix()

    def _viewer_state(self, arrays: ZarrOutput, image: Volume) -> dict[str, Any]:
        """Return a state of Neuroglancer with the image, if it can be opened there, and every target over it."""
        layers = []
        if (source := _source_of(image, self.sidecar.parent)) is not None:
            layers.append(layer("image", source, LayerContent("image", image.channels)))
        for target, path in self.files.items():
            stored = arrays.stored[target]
            kind = "labels" if is_label_map(stored) else stored.head.kind
            content = LayerContent(kind, stored.channels, 255 if stored.dtype == np.uint8 else 1)
            layers.append(layer(target, f"precomputed://{BASE}/{quote(path.name)}", content))
        return viewer_state(layers, arrays.spacing, arrays.unit)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _source_of(image: Volume, folder: Path) -> str | None:
    """Return the source of an image for Neuroglancer: its URL, or its place in the served folder; None if neither."""
    kind = {"ZarrVolume": "zarr", "PrecomputedVolume": "precomputed", "N5Volume": "n5"}.get(
        type(image).__name__
    )
    if kind is None:
        return None
    if is_url(image.source):
        return f"{kind}://{image.source}"
    inside = os.path.relpath(image.source, folder)
    return None if inside.startswith("..") else f"{kind}://{BASE}/{quote(Path(inside).as_posix())}"


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
    dtype = wide(stored.dtype)
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
    dtype = wide(stored.dtype)
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
