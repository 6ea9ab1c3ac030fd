"""Samples the intensities of a data set in one streamed pass, for `Normalizer`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.formats.zarr_arrays.stored_chunks import stored_blocks
from volumen.data.resampled import resampling_of
from volumen.data.target_spacing import stored_case
from volumen.data.validity import known_voxels, labelled_voxels, without_ignored
from volumen.utils.errors import VolumenError

_LOGGER = logging.getLogger(__name__)

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
_DEFAULT_BLOCK = 64
_DISAGREEMENT = 3.0  # ratio of intensity ranges from which volumes cannot share one
_REGIONS_PER_VOLUME = 32
_LONGEST_PERMUTATION = 2**20
_LEAST_SHARE = 0.4
"""Smallest width of an image's intensities, as a share of the narrowest training volume's; below it is too flat."""
_MOST_BEYOND = 0.5
"""How far an image may reach beyond the range of the training volumes, as a share of that range's width."""
_MOST_SHIFT = 0.4
"""How far its mean may lie outside the means of the training volumes, as a share of the same width."""

Box = Sequence[Sequence[int]]


def sample_intensity_properties(
    cases: Sequence[Any],
    *,
    boxes: Mapping[str, Sequence[Box]] | None = None,
    max_regions: int = 128,
    values_per_region: int = 20_000,
    seed: int = 0,
    ignore_labels: Mapping[str, int] | None = None,
    per_volume: bool | None = None,
    foreground: bool = True,
    most_cases: int | None = None,
) -> dict[str, Any]:
    """Return statistics of image intensities from a reproducible sample of storage blocks.

    Args:
        cases: `OpenCase` objects; their labels determine the foreground (any label above 0).
        boxes: case name to the regions (start, stop per axis) to sample, such as the training part of a
            split; None: everything.
        max_regions: number of blocks to read, divided among the cases (at least one each).
        values_per_region: number of values per block and channel, evenly strided.
        seed: of the choice of blocks.
        ignore_labels: target to the label value that means "unknown", which is no foreground.
        per_volume: let `Normalizer` use each volume's own statistics, as for MRI in arbitrary units; None: where
            the volumes' ranges differ by more than 3 times, or the mean of one lies outside the range of another.
        foreground: look at labels too.
        most_cases: look at no more volumes than this, chosen at random; None: at all.

    Returns:
        A JSON-able dict: "channels" and "foreground", each a list with, per channel, min, max, mean, std,
        percentile_00_5, percentile_99_5 and count (foreground None when no labelled voxel was met); "dtypes", the
        names of the images' types; "per_volume"; "every_type", see `Normalizer`; and "volumes", see `volume_ranges`.
        Values that are not finite are left out, with a warning.

    Raises:
        VolumenError: no sampled value is finite.
    """
    # Statistics are of the stored values: interpolation would narrow their range.
    cases, boxes = [stored_case(case) for case in cases], _stored_boxes(cases, boxes)
    rng = np.random.default_rng(seed)
    everywhere: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    by_case: dict[str, list[dict[str, float]]] = {}
    if most_cases is not None and len(cases) > most_cases:
        cases = [cases[i] for i in sorted(rng.permutation(len(cases))[:most_cases].tolist())]
    per_case = max(1, max_regions // max(1, len(cases)))
    for case in cases:
        allowed = (boxes or {}).get(case.name) if boxes is not None else [[(0, n) for n in case.image.shape]]
        parts: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        with BLOCKS.paused(_reads_chunks_once(case)):
            for regions in _choices(rng, case.image, allowed or [], per_case):
                parts, labels = [], []
                for region in regions:
                    image, labelled = _read(case, region, ignore_labels or {}, foreground)
                    parts.append(_strided(image, values_per_region))
                    if labelled is not None and labelled.any():
                        labels.append(_strided(image[:, labelled], values_per_region))
                if not _is_constant(parts):
                    break
        everywhere += parts
        inside += labels
        if parts:
            _warn_of_nonfinite(case.image.path, parts)
            channels = _statistics(parts)
            _warn_of_constant(case.image.path, channels)
            by_case[case.name] = channels
    if not everywhere:
        raise ValueError(f"no region to sample in {len(cases)} cases with boxes {boxes!r}")
    if not any(np.isfinite(values).any() for values in everywhere):
        raise VolumenError(
            ", ".join(case.image.path for case in cases[:3]),
            expected="intensities",
            found="nothing but NaN and infinity in float32",
            remedy="write the images again",
        )
    if not inside:
        _LOGGER.debug("no labelled voxel among the %d blocks sampled", len(everywhere))
    disagreement = _disagreement({name: channels[0] for name, channels in by_case.items()})
    if disagreement and per_volume is False:
        _LOGGER.warning("%s: one normalisation for both flattens the former", disagreement)
    elif disagreement and per_volume is None:
        _LOGGER.info("%s: each volume is normalised by its own statistics", disagreement)
    by_volume = bool(disagreement) if per_volume is None else per_volume
    return {
        "channels": _statistics(everywhere),
        "foreground": _statistics(inside) if inside else None,
        "dtypes": sorted({np.dtype(case.image.dtype).name for case in cases}),
        "per_volume": by_volume,
        "every_type": by_volume,
        "volumes": volume_ranges(list(by_case.values())),
    }


def _stored_boxes(
    cases: Sequence[Any], boxes: Mapping[str, Sequence[Box]] | None
) -> Mapping[str, Sequence[Box]] | None:
    """Return boxes of cases as boxes of their stored grids."""
    if boxes is None:
        return None
    grids = {case.name: resampling_of(case.image) for case in cases}
    return {
        name: [grid.stored_box(box) for box in parts] if (grid := grids.get(name)) is not None else parts
        for name, parts in boxes.items()
    }


def volume_ranges(volumes: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, list[float]]]:
    """Return, per channel, between which values the statistics of volumes lie.

    Args:
        volumes: per volume its statistics per channel; those without any finite value or contrast are left out, unless
            all are.

    Returns:
        Per channel the smallest and the largest "mean", "percentile_00_5" and "percentile_99_5" of all volumes.
    """
    seeing = [v for v in volumes if any(c["max"] > c["min"] for c in v)] or list(volumes)
    channels = min((len(volume) for volume in seeing), default=0)
    return [
        {
            key: [min(v[number][key] for v in seeing), max(v[number][key] for v in seeing)]
            for key in ("mean", "percentile_00_5", "percentile_99_5")
        }
        for number in range(channels)
    ]


def volume_properties(volume: Any) -> dict[str, Any]:
    """Return statistics of one volume's intensities, which depend only on its content, so that prediction repeats them.

    Args:
        volume: a `Volume`.

    Returns:
        A JSON-able dict with "channels" as in `sample_intensity_properties`.
    """
    return {"channels": _statistics([sample_values(volume, _REGIONS_PER_VOLUME)])}


def sample_values(volume: Any, max_regions: int) -> np.ndarray:
    """Return values of a volume from a reproducible sample of its blocks: float32 (C, values)."""
    parts: list[np.ndarray] = []
    whole = [[(0, size) for size in volume.shape]]
    for regions in _choices(np.random.default_rng(0), volume, whole, max_regions):
        parts = [_strided(np.asarray(volume.read(region)), 20_000) for region in regions]
        if not _is_constant(parts):
            break
    return np.concatenate(parts, axis=1)


def _choices(
    rng: np.random.Generator, volume: Any, boxes: Sequence[Box], most: int
) -> Iterator[list[tuple[slice, ...]]]:
    """Yield storage blocks inside boxes, drawn at random: among all, and if these are constant, among the stored ones.

    A sample of a volume of which little is stored may miss all that is stored.
    """
    regions = _Blocks(boxes, volume.chunks)
    yield [regions[number] for number in _drawn(rng, len(regions), most)]
    stored = stored_blocks(volume, probe=False)
    if stored is not None and 0 < len(stored.indices) < stored.total:
        blocks = [list(zip(*block)) for block in zip(stored.starts.tolist(), stored.stops.tolist())]
        parts = [_shared(block, box) for block in blocks for box in boxes]
        regions = _Blocks([part for part in parts if all(a < b for a, b in part)], volume.chunks)
        if len(regions):
            yield [regions[number] for number in _drawn(rng, len(regions), most)]


def _reads_chunks_once(case: Any) -> bool:
    """Whether blocks of the image are also whole chunks of all labels and masks, so that caching them is useless."""
    volumes = (case.image, *case.labels.values(), *case.masks.values())
    chunks = {tuple(volume.chunks) for volume in volumes}
    return len(chunks) == 1 and all(_SMALLEST_BLOCK <= size <= _LARGEST_BLOCK for size in chunks.pop())


def _shared(one: Box, other: Box) -> list[tuple[int, int]]:
    """Return the box that two boxes share; its start is not below its stop along some axis if they share none."""
    return [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True)]


def _is_constant(parts: Sequence[np.ndarray]) -> bool:
    """Whether every value sampled is equal, per channel."""
    return all((part == parts[0][:, :1]).all() for part in parts)


def _warn_of_nonfinite(path: str, parts: Sequence[np.ndarray]) -> None:
    """Warn of NaN and infinity among the values sampled from a volume."""
    total = sum(values.size for values in parts)
    wrong = total - sum(int(np.isfinite(values).sum()) for values in parts)
    if wrong:
        _LOGGER.warning("%s: %d of %d values sampled are NaN or infinite", path, wrong, total)


def _warn_of_constant(path: str, channels: Sequence[Mapping[str, Any]]) -> None:
    """Warn of channels in which all sampled values are equal."""
    for number, channel in enumerate(channels):
        if channel["count"] > 1 and channel["min"] == channel["max"]:
            where = f"channel {number}: " if len(channels) > 1 else ""
            _LOGGER.warning("%s: %severy value sampled is %g", path, where, channel["min"])


def _disagreement(volumes: Mapping[str, Mapping[str, float]]) -> str:
    """Say which two volumes' intensities differ too much for one normalisation; nothing where none do."""
    spans = {
        name: (known["percentile_00_5"], known["percentile_99_5"])
        for name, known in volumes.items()
        if known["percentile_99_5"] > known["percentile_00_5"]
    }
    # Of many volumes a few are odd ones, for which the others shall not be normalised differently.
    odd = len(spans) // 20
    ordered = sorted(spans, key=lambda name: spans[name][1] - spans[name][0])[odd : len(spans) - odd]
    if len(ordered) < 2:
        return ""
    narrow, wide = ordered[0], ordered[-1]
    widths = [spans[name][1] - spans[name][0] for name in (narrow, wide)]
    if widths[1] > _DISAGREEMENT * widths[0]:
        return f"intensities of {narrow} span {widths[0]:.4g} and those of {wide} {widths[1]:.4g}"
    ordered = sorted(spans, key=lambda name: volumes[name]["mean"])[odd : len(spans) - odd]
    dark, bright = ordered[0], ordered[-1]
    means = [volumes[name]["mean"] for name in (dark, bright)]
    if means[1] > spans[dark][1] and means[0] < spans[bright][0]:
        return f"intensities of {dark} have the mean {means[0]:.4g} and those of {bright} {means[1]:.4g}"
    return ""


class _Blocks:
    """The storage blocks that boxes touch, by number: a list of all of them may not fit in memory.

    Whole storage blocks, aligned, so that none is decoded for a corner of it.
    """

    def __init__(self, boxes: Sequence[Box], chunks: Sequence[int]) -> None:
        sizes = [size if _SMALLEST_BLOCK <= size <= _LARGEST_BLOCK else _DEFAULT_BLOCK for size in chunks]
        self._parts = [
            [
                [
                    slice(max(first, start), min(first + size, stop))
                    for first in range(start - start % size, stop, size)
                ]
                for (start, stop), size in zip(box, sizes)
            ]
            for box in boxes
        ]

    def __len__(self) -> int:
        return sum(prod(len(axis) for axis in axes) for axes in self._parts)

    def __getitem__(self, number: int) -> tuple[slice, ...]:
        for axes in self._parts:
            counts = [len(axis) for axis in axes]
            if number < prod(counts):
                return tuple(axis[i] for axis, i in zip(axes, np.unravel_index(number, counts)))
            number -= prod(counts)
        raise IndexError(number)


def _drawn(rng: np.random.Generator, count: int, most: int) -> list[int]:
    """Draw at most `most` of `count` numbers, ascending."""
    if count <= _LONGEST_PERMUTATION:
        return sorted(rng.permutation(count)[:most].tolist())
    return sorted(rng.choice(count, most, replace=False).tolist())


def _read(
    case: Any, region: tuple[slice, ...], ignore_labels: Mapping[str, int], with_labels: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    image = np.asarray(case.image.read(region))
    foreground = None
    for target, volume in case.labels.items() if with_labels else ():
        label = np.asarray(volume.read(region))
        mask = np.asarray(case.masks[target].read(region)) if target in case.masks else None
        ignore = ignore_labels.get(target)
        labelled = labelled_voxels(without_ignored(label, ignore), known_voxels(label, mask, ignore))
        foreground = labelled if foreground is None else foreground | labelled
    return image.reshape(len(image), *(s.stop - s.start for s in region)), foreground


def _strided(image: np.ndarray, limit: int) -> np.ndarray:
    flat = image.reshape(len(image), -1)
    return flat[:, :: max(1, -(-flat.shape[1] // limit))].astype(np.float32)


def _statistics(parts: Sequence[np.ndarray]) -> list[dict[str, float]]:
    return [channel_statistics(values) for values in np.concatenate(parts, axis=1)]


def channel_statistics(values: np.ndarray) -> dict[str, float]:
    """Return the statistics of one channel's values, those that are not finite left out."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        values = np.zeros(1)
    low, high = np.percentile(values, [0.5, 99.5])
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
        "count": int(values.size),
    }


def is_unlike(found: Mapping[str, float], trained: Mapping[str, Sequence[float]]) -> bool:
    """Whether a channel's intensities are unlike those of training, by the limits at the top of this module.

    Args:
        found: statistics of an image's channel.
        trained: statistics of the training volumes, see `volume_ranges`.
    """
    low, high = found["percentile_00_5"], found["percentile_99_5"]
    lowest, highest = trained["percentile_00_5"][0], trained["percentile_99_5"][1]
    width = highest - lowest
    if found["max"] <= found["min"] or width <= 0:
        return False
    narrowest = max(trained["percentile_99_5"][0] - trained["percentile_00_5"][1], 0.0)
    return (
        low < lowest - _MOST_BEYOND * width
        or high > highest + _MOST_BEYOND * width
        or high - low < _LEAST_SHARE * narrowest
        or found["mean"] < trained["mean"][0] - _MOST_SHIFT * width
        or found["mean"] > trained["mean"][1] + _MOST_SHIFT * width
    )
