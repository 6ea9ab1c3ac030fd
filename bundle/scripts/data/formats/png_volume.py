"""PNG images: one decoded block each, for nothing of a PNG can be read without what comes before it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from volumen.data.block_cache import BLOCKS
from volumen.data.fingerprints import file_fingerprint
from volumen.data.formats.axes import map_axes
from volumen.data.formats.detection import PNG_MAGIC
from volumen.data.formats.volumes import LazyVolume, Region
from volumen.utils.errors import VolumenError

_PALETTE = 3
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Samples per voxel, by the colour type: grey, RGB, grey with alpha, RGB with alpha."""


@dataclass(frozen=True)
class _Header:
    """What the first chunk of a PNG file says."""

    height: int
    width: int
    channels: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height, self.width, self.channels)[: 2 + (self.channels > 1)]


class PngVolume(LazyVolume):
    """A PNG image of 8 or 16 bits, in grey or colours; alpha is a channel like others."""

    def __init__(self, path: Path, header: _Header, axes: str | None, ndim: int | None) -> None:
        known = "yxc"[: len(header.shape)]
        axis_map = map_axes(path, header.shape, known=known, requested=axes, ndim=ndim)
        super().__init__(str(path), axis_map, header.dtype)
        status = path.stat()
        self._stamp = (str(path), status.st_size, status.st_mtime_ns)

    def _open(self) -> Path:
        return Path(self.path)

    def _read_stored(self, region: Region) -> np.ndarray:
        return np.array(BLOCKS.get(self._stamp, partial(self._decode, self.handle))[region])

    def _decode(self, path: Path) -> np.ndarray:
        import imagecodecs

        try:
            image = imagecodecs.png_decode(path.read_bytes())
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise VolumenError(path, f"cannot be read ({reason})", remedy="copy it again") from error
        shape = self.axis_map.stored_shape
        if image.ndim == 3 and image.shape[2] == self.channels + 1:
            image = image[..., : self.channels]  # the last tells a colour that counts as transparent
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


def open_png(path: Path, *, axes: str | None = None, ndim: int | None = None) -> PngVolume:
    """Open a PNG image. It has no spacing: what PNG says of pixels is meant for screens.

    Args:
        path: the file.
        axes: letters of the axes, "yx" or, for colours, "yxc".
        ndim: 2, where it is known.

    Raises:
        VolumenError: no PNG, damaged, of fewer than 8 bits, with a palette, or the axes do not fit.
    """
    try:
        with path.open("rb") as file:
            head = file.read(33)
    except OSError as error:
        raise VolumenError(path, f"cannot be read ({error.strerror})", remedy="copy it again") from error
    return PngVolume(path, _header(path, head), axes, ndim)


def _header(path: Path, head: bytes) -> _Header:
    kind, checksum = head[12:16], head[29:33]
    if head[:8] != PNG_MAGIC or kind != b"IHDR" or zlib.crc32(head[12:29]).to_bytes(4, "big") != checksum:
        raise VolumenError(path, "its PNG header is damaged or missing", remedy="copy it again")
    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
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
    return _Header(height, width, _CHANNELS[colour], np.dtype(f"u{bits // 8}"))
