"""Gaussian blending of overlapping windows, in memory that does not grow with the volume.

The weight of a window is a product of one Gaussian per axis (sigma one eighth of the patch, as in nnU-Net).
Windows lie on a regular grid, so that the sum of all weights at a voxel is a product as well: it is computed
from one vector per axis, and only the weighted values are accumulated.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from volumen.inference.windows.plan import PredictPlan
from volumen.utils.device import sent
from volumen.utils.files.positioned_io import read_into, write_at

SIGMA_SHARE = 0.125
"""Standard deviation of the importance weights as a share of the patch, per axis (Isensee et al. 2021)."""


def gaussian_axis(size: int, *, later_centre: bool = False) -> np.ndarray:
    """Return the importance weights along one axis: float32, shape (size,), highest in the middle.

    The weights lie in [exp(-8), 1], since the border is at most 4 sigma from the centre. They are never 0, so that
    the result is also defined at a voxel that only the corner of one window covers.

    Args:
        size: voxels of a window along the axis.
        later_centre: put the highest weight at the voxel after the middle of an even size.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    position = np.arange(size) - (size // 2 if later_centre else (size - 1) / 2)
    return np.exp(-0.5 * (position / (SIGMA_SHARE * size)) ** 2).astype(np.float32)


def gaussian_window(patch_size: tuple[int, ...], *, later_centre: bool = False) -> np.ndarray:
    """Return the importance weights of a window: float32, shape `patch_size`."""
    weights = np.ones((), dtype=np.float32)
    for size in patch_size:
        weights = np.multiply.outer(weights, gaussian_axis(size, later_centre=later_centre))
    return weights


def axis_weight_sums(plan: PredictPlan) -> tuple[np.ndarray, ...]:
    """Return, per axis, the sum of the weights of all windows at each voxel of the region (float32)."""
    sums = []
    for axis, (low, high) in enumerate(plan.box):
        weights = gaussian_axis(plan.patch_size[axis], later_centre=plan.rules.later_centre)
        weights = weights.astype(np.float64)
        total = np.zeros(high - low)
        for start in plan.starts[axis]:
            begin, end = max(start, low), min(start + len(weights), high)
            total[begin - low : end - low] += weights[begin - start : end - start]
        sums.append(total.astype(np.float32))
    return tuple(sums)


def divide_by_weights(values: Any, sums: tuple[np.ndarray, ...], box: tuple[slice, ...]) -> None:
    """Convert weighted sums to means in place.

    Args:
        values: weighted sums of a block, float32, shape (channels, *block), an array or a tensor.
        sums: the result of `axis_weight_sums`.
        box: region of the block in the output.
    """
    ndim = len(sums)
    for axis, total in enumerate(sums):
        shape = [1] * (ndim + 1)
        shape[axis + 1] = -1
        part: Any = total[box[axis]].reshape(shape)
        values /= part if isinstance(values, np.ndarray) else sent(part, values.device)


class SpillFile:
    """Stores blocks of equal size in a temporary file without a name, which the system deletes with the process.

    Args:
        folder: folder of the file; it should be on the disk of the output.
        shape: shape of a block, float32.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._nbytes = 4 * int(np.prod(shape))
        self._slots: dict[tuple[int, ...], int] = {}
        self._free: list[int] = []
        self._next = 0
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __contains__(self, block: object) -> bool:
        return block in self._slots

    def put(self, block: tuple[int, ...], values: np.ndarray) -> None:
        """Write one block (contiguous float32)."""
        slot = self._free.pop() if self._free else self._next
        self._next = max(self._next, slot + 1)
        view = memoryview(values.data).cast("B")
        offset = slot * self._nbytes
        while view:
            written = write_at(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written
        self._slots[block] = slot

    def take(self, block: tuple[int, ...]) -> np.ndarray:
        """Read one block and free its slot."""
        slot = self._slots.pop(block)
        values = np.empty(self._shape, dtype=np.float32)
        view = memoryview(values.data).cast("B")
        offset = slot * self._nbytes
        while view:
            count = read_into(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count
        self._free.append(slot)
        return values

    def close(self) -> None:
        self._file.close()


class BlockAccumulator:
    """Weighted sums of windows by output block; a block is returned after its last window.

    Windows are added in the order of the plan, so that the sums are bitwise the same even if a prediction is
    interrupted. At most `budget` bytes of blocks stay in memory (but at least the blocks of two windows); the least
    recently used ones are moved to a file.

    Args:
        plan: windows and blocks.
        channels: accumulated channels.
        budget: bytes of partial sums in memory.
        folder: folder for partial sums beyond the budget.
        done: blocks that are already finished, bool, shape `plan.blocks`; nothing is summed for them.
        device: where sums in memory lie, as tensors, and windows come from; None: arrays in main memory. The sums are
            bitwise the same.
    """

    def __init__(
        self,
        plan: PredictPlan,
        channels: int,
        budget: int,
        folder: Path,
        done: np.ndarray | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._device = device
        self.plan = plan
        self.spilled = 0
        self._shape = (channels, *plan.block_shape)
        block_bytes = 4 * int(np.prod(self._shape))
        per_window = int(np.prod([max(len(p) for p in parts) for parts in plan.axis_parts]))
        self._limit = max(budget // block_bytes, 2 * per_window)
        self._folder = folder
        self._spill: SpillFile | None = None
        self._blocks: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._skipped: dict[tuple[int, ...], list[tuple[slice, ...]]] = {}
        self._done = done
        # Number of missing windows, only of blocks that have a partial sum, so that it stays small.
        self._remaining: dict[tuple[int, ...], int] = {}

    def __enter__(self) -> BlockAccumulator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._spill is not None:
            self._spill.close()

    def add(self, position: int, values: Any) -> list[tuple[tuple[int, ...], Any, list[tuple[slice, ...]]]]:
        """Add a window; return the blocks that it completes.

        Args:
            position: the window's position in the plan's order.
            values: weighted values, float32, shape (channels, *patch), an array, or a tensor on the device; None for
                a skipped window, whose voxels are empty in the output.

        Returns:
            For each completed block: its number, its weighted sums (channels, *block_shape), or None if all of it is
            empty, and its empty parts (slices relative to the block).
        """
        finished = []
        for block, in_window, in_block in self.plan.parts(position):
            if self._done is not None and self._done[block]:
                continue
            left = self._remaining.pop(block, 0) or self.plan.windows_of_block(block)
            if values is None:
                self._skipped.setdefault(block, []).append(in_block)
            else:
                self._get(block)[(slice(None), *in_block)] += values[(slice(None), *in_window)]
            if left > 1:
                self._remaining[block] = left - 1
            else:
                finished.append((block, self._pop(block), self._skipped.pop(block, [])))
        return finished

    def _get(self, block: tuple[int, ...]) -> Any:
        values = self._blocks.get(block)
        if values is not None:
            self._blocks.move_to_end(block)
            return values
        while len(self._blocks) >= self._limit:
            self._evict()
        if self._spill is not None and block in self._spill:
            values = self._placed(self._spill.take(block))
        elif self._device is None:
            values = np.zeros(self._shape, dtype=np.float32)
        else:
            values = torch.zeros(self._shape, device=self._device)
        self._blocks[block] = values
        return values

    def _evict(self) -> None:
        if self._spill is None:
            self._spill = SpillFile(self._folder, self._shape)
        oldest, values = self._blocks.popitem(last=False)
        self._spill.put(oldest, values if self._device is None else values.cpu().numpy())
        self.spilled += 1

    def _pop(self, block: tuple[int, ...]) -> Any:
        if block in self._blocks:
            return self._blocks.pop(block)
        if self._spill is not None and block in self._spill:
            return self._placed(self._spill.take(block))
        return None

    def _placed(self, values: np.ndarray) -> Any:
        return values if self._device is None else torch.from_numpy(values).to(self._device)
