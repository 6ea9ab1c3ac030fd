"""Reads windows: decodes each chunk once, detects empty windows, and handles unreadable chunks."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from volumen.data.damage import UNREADABLE
from volumen.data.validity import inside_mask
from volumen.inference.windows.plan import Box, PredictPlan
from volumen.utils.boxes import box_of, box_text
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

logger = logging.getLogger(__name__)

Region = tuple[slice, ...]


class RegionReader:
    """Reads regions of a volume and handles chunks that cannot be read.

    The volumes themselves cache decoded chunks (`volumen.data.caching.block_cache`).

    Args:
        volume: the volume.
        on_corrupt: "stop" or "skip".
        on_note: called once with each box that could not be read, in voxels of the volume.
    """

    def __init__(
        self, volume: Volume, on_corrupt: str = "stop", on_note: Callable[[Box], None] | None = None
    ) -> None:
        self.volume = volume
        self._on_note = on_note
        self.on_corrupt = on_corrupt
        self.corrupt: list[Box] = []
        self._lock = threading.Lock()

    def read(self, region: Region) -> tuple[np.ndarray, list[Region]]:
        """Return a region (C, *region) and its unreadable parts, as slices relative to it; their values are 0.

        Raises:
            VolumenError: a chunk cannot be read and `on_corrupt` is "stop".
        """
        try:
            return self.volume.read(region), []
        except UNREADABLE as error:
            if self.on_corrupt == "stop":
                raise VolumenError(
                    self.volume.path,
                    f"cannot read voxels {box_text(box_of(region))}: {error}",
                    remedy="or leave such chunks empty with --on-corrupt skip",
                ) from error
        return self._read_chunk_by_chunk(region)

    def _read_chunk_by_chunk(self, region: Region) -> tuple[np.ndarray, list[Region]]:
        volume = self.volume
        shape = (volume.channels, *(part.stop - part.start for part in region))
        values, bad = np.zeros(shape, volume.dtype), []
        grid = [
            range(p.start // c, (p.stop - 1) // c + 1) for p, c in zip(region, volume.chunks, strict=True)
        ]
        for index in itertools.product(*grid):
            chunk = tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(index, volume.chunks, volume.shape, strict=True)
            )
            inside = tuple(
                slice(max(c.start, p.start), min(c.stop, p.stop)) for c, p in zip(chunk, region, strict=True)
            )
            local = tuple(
                slice(i.start - p.start, i.stop - p.start) for i, p in zip(inside, region, strict=True)
            )
            try:
                values[(slice(None), *local)] = volume.read(inside)
            except UNREADABLE as error:
                self._note(box_of(chunk), error)
                bad.append(local)
        return values, bad

    def _note(self, box: Box, error: Exception) -> None:
        with self._lock:
            if box not in self.corrupt:
                self.corrupt.append(box)
                if self._on_note is not None:
                    self._on_note(box)
                logger.warning("%s: leaving voxels %s empty: %s", self.volume.path, box_text(box), error)


def cache_bytes(volume: Volume, patch_size: tuple[int, ...], least: int, most: int) -> int:
    """Return the memory for decoded chunks that a row of windows needs so as to decode each chunk only once.

    Args:
        volume: the volume.
        patch_size: shape of a window.
        least: smallest result, in bytes.
        most: largest result; if the chunks need more, they are decoded repeatedly.
    """
    chunk = math.prod(volume.chunks) * volume.channels * np.dtype(volume.dtype).itemsize
    touched = math.prod(
        min(-(-p // c) + 1, -(-n // c))
        for p, c, n in zip(patch_size, volume.chunks, volume.shape, strict=True)
    )
    # The cache stores no chunk that is larger than half the cache.
    needed = max(chunk * touched, 2 * chunk)
    if needed > most:
        logger.warning(
            "%s: a window needs %d MB of stored chunks; rechunk it (for example to 128^3) for speed",
            volume.path,
            needed >> 20,
        )
    return min(max(needed, least), most)


class WindowReader:
    """Returns normalised windows of a volume, or None if there is nothing to predict.

    A window is skipped if the mask has no voxel in it, or if every channel of the image is constant in it. Outside the
    volume, the image is reflected, or 0 if the plan's rules say so; unreadable voxels have the mean of the other voxels
    of the window.

    Args:
        volume: the image.
        plan: windows and blocks.
        normalizer: maps a raw image (C, *space) to float32.
        mask: volume of the image's shape, whose voxels above 0 are predicted; None: all voxels.
        skip_empty: whether windows without contrast are skipped.
        on_corrupt: "stop" or "skip".
        on_note: called once with each box of the image that could not be read.
        nonfinite: "zero" makes NaN and infinity 0 after normalisation, with one warning; "refuse" stops.
    """

    def __init__(
        self,
        volume: Volume,
        plan: PredictPlan,
        normalizer: Callable[[np.ndarray], np.ndarray],
        *,
        mask: Volume | None = None,
        skip_empty: bool = True,
        on_corrupt: str = "stop",
        on_note: Callable[[Box], None] | None = None,
        nonfinite: str = "zero",
    ) -> None:
        self.plan = plan
        self.image = RegionReader(volume, on_corrupt, on_note)
        self.mask = None if mask is None else RegionReader(mask, "stop")
        self._normalizer = normalizer
        self._skip_empty = skip_empty
        self._nonfinite = nonfinite
        self._warned = False

    @property
    def corrupt(self) -> list[Box]:
        """Boxes of the image that could not be read, in order."""
        return sorted(self.image.corrupt)

    def window(self, position: int) -> np.ndarray | None:
        """Return the window at a position of the plan's order: float32 (C, *patch), or None to skip it."""
        start, patch = self.plan.start(position), self.plan.patch_size
        region = tuple(
            slice(max(s, 0), min(s + p, n)) for s, p, n in zip(start, patch, self.plan.shape, strict=True)
        )
        if self.mask is not None and not inside_mask(self.mask.read(region)[0]).any():
            return None
        raw, bad = self.image.read(region)
        nonfinite = self._not_finite(raw, region)
        if self._skip_empty and not (_has_contrast(raw) if nonfinite is None else (~nonfinite).any()):
            return None
        values = self._normalizer(raw)
        if nonfinite is not None:
            values[nonfinite] = 0
        _fill_with_mean(values, bad)
        starts = [s - r.start for s, r in zip(start, region, strict=True)]
        return self.plan.rules.pad(values, starts, patch)

    def _not_finite(self, raw: np.ndarray, region: Region) -> np.ndarray | None:
        """Return where values are NaN or infinite, bool with the shape of `raw`; None if all are finite.

        Raises:
            VolumenError: there are such values, and the setting refuses them.
        """
        if raw.dtype.kind != "f":
            return None
        finite = np.isfinite(raw)
        if finite.all():
            return None
        count = raw.size - int(finite.sum())
        first = np.argwhere(~finite)[0][1:] + [part.start for part in region]
        place = tuple(int(i) for i in first)
        path = self.image.volume.path
        if self._nonfinite == "refuse":
            raise VolumenError(
                path,
                expected="finite intensities",
                found=f"{count} NaN or infinite values in a window, the first at {place}",
                remedy="repair the image, or count them as 0 with --nonfinite zero",
            )
        if not self._warned:
            self._warned = True
            logger.warning("%s: NaN or infinite values, such as at %s, count as 0", path, place)
        return ~finite

    def empty_parts(self, box: Region) -> list[Region]:
        """Return the unreadable parts of a block, as slices relative to it.

        Args:
            box: the block's region in the output.
        """
        low = [start for start, _ in self.plan.box]
        parts = []
        for bad in self.corrupt:
            local = tuple(
                slice(max(b0 - s - o.start, 0), min(b1 - s, o.stop) - o.start)
                for (b0, b1), s, o in zip(bad, low, box, strict=True)
            )
            if all(part.stop > part.start for part in local):
                parts.append(local)
        return parts

    def masked_out(self, box: Region) -> np.ndarray | None:
        """Return the voxels of a block that the mask excludes: bool (*block), or None without a mask."""
        if self.mask is None:
            return None
        region = tuple(
            slice(part.start + low, part.stop + low)
            for part, (low, _) in zip(box, self.plan.box, strict=True)
        )
        return ~inside_mask(self.mask.read(region)[0])


def _fill_with_mean(values: np.ndarray, bad: Sequence[Region]) -> None:
    """Fill the unreadable parts of a window (C, *space) with the mean of its other voxels, which keeps its mean."""
    if not bad:
        return
    readable = np.ones(values.shape[1:], bool)
    for part in bad:
        readable[part] = False
    for channel in values:
        channel[~readable] = channel[readable].mean() if readable.any() else 0


def _has_contrast(raw: np.ndarray) -> bool:
    first = raw.reshape(len(raw), -1)[:, :1]
    # The first plane is tested first, since nearly every window with contrast has some there.
    if (raw[:, 0].reshape(len(raw), -1) != first).any():
        return True
    return bool((raw.reshape(len(raw), -1) != first).any())
