"""Reads PNG images, each as one decoded block, since no part of a PNG can be decoded without the data before it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.caching.fingerprints import file_fingerprint
from volumen.data.formats.axes import map_axes
from volumen.data.formats.detection import PNG_MAGIC
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.utils.errors import VolumenError, file_fault

_PALETTE = 3
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Samples per voxel by colour type: grey, RGB, grey with alpha, RGB with alpha."""
_SAMPLES = {0: "grey", 2: "rgb", _PALETTE: "palette", 4: "grey+alpha", 6: "rgba"}
_FEW_BITS = (1, 2, 4)


@dataclass(frozen=True)
class _Header:
    """Content of the first chunk of a PNG file."""

    height: int
    width: int
    channels: int
    dtype: np.dtype
    samples: str = "grey"
    bits: int = 8

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height, self.width, self.channels)[: 2 + (self.channels > 1)]


class PngVolume(LazyVolume):
    """A PNG image of 8 or 16 bits, grey or coloured; alpha is a channel like any other.

    Labels may also have a palette, whose indices are read, or fewer bits. `samples` is the meaning of a voxel's values:
    "grey", "grey+alpha", "rgb", "rgba" or "palette".
    """

    def __init__(self, path: Path, header: _Header, axes: str | None, ndim: int | None) -> None:
        known = "yxc"[: len(header.shape)]
        axis_map = map_axes(path, header.shape, known=known, requested=axes, ndim=ndim)
        super().__init__(str(path), axis_map, header.dtype)
        self.samples, self._bits = header.samples, header.bits
        self.remark = _palette_remark(path) if header.samples == "palette" else ""
        status = path.stat()
        self._stamp = (str(path), status.st_size, status.st_mtime_ns)

    def _open(self) -> Path:
        return Path(self.path)

    def _read_stored(self, region: Region) -> np.ndarray:
        return np.array(BLOCKS.get(self._stamp, partial(self._decode, self.handle))[region])

    def _decode(self, path: Path) -> np.ndarray:
        import imagecodecs

        try:
            small = self.samples == "palette" or self._bits in _FEW_BITS
            image = _decode_numbers(path, self._bits) if small else imagecodecs.png_decode(path.read_bytes())
        except Exception as error:
            raise file_fault(error, path, "cannot be read", remedy="copy it again") from error
        shape = self.axis_map.stored_shape
        if image.ndim == 3 and image.shape[2] == self.channels + 1:
            image = image[..., : self.channels]  # tRNS: a transparent colour
        image = image.reshape(shape) if image.size == np.prod(shape) else image
        if image.shape != shape or image.dtype != self.dtype:
            raise VolumenError(
                path,
                expected=f"shape {shape} of {self.dtype}",
                found=f"{image.shape} of {image.dtype}",
                remedy="the file has changed: start again",
            )
        return image

    def fingerprint(self) -> str:
        """Return a hash of the file's size, modification time and first bytes."""
        return file_fingerprint(Path(self.path), self.shape, self.channels, self.dtype)


def open_png(
    path: Path, *, axes: str | None = None, ndim: int | None = None, labels: bool = False
) -> PngVolume:
    """Open a PNG image. It has no spacing, since the pixel size in PNG files describes screens.

    Args:
        path: the file.
        axes: letters of the axes, "yx" or, for colours, "yxc".
        ndim: 2, or None if it is not known.
        labels: whether palettes and fewer bits are accepted, which are read as numbers.

    Raises:
        VolumenError: the file is no PNG or damaged, an image has fewer than 8 bits or a palette, or the axes do not
        fit.
    """
    try:
        with path.open("rb") as file:
            head = file.read(33)
    except OSError as error:
        raise VolumenError(path, f"cannot be read ({error.strerror})", remedy="copy it again") from error
    return PngVolume(path, _header(path, head, labels), axes, ndim)


def _decode_numbers(path: Path, bits: int) -> np.ndarray:
    """Return the indices of a palette, or the grey levels 0, 1, ... of fewer than 8 bits: (Y, X) uint8."""
    from PIL import Image

    with Image.open(path) as image:
        values = np.asarray(image, np.uint8)
        if image.mode == "P" or bits not in _FEW_BITS:
            return values
        # Pillow stretches grey levels to 0 to 255, except those of one bit.
        return values if image.mode == "1" else values // (255 // (2**bits - 1))


def _palette_remark(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as image:
            table = np.reshape(image.getpalette("RGB") or [], (-1, 3))[:4].tolist()
    except Exception:  # logged when the file is read
        return ""
    shown = ", ".join(f"{number} for ({r}, {g}, {b})" for number, (r, g, b) in enumerate(table))
    return f"the numbers of its palette are read as label values: {shown}, ..."


def _header(path: Path, head: bytes, labels: bool) -> _Header:
    kind, checksum = head[12:16], head[29:33]
    if head[:8] != PNG_MAGIC or kind != b"IHDR" or zlib.crc32(head[12:29]).to_bytes(4, "big") != checksum:
        raise VolumenError(path, "its PNG header is damaged or missing", remedy="copy it again")
    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
    if labels and bits in (*_FEW_BITS, 8) and colour in ((_PALETTE,) if bits == 8 else (0, _PALETTE)):
        return _Header(height, width, 1, np.dtype(np.uint8), _SAMPLES[colour], bits)
    if colour == _PALETTE:
        raise VolumenError(
            path,
            expected="grey or RGB values",
            found="a PNG with a palette, whose values are numbers of colours",
            remedy="convert it to grey or RGB",
        )
    if bits not in (8, 16) or colour not in _CHANNELS:
        raise VolumenError(
            path, expected="8 or 16 bits", found=f"a PNG of {bits}", remedy="convert it to grey"
        )
    return _Header(height, width, _CHANNELS[colour], np.dtype(f"u{bits // 8}"), _SAMPLES[colour])
