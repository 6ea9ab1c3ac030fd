"""Reading windows: chunks decoded once while they are needed, empty windows found, bad chunks handled."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from scripts.errors import VolumenError
from scripts.inference.windows import Box, PredictPlan

if TYPE_CHECKING:
    from scripts.data.volumes import Volume

logger = logging.getLogger(__name__)

Region = tuple[slice, ...]


class ChunkCache:
    """Reads regions of a volume and keeps the chunks read last, so that neighbours do not decode them again.

    Args:
        volume: what is read.
        budget: bytes of chunks to keep. Chunks above a quarter of it are not kept: the volume's own
            reader (a memory map, an array in memory) serves every region then.
        on_corrupt: "stop" or "skip".
    """

    def __init__(self, volume: Volume, budget: int, on_corrupt: str = "stop") -> None:
        self.volume = volume
        self.on_corrupt = on_corrupt
        self.corrupt: list[Box] = []
        chunk_bytes = math.prod(volume.chunks) * volume.channels * np.dtype(volume.dtype).itemsize
        self._capacity = max(budget // max(chunk_bytes, 1), 8)
        self._cached = 4 * chunk_bytes <= budget
        self._chunks: OrderedDict[tuple[int, ...], Future[np.ndarray | None]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, region: Region) -> tuple[np.ndarray, list[Region]]:
        """Return a region (C, *region) and the parts of it, local to it, that could not be read (0 there).

        Raises:
            VolumenError: a chunk cannot be read and `on_corrupt` is "stop".
        """
        if not self._cached:
            values = self._load(region)
            if values is not None:
                return values, []
            shape = (self.volume.channels, *(part.stop - part.start for part in region))
            return np.zeros(shape, self.volume.dtype), [tuple(slice(0, n) for n in shape[1:])]
        return self._assemble(region)

    def _assemble(self, region: Region) -> tuple[np.ndarray, list[Region]]:
        sizes = tuple(part.stop - part.start for part in region)
        values = np.zeros((self.volume.channels, *sizes), self.volume.dtype)
        bad = []
        chunks = self.volume.chunks
        ranges = [range(p.start // c, (p.stop - 1) // c + 1) for p, c in zip(region, chunks, strict=True)]
        for index in itertools.product(*ranges):
            chunk = self._chunk(index)
            here, there = [], []
            for i, c, part in zip(index, chunks, region, strict=True):
                low, high = max(i * c, part.start), min((i + 1) * c, part.stop)
                here.append(slice(low - part.start, high - part.start))
                there.append(slice(low - i * c, high - i * c))
            if chunk is None:
                bad.append(tuple(here))
            else:
                values[(slice(None), *here)] = chunk[(slice(None), *there)]
        return values, bad

    def _chunk(self, index: tuple[int, ...]) -> np.ndarray | None:
        with self._lock:
            known = self._chunks.get(index)
            if known is not None:
                self._chunks.move_to_end(index)
            else:
                mine: Future[np.ndarray | None] = Future()
                self._chunks[index] = mine
                while len(self._chunks) > self._capacity:
                    self._chunks.popitem(last=False)
        if known is not None:
            return known.result()
        region = tuple(
            slice(i * c, min((i + 1) * c, n))
            for i, c, n in zip(index, self.volume.chunks, self.volume.shape, strict=True)
        )
        try:
            mine.set_result(self._load(region))
        except BaseException as error:
            mine.set_exception(error)
            raise
        return mine.result()

    def _load(self, region: Region) -> np.ndarray | None:
        try:
            return self.volume.read(region)
        except Exception as error:  # every codec has its own errors for damaged bytes
            box = tuple((part.start, part.stop) for part in region)
            if self.on_corrupt == "stop":
                raise VolumenError(
                    self.volume.path,
                    f"cannot read voxels {_told(box)} ({type(error).__name__}: {error})",
                    remedy="repair the file, or leave such chunks empty with --on-corrupt skip",
                ) from error
            logger.warning("%s: skipping voxels %s (%s)", self.volume.path, _told(box), error)
            with self._lock:
                if box not in self.corrupt:
                    self.corrupt.append(box)
            return None


def _told(box: Box) -> str:
    return " x ".join(f"{start}:{stop}" for start, stop in box)


class WindowReader:
    """Gives normalised windows of a volume, or None where there is nothing to predict.

    A window is skipped when the mask has no voxel in it, or when every channel of the image is constant in
    it: without contrast there is nothing to see. What cannot be read or lies outside is 0 after
    normalisation.

    Args:
        volume: the image.
        plan: windows and blocks.
        normalizer: maps a raw image (C, *space) to float32.
        mask: volume of the image's shape, predicted where it is not 0; None for everywhere.
        skip_empty: whether windows without contrast are skipped.
        on_corrupt: "stop" or "skip".
        budget: bytes of decoded chunks to keep.
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
        budget: int = 1 << 25,
    ) -> None:
        self.plan = plan
        self.image = ChunkCache(volume, budget, on_corrupt)
        self.mask = None if mask is None else ChunkCache(mask, budget, "stop")
        self._normalizer = normalizer
        self._skip_empty = skip_empty

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
        if self.mask is not None and not self.mask.read(region)[0].any():
            return None
        raw, bad = self.image.read(region)
        if self._skip_empty and not _has_contrast(raw):
            return None
        values = self._normalizer(raw)
        np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        for part in bad:
            values[(slice(None), *part)] = 0
        if values.shape[1:] == patch:
            return values
        window = np.zeros((len(values), *patch), dtype=np.float32)
        inside = tuple(slice(r.start - s, r.stop - s) for r, s in zip(region, start, strict=True))
        window[(slice(None), *inside)] = values
        return window

    def empty_parts(self, box: Region) -> list[Region]:
        """Return the parts of a block, local to it, that could not be read.

        Args:
            box: the block's place in the output.
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
        """Return where the mask excludes a block's voxels: bool (*block), or None without a mask."""
        if self.mask is None:
            return None
        region = tuple(
            slice(part.start + low, part.stop + low)
            for part, (low, _) in zip(box, self.plan.box, strict=True)
        )
        return np.asarray(~self.mask.read(region)[0].any(axis=0))


def _has_contrast(raw: np.ndarray) -> bool:
    first = raw.reshape(len(raw), -1)[:, :1]
    # Two steps: nearly every window with content shows it in its first plane.
    if (raw[:, 0].reshape(len(raw), -1) != first).any():
        return True
    return bool((raw.reshape(len(raw), -1) != first).any())
