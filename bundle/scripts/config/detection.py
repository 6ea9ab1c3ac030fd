"""Detects from the data what the settings leave open: spacing, patch size, and how each label is read."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from volumen.config.parts.targets import TargetConfig
from volumen.data.formats.volumes import Volume
from volumen.data.labels.instance_labels import look_like_instances
from volumen.data.layout import OpenCase
from volumen.data.resampled import stored_volume
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

# A volume with more label values than this holds instances, not classes.
MOST_CLASSES = 64
# If a label has at least this many values and each value is one connected piece, the values number instances. With
# fewer they are classes; from LEAST_DOUBTFUL on, a warning says that they may be instances.
LEAST_INSTANCES = 9
LEAST_DOUBTFUL = 3
# Voxels of a default patch by device and dimensions: what trains in reasonable time and memory there.
_PATCH_VOXELS = {("cpu", 3): 64**3, ("cpu", 2): 256**2, ("cuda", 3): 128**3, ("cuda", 2): 512**2}


class LabelReading(NamedTuple):
    """How a target's labels are read: its kind, the channels of its head, and what the head learns of instances."""

    kind: str
    channels: int
    instances: str | None = None


def median_spacing(cases: Sequence[OpenCase]) -> tuple[float, ...]:
    """Return the median voxel size per spatial axis over the volumes."""
    axes = zip(*(case.spacing for case in cases), strict=True)
    return tuple(float(median(values)) for values in axes)


def needs_intensity_properties(scheme: str | Sequence[str], cases: Sequence[OpenCase]) -> bool:
    """Whether a normalisation scheme needs statistics of the images.

    The scheme "unit" needs none for uint8, which usually fills the range of its type. Other types often do not: 12-bit
    data in uint16 would be scaled to nearly 0.
    """
    if not isinstance(scheme, str):
        return any(needs_intensity_properties(one, cases) for one in scheme)
    if scheme == "unit":
        return any(np.dtype(stored_volume(case.image).dtype) != np.uint8 for case in cases)
    return scheme != "none"


def default_patch_size(
    cases: Sequence[OpenCase], spacing: Sequence[float], device: str = "cpu", *, voxels: int | None = None
) -> tuple[int, ...]:
    """Choose a patch from the volumes' shapes and spacing.

    The patch has the same physical extent along every axis, limited by the median volume, and about as many voxels
    as suit the device. nnU-Net's planner starts the same way (Isensee et al. 2021).

    Args:
        cases: the opened volumes.
        spacing: voxel size per spatial axis.
        device: `cpu` or `cuda`.
        voxels: approximate number of voxels of a patch; None: as many as suit the device.

    Returns:
        Patch size in voxels, at least 8 along every axis.
    """
    shape = np.median([case.image.shape for case in cases], axis=0)
    budget = voxels or _PATCH_VOXELS[(device if device == "cuda" else "cpu", len(shape))]
    step = np.asarray(spacing, dtype=float)
    # The size of an axis is inversely proportional to its spacing; what a short axis cannot use goes to the others.
    free = np.ones(len(shape), dtype=bool)
    size = np.minimum(shape, 1.0)
    while free.any():
        left = budget / float(np.prod(size[~free])) if (~free).any() else float(budget)
        extent = (left * float(np.prod(step[free]))) ** (1.0 / int(free.sum()))
        ideal = extent / step
        full = free & (ideal >= shape)
        if not full.any():
            size[free] = ideal[free]
            break
        size[full] = shape[full]
        free &= ~full
    return tuple(max(8, round(float(value) / 8) * 8 if value >= 16 else math.ceil(value)) for value in size)


def detect_label_kind(
    name: str,
    config: TargetConfig,
    cases: Sequence[OpenCase],
    in_channels: int,
    origin: str,
    *,
    cache_dir: Path | None = None,
) -> LabelReading:
    """Determine how a target's labels are read and how many channels its head has.

    The target's entry takes precedence. Without one, the labels decide:

    - Labels with several channels are overlapping binary masks.
    - Labels with 0 and one other value are binary.
    - Labels with more values are exclusive classes.
    - Labels of 16 bits or more with more than 64 values, and labels with nine or more values of which each is one
      connected piece, number instances; the head learns their foreground.

    If no volume has a label, the head has as many channels as the image.

    Args:
        name: name of the target.
        config: its checked entry.
        cases: the opened volumes.
        in_channels: image channels.
        origin: the file the entry comes from, for errors.
        cache_dir: folder that caches the values of labels, or None.

    Returns:
        Kind (binary, multiclass, multilabel, distance), channels, and what the head learns of instances, if any.

    Raises:
        VolumenError: the labels hold more values than the entry allows, or so many that they may be instances; or
            the entry contradicts itself or the labels.
    """
    where = f"{origin}: targets.{name}"
    if config.instances is not None:
        reading = _instances(where, name, config, cases)
    else:
        reading = _reading(where, name, config, cases, in_channels, cache_dir)
    _check_agreement(where, config, reading.kind, reading.channels)
    return reading


def _instances(where: str, name: str, config: TargetConfig, cases: Sequence[OpenCase]) -> LabelReading:
    for case in cases:
        if name in case.labels and case.labels[name].channels > 1:
            raise VolumenError(
                f"{where}.instances",
                expected="labels of one channel",
                found=f"{case.labels[name].channels} in {case.labels[name].path}",
                remedy="leave it out, or save one label per channel",
            )
    return LabelReading("distance" if config.instances == "distance" else "binary", 1, config.instances)


def _reading(
    where: str,
    name: str,
    config: TargetConfig,
    cases: Sequence[OpenCase],
    in_channels: int,
    cache_dir: Path | None,
) -> LabelReading:
    labels = [case.labels[name] for case in cases if name in case.labels]
    channels = {label.channels for label in labels}
    if len(channels) > 1:
        raise VolumenError(where, expected="as many channels in every label", found=sorted(channels))
    if config.kind == "distance":
        raise VolumenError(
            f"{where}.kind",
            expected="instances: distance with it",
            found="distance alone",
            remedy="add instances: distance, or use an auxiliary task distance_transform",
        )
    if config.kind == "multilabel" or (channels and max(channels) > 1):
        found = max(channels, default=config.out_channels or in_channels)
        return LabelReading("multilabel", _agreeing(where, config.out_channels, found))
    if _says_classes(config):
        count = config.out_channels or 1
        return LabelReading(config.kind or ("binary" if count == 1 else "multiclass"), count)
    if not labels:
        return LabelReading("binary" if in_channels == 1 else "multilabel", in_channels)
    classes = _classes(where, labels, config, cache_dir)
    if classes is None:
        return LabelReading("binary", 1, "foreground")
    if config.activation == "softmax" or classes > 2 or config.kind == "multiclass":
        return LabelReading("multiclass", max(classes, 2))
    return LabelReading("binary", 1)


def _says_classes(config: TargetConfig) -> bool:
    """Whether the entry states the number of classes, so that the labels need not be read."""
    return config.out_channels is not None or config.kind == "binary"


def _check_agreement(where: str, config: TargetConfig, kind: str, head: int) -> None:
    """Refuse an entry whose kind, channels and activation contradict each other."""
    if config.kind not in (None, kind):
        raise VolumenError(
            f"{where}.kind",
            expected=f"{kind}, as its labels have several channels" if kind == "multilabel" else kind,
            found=config.kind,
            remedy="leave it out",
        )
    if (kind == "binary" and head != 1) or (kind == "multiclass" and head == 1):
        raise VolumenError(
            f"{where}.out_channels",
            expected=f"{'1' if kind == 'binary' else 'at least 2'} for kind {kind}",
            found=head,
            remedy="leave one of the two out",
        )
    if config.instances is not None and config.out_channels not in (None, 1):
        raise VolumenError(
            f"{where}.out_channels",
            expected=f"1 for instances: {config.instances}",
            found=config.out_channels,
            remedy="leave one of the two out",
        )
    if kind == "distance" and config.activation not in (None, "none"):
        raise VolumenError(
            f"{where}.activation",
            expected="none for a distance",
            found=config.activation,
            remedy="leave it out",
        )
    if config.activation == "softmax" and kind != "multiclass":
        raise VolumenError(
            f"{where}.activation",
            expected=f"sigmoid or none for a {kind} target of {counted(head, 'channel')}",
            found="softmax",
            remedy="leave it out, or set out_channels to the number of classes, background included",
        )


def _agreeing(where: str, configured: int | None, found: int) -> int:
    if configured not in (None, found):
        raise VolumenError(
            f"{where}.out_channels",
            expected=f"{found}, the channels of its labels",
            found=configured,
            remedy="leave it out",
        )
    return found


def check_classes(
    name: str,
    reading: LabelReading,
    config: TargetConfig,
    cases: Sequence[OpenCase],
    *,
    cache_dir: Path | None = None,
) -> None:
    """Refuse labels with classes beyond those of the head, before training starts.

    Only an entry that states the number of classes can be wrong; otherwise `detect_label_kind` has read all values. A
    label with a mask is not checked here, since outside its mask it may hold any value; training checks it.

    Args:
        name: name of the target.
        reading: how its labels are read.
        config: its checked entry.
        cases: the opened volumes.
        cache_dir: folder that caches the values of labels, or None.

    Raises:
        VolumenError: names the label's file and the value.
    """
    if not _says_classes(config) or reading.instances is not None:
        return
    if reading.kind not in ("binary", "multiclass"):
        return
    most = None if reading.kind == "binary" else reading.channels - 1
    labels = [case.labels[name] for case in cases if name in case.labels and name not in case.masks]
    labels = [label for label in labels if not _cannot_exceed(label.dtype, most)]
    for label, values in _values_of_each(labels, max(MOST_CLASSES, most or 0), cache_dir):
        foreign = [
            value
            for value in values
            if value != config.ignore_label and (value < 0 or (most is not None and value > most))
        ]
        if foreign:
            raise VolumenError(
                label.path,
                expected="0 and values above" if most is None else f"classes 0 to {most}",
                found=foreign[0] if foreign[0] < 0 else foreign[-1],
                remedy=f"set targets.{name}.ignore_label, or out_channels to the number of classes",
            )


def _cannot_exceed(dtype: np.dtype, most: int | None) -> bool:
    """Whether a type can hold no value below 0 and none above `most`."""
    if dtype == np.bool_:
        return True
    return dtype.kind == "u" and (most is None or np.iinfo(dtype).max <= most)


def check_finite(images: Sequence[Volume], *, cache_dir: Path | None = None) -> None:
    """Refuse images with NaN or infinite values before training starts; reads all floating-point images.

    Raises:
        VolumenError: names the image, the number of such values, and the position of the first.
    """
    from volumen.data.caching.records import Records
    from volumen.data.index.label_counts import default_threads
    from volumen.data.nonfinite import count_nonfinite
    from volumen.utils.terminal.progress import growing_bar

    fractions = [image for image in images if np.dtype(image.dtype).kind == "f"]
    with (
        Records.of(cache_dir, "nonfinite values", fractions) as records,
        growing_bar("finite values") as bar,
    ):
        for image in fractions:
            found = count_nonfinite(image, num_threads=default_threads(), records=records, bar=bar)
            if found.total:
                raise VolumenError(
                    image.path,
                    expected="finite intensities",
                    found=f"{found.total} NaN or infinite values, the first at {found.first}",
                    remedy="repair the image or set nonfinite: zero",
                )


def _values_of_each(
    labels: Sequence[Volume], most: int, cache_dir: Path | None
) -> Iterator[tuple[Volume, tuple[int, ...]]]:
    """Yield each label volume with its distinct values, see `label_values`."""
    from volumen.data.caching.records import Records
    from volumen.data.index.label_counts import default_threads
    from volumen.data.index.label_values import label_values
    from volumen.utils.terminal.progress import growing_bar

    with Records.of(cache_dir, "label values", labels) as records, growing_bar("label values") as bar:
        for label in labels:
            yield (
                label,
                label_values(label, most=most, num_threads=default_threads(), records=records, bar=bar),
            )


def _classes(
    where: str, labels: Sequence[Volume], config: TargetConfig, cache_dir: Path | None
) -> int | None:
    """Count the classes, background included; a single value other than 0, such as 255, is one class.

    Returns None if the values number instances.
    """
    ignore = config.ignore_label
    values: set[int] = set()
    first_in: dict[int, str] = {}
    sets: list[set[int]] = []
    for label, found in _values_of_each(labels, MOST_CLASSES, cache_dir):
        sets.append(set(found) - {0, ignore})
        values |= set(found)
        for value in found:
            first_in.setdefault(value, label.path)
        if len(values) > MOST_CLASSES:
            if label.dtype.itemsize > 1 and config.kind is None and min(values - {ignore}) >= 0:
                logger.warning(
                    "%s: %s holds more than %d values and is taken for instances, whose foreground is learned; "
                    "set instances: foreground, boundary, interior or distance, or out_channels if they are classes",
                    where,
                    label.path,
                    MOST_CLASSES,
                )
                return None
            raise VolumenError(
                f"{where} ({label.path})",
                f"holds more than {MOST_CLASSES} values: instances, or a label that was resampled as an image",
                remedy="set instances: foreground, boundary, interior or distance if they number instances, "
                "or out_channels if they are classes",
            )
    if ignore is not None:
        values.discard(ignore)
    foreground = sorted(values - {0})
    if foreground and foreground[0] < 0:
        raise VolumenError(
            where,
            "the labels hold negative values",
            found=f"{foreground[0]} in {first_in[foreground[0]]}",
            remedy=f"set ignore_label: {foreground[0]} if it means unknown",
        )
    if len(foreground) <= 1:
        if foreground and 0 not in values:
            logger.warning(
                "%s: the labels hold nothing but %d, which is learned as foreground everywhere; "
                "set ignore_label: %d if it means unknown",
                where,
                *foreground * 2,
            )
        return 2
    if len(foreground) >= LEAST_DOUBTFUL and not _named(config) and look_like_instances(labels, ignore):
        # Volumes with identical values hold the same organs or layers; equal numbers of objects would be chance.
        alike = len(sets) > 1 and all(other == sets[0] for other in sets)
        if len(foreground) >= LEAST_INSTANCES and not alike:
            logger.warning(
                "%s: each of the %d label values is one connected piece, so they are taken for instances, whose "
                "foreground is learned; set instances: foreground, boundary, interior or distance, or kind: multiclass "
                "if they are classes",
                where,
                len(foreground),
            )
            return None
        logger.warning(
            "%s: each of the %d label values is one connected piece and is learned as a class; set instances: "
            "foreground if they number instances, or kind: multiclass if they are classes",
            where,
            len(foreground),
        )
    if foreground != list(range(1, len(foreground) + 1)):
        raise VolumenError(
            where,
            expected="classes 0, 1, 2, ... without gaps",
            found=f"{_few(sorted(values))}, the last in {first_in[foreground[-1]]}",
            remedy="set ignore_label or out_channels, renumber the labels, or set instances: foreground if they number "
            "instances",
        )
    return len(foreground) + 1


def _named(config: TargetConfig) -> bool:
    """Whether the entry states that its values are classes."""
    return config.kind == "multiclass" or config.classes is not None or config.activation == "softmax"


def _few(values: Sequence[int]) -> str:
    """Return values as text; if there are many, only the first and the last ones."""
    shown = [str(value) for value in values]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:9], "...", *shown[-2:]])
