"""Prepares images as nnU-Net v2 does before its networks see them: crop, normalise, resample, and turn the axes.

nnU-Net does so with the whole image in memory. Here one pass over the image finds its nonzero box and what its
normalisation needs; the values themselves are computed where a window reads them (`PreparedVolume`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from volumen.checkpoints.nnunet_plan import ChannelRule, NnunetPlan
from volumen.data.space.geometry import AxisTurn, directions_of, nearest_turn
from volumen.data.space.resampling import Box
from volumen.inference.nnunet.grid import PlannedGrid
from volumen.inference.nnunet.prepared_volume import Normalisation, PreparedVolume
from volumen.inference.resampling import refuse_distant_sizes
from volumen.inference.windows.reader import RegionReader
from volumen.utils.terminal.text import by

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

logger = logging.getLogger(__name__)

REORIENTED = "SAR"
"""Where the axes run to of images that nnU-Net's readers with reorientation return."""
UNIT = "millimeter"
"""Unit of voxel sizes in files that nnU-Net's readers of medical images return."""
_EPSILON = 1e-8
_BLOCK_VOXELS = 1 << 22


@dataclass(frozen=True)
class Prepared:
    """What a network of nnU-Net sees of an image.

    Args:
        grid: its voxels.
        turn: how windows are turned for the network; None: not turned.
        normalisation: of the values.
    """

    grid: PlannedGrid
    turn: AxisTurn | None
    normalisation: Normalisation

    def view(self, image: Volume) -> Volume:
        """Return the image as the network sees it, before windows are turned."""
        return PreparedVolume(image, self.grid, self.normalisation)

    def plain(self) -> dict[str, Any]:
        """Return what was done, as plain values, for the record of a prediction."""
        grid = self.grid
        return {
            "box": [[start, start + size] for start, size in zip(grid.start, grid.box, strict=True)],
            "shape": list(grid.sizes),
            "channels": self.normalisation.rows.tolist(),
        }


@dataclass(frozen=True)
class Preparation:
    """Prepares images as a plan of nnU-Net says.

    Args:
        plan: the plan.
    """

    plan: NnunetPlan

    def of(self, image: Volume, *, on_corrupt: str = "stop", nonfinite: str = "zero") -> Prepared:
        """Return how an image is prepared; it is read once for that.

        Args:
            image: the image.
            on_corrupt: "stop" or "skip", for chunks that cannot be read.
            nonfinite: "zero" or "refuse", for NaN and infinity.

        Raises:
            VolumenError: a chunk cannot be read.
        """
        plan = self.plan
        reader = RegionReader(image, on_corrupt)
        turn = self._turn(image)
        crop = nonzero_box(reader)
        grid = self._grid(image, turn, crop)
        normalisation = replace(
            _normalisation(reader, crop, plan.channels, grid, plan.data.order), nonfinite=nonfinite
        )
        logger.info(
            "%s: prepared as nnU-Net's %s does: nonzero box of %s, predicted as %s voxels",
            image.path,
            plan.configuration,
            by(grid.box),
            by(grid.sizes),
        )
        return Prepared(grid, turn, normalisation)

    def _turn(self, image: Volume) -> AxisTurn | None:
        """Return the turn to the network's axes; files of readers with reorientation are turned to RAS first."""
        ndim, transpose = len(image.shape), self.plan.transpose
        if self.plan.is_flat:
            transpose = tuple(axis - 1 for axis in transpose[1:])
        turn = AxisTurn(transpose, (False,) * ndim)
        if "Reorient" in self.plan.reader and image.geometry.orientation is not None:
            ends = "".join(REORIENTED[axis] for axis in transpose)
            turn = nearest_turn(directions_of(ends), image.geometry)[0]
        return None if turn.is_identity else turn

    def _grid(self, image: Volume, turn: AxisTurn | None, crop: Box) -> PlannedGrid:
        plan, ndim = self.plan, len(image.shape)
        geometry = (
            image.geometry.in_unit(UNIT)
            if "IO" in plan.reader and "Tiff" not in plan.reader
            else image.geometry
        )
        spacing = geometry.spacing
        if plan.is_flat:
            spacing = (1.0,) * ndim  # nnU-Net's reader of 2D images says so, whatever the file does
        elif spacing is None:
            spacing = (*(1.0,) * (ndim - len(plan.spacing)), *plan.spacing)
            spacing = spacing if turn is None else turn.undo_axes(spacing)
            logger.warning(
                "%s: states no voxel size, so it is taken to be that of the training, %s",
                image.path,
                by(f"{size:g}" for size in plan.spacing),
            )
        seen = spacing if turn is None else turn.of_axes(spacing)
        # A 2D network predicts every slice of a volume as it is stored.
        target = (*seen[: ndim - len(plan.spacing)], *plan.spacing)
        target = target if turn is None else turn.undo_axes(target)
        own, planned = (by(f"{size:g}" for size in sizes) for sizes in (spacing, target))
        refuse_distant_sizes(image.path, spacing, target, found=own, expected=planned)
        return PlannedGrid.planned(image.shape, crop, spacing, target, plan.data, plan.logits)


def nonzero_box(reader: RegionReader) -> Box:
    """Return the smallest box outside of which all channels of an image are 0; the whole image if it is 0 everywhere.

    Only what lies outside the box, and the next slices, are read.
    """
    shape, chunks = reader.volume.shape, reader.volume.chunks
    box = [[0, size] for size in shape]
    for axis, end in itertools.product(range(len(shape)), (0, 1)):
        step = max(1, min(chunks[axis], 64))
        while box[axis][0] < box[axis][1]:
            low, high = box[axis]
            slab = [(start, stop) for start, stop in box]
            slab[axis] = (low, min(low + step, high)) if end == 0 else (max(low, high - step), high)
            profile = _nonzero_profile(reader, slab, axis)
            places = np.flatnonzero(profile)
            if len(places):
                box[axis][end] = slab[axis][0] + int(places[0] if end == 0 else places[-1] + 1)
                break
            box[axis][end] = slab[axis][1 - end]
        else:
            return tuple((0, size) for size in shape)
    return tuple((low, high) for low, high in box)


def _nonzero_profile(reader: RegionReader, slab: Sequence[tuple[int, int]], axis: int) -> np.ndarray:
    """Return which slices of a slab along an axis have a voxel that is not 0 in all channels."""
    profile = np.zeros(slab[axis][1] - slab[axis][0], bool)
    others = tuple(n for n in range(len(slab) + 1) if n != axis + 1)
    for region in _blocks(slab, reader.volume.chunks):
        part = slice(region[axis].start - slab[axis][0], region[axis].stop - slab[axis][0])
        if not profile[part].all():
            profile[part] |= (reader.read(region)[0].astype(np.float32) != 0).any(axis=others)
    return profile


def _blocks(box: Sequence[tuple[int, int]], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield regions of whole chunks, of a few million voxels, that cover a box."""
    sides = [max(1, chunk) for chunk in chunks]
    for axis in reversed(range(len(sides))):
        size = box[axis][1] - box[axis][0]
        while sides[axis] < size and 2 * int(np.prod(sides)) <= _BLOCK_VOXELS:
            sides[axis] *= 2
    spans = []
    for (low, high), side in zip(box, sides, strict=True):
        edges = sorted({low, high, *range((low // side + 1) * side, high, side)})
        spans.append([slice(*pair) for pair in itertools.pairwise(edges)])
    yield from itertools.product(*spans)


def _normalisation(
    reader: RegionReader, crop: Box, rules: Sequence[ChannelRule], grid: PlannedGrid, order: int
) -> Normalisation:
    """Return the linear maps of all channels, and the range of the mapped values where the spline may leave it."""
    mask = _filled_mask(reader, crop) if any(rule.in_mask for rule in rules) else None
    masked = np.array([rule.in_mask for rule in rules])
    limited = order > 1 and grid.is_resampled
    rows = np.array([_row(rule) for rule in rules])
    if limited or any(rule.scheme in ("zscore", "rescale") for rule in rules):
        logger.info("%s: reading it once for the normalisation of nnU-Net", reader.volume.path)
        statistics = _Statistics(len(rules), crop, grid.nearest_in)
        for region in _blocks(crop, reader.volume.chunks):
            statistics.add(region, _float32(reader.read(region)[0]), mask, masked)
        rows = np.array([_row(rule, statistics, channel) for channel, rule in enumerate(rules)])
        limits = statistics.limits(rows, masked) if limited else None
        return Normalisation(rows, masked, mask, limits, order)
    return Normalisation(rows, masked, mask, None, order)


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False)


def _row(rule: ChannelRule, statistics: _Statistics | None = None, channel: int = 0) -> tuple[float, ...]:
    """Return low, high, shift and width of a channel's map, see `Normalizer`."""
    low, high, shift, width = -np.inf, np.inf, 0.0, 1.0
    if rule.scheme == "rgb":
        width = 255.0
    elif rule.scheme == "ct":
        known = dict(rule.properties)
        low, high = known["percentile_00_5"], known["percentile_99_5"]
        shift, width = known["mean"], max(known["std"], _EPSILON)
    elif statistics is not None and rule.scheme == "zscore":
        shift, width = statistics.mean[channel], max(statistics.deviation(channel), _EPSILON)
    elif statistics is not None and rule.scheme == "rescale":
        least, most = statistics.range_of(channel)
        shift, width = least, max(most - least, _EPSILON)
    return low, high, shift, width


def _filled_mask(reader: RegionReader, crop: Box) -> np.ndarray:
    """Return where an image is not 0, with holes filled, in its nonzero box: one byte per voxel in memory."""
    mask = np.zeros(tuple(stop - start for start, stop in crop), bool)
    for region in _blocks(crop, reader.volume.chunks):
        here = tuple(slice(r.start - low, r.stop - low) for r, (low, _) in zip(region, crop, strict=True))
        mask[here] = (_float32(reader.read(region)[0]) != 0).any(axis=0)
    return ndimage.binary_fill_holes(mask)


class _Statistics:
    """Mean, deviation and range of the channels of an image, block by block.

    Args:
        channels: how many.
        crop: the box whose values are added.
        slices: axis along which the range is of every slice; None: of the whole box.
    """

    def __init__(self, channels: int, crop: Box, slices: int | None) -> None:
        self._crop, self._axis = crop, slices
        count = 1 if slices is None else crop[slices][1] - crop[slices][0]
        self.mean = np.zeros(channels)
        self._count, self._squares = np.zeros(channels), np.zeros(channels)
        # Inside the mask, where values are mapped, and outside of it, where they stay.
        self._least = np.full((2, channels, count), np.inf)
        self._most = np.full((2, channels, count), -np.inf)

    def add(
        self, region: Sequence[slice], values: np.ndarray, mask: np.ndarray | None, masked: np.ndarray
    ) -> None:
        """Add a block (C, *region); values that are not finite are left out."""
        here = tuple(
            slice(r.start - low, r.stop - low) for r, (low, _) in zip(region, self._crop, strict=True)
        )
        places = slice(0, 1) if self._axis is None else here[self._axis]
        for channel, block in enumerate(values):
            finite = np.isfinite(block)
            own = mask[here] if mask is not None and masked[channel] else None
            inside = finite if own is None else finite & own
            self._add_moments(channel, block[inside].astype(np.float64))
            self._add_range(0, channel, places, block, inside)
            if own is not None:
                self._add_range(1, channel, places, block, finite & ~own)

    def _add_moments(self, channel: int, values: np.ndarray) -> None:
        """Merge mean and sum of squared deviations (Chan et al. 1979)."""
        if not len(values):
            return
        mean, before = values.mean(), self._count[channel]
        total = before + len(values)
        shift = mean - self.mean[channel]
        self._squares[channel] += ((values - mean) ** 2).sum() + shift**2 * before * len(values) / total
        self.mean[channel] += shift * len(values) / total
        self._count[channel] = total

    def _add_range(
        self, part: int, channel: int, places: slice, block: np.ndarray, chosen: np.ndarray
    ) -> None:
        others = tuple(n for n in range(block.ndim) if n != self._axis)
        others = others if self._axis is not None else tuple(range(block.ndim))
        least = np.where(chosen, block, np.inf).min(axis=others)
        most = np.where(chosen, block, -np.inf).max(axis=others)
        self._least[part, channel, places] = np.minimum(self._least[part, channel, places], least)
        self._most[part, channel, places] = np.maximum(self._most[part, channel, places], most)

    def deviation(self, channel: int) -> float:
        """Return the standard deviation of a channel."""
        return float(np.sqrt(self._squares[channel] / max(self._count[channel], 1)))

    def range_of(self, channel: int) -> tuple[float, float]:
        """Return the least and largest value of a channel."""
        return float(self._least[:, channel].min()), float(self._most[:, channel].max())

    def limits(self, rows: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """Return the least and largest normalised value (2, C, slices) of every slice."""
        low, high, shift, width = (rows[:, n, None] for n in range(4))
        mapped = [(np.clip(values[0], low, high) - shift) / width for values in (self._least, self._most)]
        least, most = mapped
        stay = masked[:, None]
        least = np.where(stay, np.minimum(least, self._least[1]), least)
        most = np.where(stay, np.maximum(most, self._most[1]), most)
        return np.stack([least, most])
