"""Samples the intensities of a data set in one streamed pass, for `Normalizer`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from volumen.data.validity import known_voxels, labelled_voxels, without_ignored
from volumen.utils.errors import VolumenError

_LOGGER = logging.getLogger(__name__)

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
_DEFAULT_BLOCK = 64
_DISAGREEMENT = 4.0  # ratio of intensity ranges above which volumes are normalised separately
_REGIONS_PER_VOLUME = 32

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
) -> dict[str, Any]:
    """Return statistics of image intensities from a reproducible sample of storage blocks.

    Args:
        cases: `OpenCase` objects; their labels determine the foreground (any label above 0).
        boxes: case name to the regions (start, stop per axis) to sample, such as the training part of a
            split; None: everything.
        max_regions: number of blocks to read, divided among the cases (at least one each).
        values_per_region: number of values per block and channel, evenly strided.
        seed: of the choice of blocks.
        ignore_labels: target to the label value that means "unknown", which is not foreground.
        per_volume: let `Normalizer` use each volume's own statistics, as for MRI in arbitrary units; None: if
            the volumes' ranges differ by more than 4 times.

    Returns:
        A JSON-able dict: "channels" and "foreground", each a list with, per channel, min, max, mean, std,
        percentile_00_5, percentile_99_5 and count (foreground is None if no labelled voxel was sampled);
        "dtypes", the names of the images' types; and "per_volume". Values that are not finite are left out,
        with a warning.

    Raises:
        VolumenError: no sampled value is finite.
    """
    rng = np.random.default_rng(seed)
    everywhere: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    ranges: dict[str, float] = {}
    per_case = max(1, max_regions // max(1, len(cases)))
    for case in cases:
        allowed = (boxes or {}).get(case.name) if boxes is not None else [[(0, n) for n in case.image.shape]]
        regions = [region for box in allowed or [] for region in _blocks(box, case.image.chunks)]
        chosen = rng.permutation(len(regions))[:per_case]
        before = len(everywhere)
        for number in sorted(chosen.tolist()):
            image, foreground = _read(case, regions[number], ignore_labels or {})
            everywhere.append(_strided(image, values_per_region))
            if foreground is not None and foreground.any():
                inside.append(_strided(image[:, foreground], values_per_region))
        if len(everywhere) > before:
            _warn_of_nonfinite(case.image.path, everywhere[before:])
            channels = _statistics(everywhere[before:])
            _warn_of_constant(case.image.path, channels)
            ranges[case.name] = channels[0]["percentile_99_5"] - channels[0]["percentile_00_5"]
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
    disagreement = _disagreement(ranges) if any(case.image.dtype != np.uint8 for case in cases) else ""
    if disagreement and per_volume is False:
        _LOGGER.warning("%s: one normalisation for both flattens the former", disagreement)
    elif disagreement and per_volume is None:
        _LOGGER.info("%s: each volume is normalised by its own statistics", disagreement)
    return {
        "channels": _statistics(everywhere),
        "foreground": _statistics(inside) if inside else None,
        "dtypes": sorted({np.dtype(case.image.dtype).name for case in cases}),
        "per_volume": bool(disagreement) if per_volume is None else per_volume,
    }


def volume_properties(volume: Any) -> dict[str, Any]:
    """Return statistics of one volume's intensities, which depend only on its content, so that prediction repeats them.

    Args:
        volume: a `Volume`.

    Returns:
        A JSON-able dict with "channels" as in `sample_intensity_properties`.
    """
    regions = list(_blocks([(0, size) for size in volume.shape], volume.chunks))
    chosen = np.random.default_rng(0).permutation(len(regions))[:_REGIONS_PER_VOLUME]
    parts = [_strided(np.asarray(volume.read(regions[number])), 20_000) for number in sorted(chosen.tolist())]
    return {"channels": _statistics(parts)}


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


def _disagreement(ranges: Mapping[str, float]) -> str:
    """Name the two volumes whose intensity ranges differ too much for one normalisation; empty if none do."""
    widths = {name: width for name, width in ranges.items() if width > 0}
    if not widths:
        return ""
    narrow, wide = min(widths, key=widths.__getitem__), max(widths, key=widths.__getitem__)
    if widths[wide] <= _DISAGREEMENT * widths[narrow]:
        return ""
    return f"intensities of {narrow} span {widths[narrow]:.4g} and those of {wide} {widths[wide]:.4g}"


def _blocks(box: Box, chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    # Aligned, complete storage blocks, so that no block is decoded for only a part of it.
    sizes = [size if _SMALLEST_BLOCK <= size <= _LARGEST_BLOCK else _DEFAULT_BLOCK for size in chunks]
    starts = [range(start - start % size, stop, size) for (start, stop), size in zip(box, sizes)]
    for corner in product(*starts):
        yield tuple(
            slice(max(first, start), min(first + size, stop))
            for first, size, (start, stop) in zip(corner, sizes, box)
        )


def _read(
    case: Any, region: tuple[slice, ...], ignore_labels: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    image = np.asarray(case.image.read(region))
    foreground = None
    for target, volume in case.labels.items():
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
    return [_channel_statistics(values) for values in np.concatenate(parts, axis=1)]


def _channel_statistics(values: np.ndarray) -> dict[str, float]:
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
