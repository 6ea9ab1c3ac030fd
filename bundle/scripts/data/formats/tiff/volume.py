"""Reads regions of TIFF images and stacks: bytes if voxels are contiguous, else strips or tiles."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import file_fingerprint
from volumen.data.formats.axes import AxisMap, map_axes
from volumen.data.formats.raw_file import read_raw, too_short
from volumen.data.formats.tiff.metadata import tiff_geometry
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.utils.errors import VolumenError, file_fault
from volumen.utils.files.positioned_io import read_at

logger = logging.getLogger(__name__)

_LETTERS = {"S": "c", "I": "?", "Q": "?"}
"""Meaning of tifffile's axes: samples are channels; plain pages (I) and unnamed axes (Q) are undetermined."""


def _samples(keyframe: Any) -> str:
    """Return the meaning of a voxel's values: "grey", "min-is-white", "palette", "rgb", "rgba" or "grey+alpha"."""
    photometric, extra = int(keyframe.photometric), len(keyframe.extrasamples)
    if photometric == 2:
        return "rgba" if extra else "rgb"
    if photometric in (0, 1) and extra and keyframe.samplesperpixel == 2:
        return "grey+alpha"
    return {0: "min-is-white", 3: "palette"}.get(photometric, "grey")


@dataclass
class _OpenTiff:
    """An open file: tifffile's view of its first series, and the file for reads at an offset."""

    tiff: Any
    series: Any
    file: BinaryIO

    def __del__(self) -> None:
        self.file.close()
        self.tiff.close()


class TiffVolume(LazyVolume):
    """The first series of a TIFF file; only the strips, tiles or bytes of the region are read."""

    def __init__(self, path: Path, series: Any, stored: _SeriesArray, axis_map: AxisMap) -> None:
        super().__init__(
            str(path),
            axis_map,
            series.dtype,
            chunks=axis_map.of_space(stored.blocks),
            geometry=tiff_geometry(series.parent, axis_map),
        )
        self.samples = _samples(series.keyframe)
        palette = "the numbers of its palette are read as label values"
        self.remark = palette if self.samples == "palette" else ""
        self._offset = series.dataoffset
        self._outer = stored.outer
        self._stored_dtype = np.dtype(series.dtype).newbyteorder(series.parent.byteorder)
        status = path.stat()
        self._bytes = status.st_size
        self._stamp = (str(path), status.st_size, status.st_mtime_ns)

    def _open(self) -> _OpenTiff:
        path = Path(self.path)
        tiff = _tiff_file(path)
        return _OpenTiff(tiff, tiff.series[0], path.open("rb"))

    def _read_stored(self, region: Region) -> np.ndarray:
        shape = self.axis_map.stored_shape
        if self._offset is not None:
            return self._read_raw(self._offset, shape, region)
        outer = len(self._outer)
        result = np.empty([part.stop - part.start for part in region], self.dtype)
        places = [range(part.start, part.stop) for part in region[:outer]]
        plan = _plan(self._page(0)[1], region[outer:])
        for into, index in zip(np.ndindex(result.shape[:outer]), product(*places)):
            page = int(np.ravel_multi_index(index, self._outer)) if outer else 0
            self._read_page(page, shape[outer:], region[outer:], plan, result[into])
        return result

    def _read_raw(self, offset: int, shape: tuple[int, ...], region: Region) -> np.ndarray:
        handle = self.handle  # a reference, since other threads may release it
        return read_raw(handle.file, offset, shape, self._stored_dtype, region)

    def _read_page(
        self, number: int, shape: tuple[int, ...], region: Region, plan: _Plan, out: np.ndarray
    ) -> None:
        page, keyframe = self._page(number)
        if keyframe.is_final and _is_contiguous(page):
            out[...] = self._read_raw(page.dataoffsets[0], shape, region)
            return
        view = out.reshape(plan.shape)
        for segment, source, target in plan.copies:
            key = (self._stamp, number, segment)
            block = BLOCKS.get(key, partial(self._decode, page, keyframe, number, segment))
            view[target] = block[source]

    def _page(self, number: int) -> tuple[Any, Any]:
        handle = self.handle
        with self._lock:
            page = handle.series.pages[number]
        if page is None:
            raise VolumenError(self.path, f"lacks page {number}", remedy="write it again")
        return page, page.keyframe

    def _decode(self, page: Any, keyframe: Any, number: int, segment: int) -> np.ndarray:
        """Read and decode one strip or tile, as (separate samples, depth, length, width, samples)."""
        if segment >= min(len(page.dataoffsets), len(page.databytecounts)):
            raise VolumenError(
                self.path,
                expected=f"at least {segment + 1} strips or tiles in page {number}",
                found=f"{min(len(page.dataoffsets), len(page.databytecounts))}",
                remedy="copy or write it again",
            )
        offset, count = page.dataoffsets[segment], page.databytecounts[segment]
        handle = self.handle
        data = read_at(handle.file.fileno(), count, offset)
        if len(data) != count:
            raise too_short(self.path, offset + count, offset + len(data))
        try:
            decoded, _, shape = keyframe.decode(data or None, segment, jpegtables=page.jpegtables)
            if decoded is None:
                return np.full((1, *shape), keyframe.nodata, self.dtype)
            return np.array(decoded[tuple(slice(size) for size in shape)], self.dtype)[None]
        except Exception as error:
            kind = "tile" if keyframe.is_tiled else "strip"
            problem = f"{kind} {segment} of page {number} cannot be read"
            raise file_fault(error, self.path, problem, remedy="copy it again") from error

    def fingerprint(self) -> str:
        """Return a hash of the file's size, modification time and first bytes."""
        return file_fingerprint(Path(self.path), self.shape, self.channels, self.dtype)


def open_tiff(path: Path, *, axes: str | None = None, ndim: int | None = None) -> TiffVolume:
    """Open the first series of a TIFF file (TIFF, BigTIFF, ImageJ hyperstack, OME-TIFF).

    Args:
        path: the file.
        axes: letters of the axes in the order of tifffile's `imread`, without singletons; see `open_volume`.
        ndim: number of spatial axes, or None if it is not known. A plane is a volume of one slice where `ndim` is 3
            or `axes` has a z.

    Raises:
        VolumenError: the tags are damaged, the file is shorter than they state, or the axes are ambiguous.
    """
    with _tiff_file(path) as tiff:
        try:
            series = tiff.series[0]
            _check_pages(path, tiff)
            stored = _series_array(path, series)
            if ndim == 3 or "z" in (axes or "").lower():
                stored = _with_slices(stored)
            _check_size(path, series)
            volume = TiffVolume(path, series, stored, _map_stored(path, stored, axes, ndim))
        except VolumenError:
            raise
        except Exception as error:
            raise file_fault(error, path, "its TIFF tags are damaged", remedy="copy it again") from error
        if len(tiff.series) > 1:
            logger.warning("%s: only the first of its %d images is read", path, len(tiff.series))
        return volume


@dataclass(frozen=True)
class _SeriesArray:
    """The array of a series: axes over pages first, then axes inside a page.

    Args:
        shape: shape with all axes.
        letters: one letter per axis.
        visible: axes that a user sees; the others have one entry.
        outer: shape over pages.
        blocks: shape of a strip or tile, per axis.
    """

    shape: tuple[int, ...]
    letters: str
    visible: tuple[int, ...]
    outer: tuple[int, ...]
    blocks: tuple[int, ...]


def _series_array(path: Path, series: Any) -> _SeriesArray:
    if series.dtype is None or np.dtype(series.dtype).kind not in "biuf":
        raise VolumenError(
            path, expected="numbers", found=f"values of type {series.dtype}", remedy="convert it"
        )
    if series.is_multifile:
        raise VolumenError(
            path, expected="one file", found="an OME-TIFF over several files", remedy="merge it"
        )
    keyframe, shape, letters = series.keyframe, series.shape, series.axes
    # Whether `shape` has axes with one entry depends on the kind of file and the version of tifffile.
    named = {letter for size, letter in zip(shape, letters) if size > 1} | {"Y", "X"}
    if series.dataoffset is not None:
        outer: tuple[int, ...] = ()
        inner = len(letters)
    else:
        split = _split(path, shape, letters.index("Y"), len(series.pages), prod(keyframe.shape))
        outer, inner = shape[:split], len(keyframe.shape)
        shape, letters = outer + keyframe.shape, letters[:split] + keyframe.axes
    visible = tuple(i for i, letter in enumerate(letters) if shape[i] != 1 or letter in named)
    plane = _plane(keyframe)
    blocks = tuple(
        plane.get(letter, 1 if axis < len(letters) - inner or letter == "Z" else shape[axis])
        for axis, letter in enumerate(letters)
    )
    if series.dataoffset is not None:
        blocks = tuple(size if letter in "YXS" else 1 for size, letter in zip(shape, letters))
    return _SeriesArray(shape, "".join(_LETTERS.get(c, c.lower()) for c in letters), visible, outer, blocks)


def _with_slices(stored: _SeriesArray) -> _SeriesArray:
    """Return the array of a plane as one of a volume of one slice; any other array as it is."""
    visible = "".join(stored.letters[axis] for axis in stored.visible)
    if sorted(visible) not in (["x", "y"], ["c", "x", "y"]) or "?" in stored.letters:
        return stored
    if "z" in stored.letters:
        return replace(stored, visible=tuple(sorted({*stored.visible, stored.letters.index("z")})))
    return _SeriesArray(
        shape=(1, *stored.shape),
        letters="z" + stored.letters,
        visible=(0, *(axis + 1 for axis in stored.visible)),
        outer=(1, *stored.outer),
        blocks=(1, *stored.blocks),
    )


def _split(path: Path, shape: tuple[int, ...], last: int, pages: int, page_size: int) -> int:
    """Return the number of leading axes that run over pages."""
    for split in range(last, -1, -1):
        if prod(shape[:split]) == pages and prod(shape[split:]) == page_size:
            return split
    raise VolumenError(
        path, expected=f"pages that fill {shape}", found=f"{pages} pages", remedy="write it again"
    )


def _map_stored(path: Path, stored: _SeriesArray, axes: str | None, ndim: int | None) -> AxisMap:
    """Determine the meaning of the visible axes, and return them as axes of the stored array."""
    shape = [stored.shape[axis] for axis in stored.visible]
    letters = "".join(stored.letters[axis] for axis in stored.visible)
    if len(set(letters.replace("?", ""))) < len(letters.replace("?", "")):
        # A file of single voxels names an axis twice.
        letters = "?" * (len(letters) - 2) + "yx"
    seen = map_axes(path, shape, known=letters, requested=axes, ndim=ndim)
    spatial = tuple(stored.visible[axis] for axis in seen.spatial)
    return AxisMap(stored.shape, spatial, None if seen.channel is None else stored.visible[seen.channel])


def _plane(keyframe: Any) -> dict[str, int]:
    if keyframe.is_tiled:
        return {"Z": max(keyframe.tiledepth, 1), "Y": keyframe.tilelength, "X": keyframe.tilewidth}
    return {"Y": min(keyframe.rowsperstrip, keyframe.imagelength), "X": keyframe.imagewidth}


def _tiff_file(path: Path) -> Any:
    import tifffile

    try:
        return tifffile.TiffFile(path)
    except Exception as error:
        raise file_fault(error, path, "its TIFF tags cannot be read", remedy="copy it again") from error


def _check_pages(path: Path, tiff: Any) -> None:
    """Refuse a file whose list of pages does not end properly, since tifffile ignores the remaining pages."""
    count, last = len(tiff.pages), tiff.pages.next_page_offset
    with path.open("rb") as file:
        file.seek(last)
        following = file.read(tiff.tiff.offsetsize)
    if any(following) or len(following) != tiff.tiff.offsetsize:
        raise VolumenError(
            path, f"is truncated: its list of pages breaks off after {count}", remedy="copy or write it again"
        )


def _check_size(path: Path, series: Any) -> None:
    """Refuse a file that is shorter than its tags state."""
    found = path.stat().st_size
    if series.dataoffset is not None:
        needed = series.dataoffset + prod(series.shape) * np.dtype(series.dtype).itemsize
        if needed > found:
            raise too_short(path, needed, found)
        return
    for page in (series.pages[0], series.pages[-1]):
        if page is None:
            raise VolumenError(path, "lacks pages", remedy="copy or write it again")
        expected, counts = prod(page.keyframe.chunked), len(page.databytecounts)
        if counts < expected or len(page.dataoffsets) < expected:
            raise VolumenError(
                path,
                expected=f"{expected} strips or tiles for shape {page.keyframe.shape}",
                found=f"{counts}",
                remedy="copy or write it again",
            )
        needed = max(o + c for o, c in zip(page.dataoffsets, page.databytecounts))
        if needed > found:
            raise too_short(path, needed, found)
        raw = page.keyframe.nbytes
        if page.keyframe.is_final and sum(page.databytecounts) < raw:
            raise too_short(path, raw, sum(page.databytecounts))


def _is_contiguous(page: Any) -> bool:
    ends = [o + c for o, c in zip(page.dataoffsets, page.databytecounts)]
    return all(end == start for end, start in zip(ends, page.dataoffsets[1:]))


@dataclass(frozen=True)
class _Plan:
    """How to assemble a region of a page; it is the same for every page of a series.

    Args:
        shape: shape of the region in tifffile's five axes: separate samples, depth, length, width, samples.
        copies: number of each strip or tile, the part to copy, and its place in the region.
    """

    shape: tuple[int, ...]
    copies: list[tuple[int, Region, Region]]


def _plan(keyframe: Any, region: Region) -> _Plan:
    parts = _five(keyframe, region)
    separate, depth, length, width, samples = keyframe.shaped
    if keyframe.is_tiled:
        size = (1, max(keyframe.tiledepth, 1), keyframe.tilelength, keyframe.tilewidth)
    else:
        size = (1, 1, min(keyframe.rowsperstrip, length), width)
    counts = [-(-total // part) for total, part in zip((separate, depth, length, width), size)]
    copies = []
    for index in product(*(range(part.start // s, -(-part.stop // s)) for part, s in zip(parts, size))):
        corner = (*(i * s for i, s in zip(index, size)), 0)
        source, target = [], []
        for part, start, extent in zip(parts, corner, (*size, samples)):
            low, high = max(part.start, start), min(part.stop, start + extent)
            source.append(slice(low - start, high - start))
            target.append(slice(low - part.start, high - part.start))
        copies.append((int(np.ravel_multi_index(index, counts)), tuple(source), tuple(target)))
    return _Plan(tuple(part.stop - part.start for part in parts), copies)


def _five(keyframe: Any, region: Region) -> Region:
    """Return a region of a page in tifffile's five axes."""
    parts = dict(zip(keyframe.axes, region))
    one = slice(0, 1)
    samples = parts.get("S", one)
    separate = keyframe.planarconfig == 2
    return (
        samples if separate else one,
        parts.get("Z", one),
        parts["Y"],
        parts["X"],
        one if separate else samples,
    )
