"""The plan of a prediction: its windows, their order, and the output blocks that each window touches.

Everything here is arithmetic on shapes, so that a plan can be computed and compared before any voxel is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from volumen.inference.windows.window_rules import OURS, WindowRules, spread_starts

MOST_GROWTH = 2
"""Largest ratio of the voxels of a small image's window to those of the usual window; it bounds the memory."""

Box = tuple[tuple[int, int], ...]
"""Start and stop of each spatial axis, in voxels."""


def axis_starts(size: int, patch: int, overlap: float, *, spread: bool = False) -> tuple[int, ...]:
    """Return the start positions of the windows along one axis.

    Windows are `round(patch * (1 - overlap))` voxels apart; the last one is shifted inward so that it ends where the
    axis ends. An axis shorter than the patch has a single window that is centred on it, so that its start is negative
    or 0.

    Args:
        size: length of the axis in voxels, at least 1.
        patch: length of a window in voxels, at least 1.
        overlap: share of a window that its neighbour covers, in [0, 1).
        spread: spread the windows evenly instead, see `spread_starts`.

    Raises:
        ValueError: for a size or patch below 1, or an overlap outside [0, 1).
    """
    if size < 1 or patch < 1:
        raise ValueError(f"size and patch must be at least 1, got {size} and {patch}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    if size <= patch:
        return (-((patch - size) // 2),)
    if spread:
        return spread_starts(size, patch, overlap)
    stride = max(1, round(patch * (1 - overlap)))
    return (*range(0, size - patch, stride), size - patch)


@dataclass(frozen=True)
class AxisPart:
    """Intersection of a window and a block along one axis: number of the block, and slices relative to each."""

    block: int
    in_window: slice
    in_block: slice


@dataclass(frozen=True)
class PredictPlan:
    """Windows over a volume and output blocks over a region of it.

    The windows are those of the whole volume that touch the region. The prediction of a region is therefore the crop
    of the prediction of the whole volume.

    Windows are processed tile by tile: a tile is `tile[a]` windows wide along every axis `a` except the first, and
    covers the whole first axis. Partial sums are therefore needed only for one tile, `patch[0]` deep, and on the
    borders between tiles, for any size of the volume.

    Args:
        shape: spatial shape of the volume, in voxels.
        patch_size: shape of a window.
        overlap: share of a window that the next one covers, in [0, 1).
        region: start and stop per axis of the region to predict; None: the whole volume.
        block_shape: shape of an output block, the unit that is written and recorded.
        batch_size: windows per forward pass.
        tile: windows per tile and axis.
        rules: where windows lie and how they are weighted.
    """

    shape: tuple[int, ...]
    patch_size: tuple[int, ...]
    overlap: float
    region: Box | None = None
    block_shape: tuple[int, ...] = ()
    batch_size: int = 1
    tile: tuple[int, ...] = ()
    rules: WindowRules = OURS
    starts: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        ndim = len(self.shape)
        if len(self.patch_size) != ndim:
            raise ValueError(f"patch_size {self.patch_size} and shape {self.shape} differ in dimensions")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        region = self.region or tuple((0, size) for size in self.shape)
        for (start, stop), size in zip(region, self.shape, strict=True):
            if not 0 <= start < stop <= size:
                raise ValueError(f"region {region} does not lie in a volume of shape {self.shape}")
        set_field = object.__setattr__
        set_field(self, "region", region)
        set_field(self, "block_shape", self.block_shape or self.patch_size)
        set_field(self, "tile", self.tile or (4,) * ndim)
        starts = []
        for size, patch, (low, high) in zip(self.shape, self.patch_size, region, strict=True):
            every = axis_starts(size, patch, self.overlap, spread=self.rules.spread)
            starts.append(tuple(s for s in every if s < high and s + patch > low))
        set_field(self, "starts", tuple(starts))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def box(self) -> Box:
        """The region, never None."""
        assert self.region is not None
        return self.region

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Output blocks per axis."""
        return tuple(math.ceil(n / b) for n, b in zip(self.output_shape, self.block_shape, strict=True))

    @cached_property
    def window_counts(self) -> tuple[int, ...]:
        """Windows per axis."""
        return tuple(len(starts) for starts in self.starts)

    def numbers(self, position: int) -> tuple[int, ...]:
        """Return a window's number along each axis from its position in the plan's order."""
        counts = self.window_counts
        extents = [counts[0]]
        first = [0]
        for axis in range(1, self.ndim):
            row = math.prod(extents) * math.prod(counts[axis + 1 :])
            tile, position = divmod(position, row * self.tile[axis])
            first.append(tile * self.tile[axis])
            extents.append(min(self.tile[axis], counts[axis] - first[axis]))
        inside = []
        for extent in reversed(extents):
            position, number = divmod(position, extent)
            inside.append(number)
        return tuple(low + number for low, number in zip(first, reversed(inside), strict=True))

    def position(self, numbers: tuple[int, ...]) -> int:
        """Return the position in the plan's order of the window with these numbers."""
        counts = self.window_counts
        before, extents, inside = 0, [counts[0]], [numbers[0]]
        for axis in range(1, self.ndim):
            low = numbers[axis] // self.tile[axis] * self.tile[axis]
            before += low * math.prod(extents) * math.prod(counts[axis + 1 :])
            extents.append(min(self.tile[axis], counts[axis] - low))
            inside.append(numbers[axis] - low)
        within = 0
        for extent, number in zip(extents, inside, strict=True):
            within = within * extent + number
        return before + within

    def positions(self, windows: Sequence[range]) -> Iterator[int]:
        """Yield the positions, in order, of the windows whose numbers lie in a range per axis."""
        tiles = [
            range(part.start // t, -(-part.stop // t))
            for part, t in zip(windows[1:], self.tile[1:], strict=True)
        ]
        for tile in itertools.product(*tiles):
            inside = [
                range(max(part.start, number * t), min(part.stop, (number + 1) * t))
                for part, number, t in zip(windows[1:], tile, self.tile[1:], strict=True)
            ]
            yield from map(self.position, itertools.product(windows[0], *inside))

    def __len__(self) -> int:
        return math.prod(self.window_counts)

    def batch_of(self, position: int) -> range:
        """Return the positions of the batch that contains a position; it depends on the plan only."""
        first = position - position % self.batch_size
        return range(first, min(first + self.batch_size, len(self)))

    def batches(self) -> Iterator[range]:
        """Yield the positions of every batch, in order."""
        return map(self.batch_of, range(0, len(self), self.batch_size))

    def start(self, position: int) -> tuple[int, ...]:
        """Return the start of the window at a position in the volume (may be below 0)."""
        return tuple(
            starts[number] for starts, number in zip(self.starts, self.numbers(position), strict=True)
        )

    @cached_property
    def axis_parts(self) -> tuple[tuple[tuple[AxisPart, ...], ...], ...]:
        """Per axis and window of that axis, its parts in the output blocks."""
        return tuple(
            tuple(self._parts(axis, start) for start in starts) for axis, starts in enumerate(self.starts)
        )

    def _parts(self, axis: int, start: int) -> tuple[AxisPart, ...]:
        low, high = self.box[axis]
        size = self.block_shape[axis]
        begin, end = max(start, low), min(start + self.patch_size[axis], high)
        parts = []
        for block in range((begin - low) // size, (end - low - 1) // size + 1):
            block_start = low + block * size
            first, last = max(begin, block_start), min(end, block_start + size)
            parts.append(
                AxisPart(
                    block, slice(first - start, last - start), slice(first - block_start, last - block_start)
                )
            )
        return tuple(parts)

    def parts(self, position: int) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
        """Yield (block, slices in the window, slices in the block) of the window at a position."""
        per_axis = [self.axis_parts[axis][number] for axis, number in enumerate(self.numbers(position))]
        for combination in itertools.product(*per_axis):
            yield (
                tuple(part.block for part in combination),
                tuple(part.in_window for part in combination),
                tuple(part.in_block for part in combination),
            )

    def touched(self, position: int) -> tuple[slice, ...]:
        """Return the blocks that a window touches, as one slice of the block grid per axis."""
        per_axis = [self.axis_parts[axis][number] for axis, number in enumerate(self.numbers(position))]
        return tuple(slice(parts[0].block, parts[-1].block + 1) for parts in per_axis)

    @cached_property
    def _axis_windows(self) -> tuple[tuple[range, ...], ...]:
        """Per axis and block of that axis, the numbers of the windows that touch it."""
        result = []
        for axis, blocks in enumerate(self.blocks):
            touching: list[list[int]] = [[] for _ in range(blocks)]
            for number, parts in enumerate(self.axis_parts[axis]):
                for part in parts:
                    touching[part.block].append(number)
            result.append(tuple(range(numbers[0], numbers[-1] + 1) for numbers in touching))
        return tuple(result)

    def windows_touching(self, blocks: Sequence[tuple[int, int]]) -> tuple[range, ...]:
        """Return, per axis, the numbers of the windows that touch a box of blocks (start and stop per axis)."""
        return tuple(
            range(along[first].start, along[stop - 1].stop)
            for along, (first, stop) in zip(self._axis_windows, blocks, strict=True)
        )

    def windows_of_block(self, block: tuple[int, ...]) -> int:
        """Return how many windows touch a block."""
        return math.prod(len(along[b]) for along, b in zip(self._axis_windows, block, strict=True))

    def block_box(self, block: tuple[int, ...]) -> tuple[slice, ...]:
        """Return a block's region in the output array, cut at the output's end."""
        return tuple(
            slice(b * size, min((b + 1) * size, n))
            for b, size, n in zip(block, self.block_shape, self.output_shape, strict=True)
        )


def fit_window(patch_size: Sequence[int], shape: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """Return the window for an image that may be smaller than the usual window.

    A side longer than the image is reduced to the smallest multiple of the divisor that covers the image. The network
    normalises features over its window, so that a window of fewer voxels has less reliable statistics. The other sides
    therefore grow in proportion, until the window covers the image or has `MOST_GROWTH` times the usual voxels.

    Args:
        patch_size: the usual window, in voxels, divisible by `divisor`.
        shape: spatial shape of the image.
        divisor: products of the network's strides, by which the sides of a window must be divisible.
    """
    most = tuple(math.ceil(size / step) * step for size, step in zip(shape, divisor, strict=True))
    window = tuple(map(min, patch_size, most))
    if window == tuple(patch_size):
        return window
    usual = math.prod(patch_size)
    for longer in _longer_windows(window, patch_size, divisor):
        longer = tuple(map(min, longer, most))
        if math.prod(longer) > MOST_GROWTH * usual:
            break
        window = longer
    if window == tuple(divisor):
        # The network's last stage would have a single voxel, over which no normalisation is possible.
        return tuple(min(side, 2 * step) for side, step in zip(patch_size, divisor, strict=True))
    return window


def _longer_windows(
    window: tuple[int, ...], patch_size: Sequence[int], divisor: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Yield windows whose unreduced sides grow in proportion, up to the limit of `MOST_GROWTH`."""
    whole = [side == usual for side, usual in zip(window, patch_size, strict=True)]
    if not any(whole):
        return
    # Chosen such that the side with the most multiples of its divisor grows by one divisor per step.
    steps = max(usual // step for usual, step, free in zip(patch_size, divisor, whole, strict=True) if free)
    limit = MOST_GROWTH * math.prod(patch_size) // math.prod(window)
    for count in range(steps + 1, steps * limit + 1):
        yield tuple(
            usual * count // steps // step * step if free else side
            for side, usual, step, free in zip(window, patch_size, divisor, whole, strict=True)
        )


def choose_block_shape(
    output_shape: tuple[int, ...], patch_size: tuple[int, ...], limit: int | None = None
) -> tuple[int, ...]:
    """Return the shape of an output block: powers of two, at most the patch and the output.

    Args:
        output_shape: spatial shape of the output.
        patch_size: shape of a window.
        limit: longest side; None: 128 in 3D and 512 in 2D, so that a chunk has about 1 MB.
    """
    longest = limit or (128 if len(output_shape) >= 3 else 512)
    return tuple(
        min(1 << (min(patch, longest).bit_length() - 1), size)
        for size, patch in zip(output_shape, patch_size, strict=True)
    )


def choose_tile(patch_size: tuple[int, ...], overlap: float, channels: int, budget: int) -> tuple[int, ...]:
    """Return the number of windows per tile and axis whose partial sums fit a budget, at least 2.

    Args:
        patch_size: shape of a window.
        overlap: share of a window that the next one covers.
        channels: accumulated channels, float32 each.
        budget: bytes for the partial sums in memory.
    """
    tile = 2
    while tile < 64:
        wider = [p + tile * max(1, round(p * (1 - overlap))) for p in patch_size[1:]]
        if 4 * channels * patch_size[0] * math.prod(wider) > budget:
            break
        tile += 1
    return (1, *(tile for _ in patch_size[1:]))
