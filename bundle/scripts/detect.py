"""What the data decide: spacing, patch size, and how each label is to be read."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from statistics import median

import numpy as np

from scripts.data.layout import OpenCase
from scripts.errors import VolumenError
from scripts.sections import TargetConfig

logger = logging.getLogger(__name__)

# Above this many label values a volume holds instances, not classes.
MOST_CLASSES = 64
# Voxels of a default patch by device and dimensions: what trains in reasonable time and memory there.
_PATCH_VOXELS = {("cpu", 3): 64**3, ("cpu", 2): 256**2, ("cuda", 3): 128**3, ("cuda", 2): 512**2}


def median_spacing(cases: Sequence[OpenCase]) -> tuple[float, ...]:
    """Return the median voxel size per spatial axis over the volumes."""
    axes = zip(*(case.spacing for case in cases), strict=True)
    return tuple(float(median(values)) for values in axes)


def needs_intensity_properties(scheme: str, cases: Sequence[OpenCase]) -> bool:
    """Whether a normalisation scheme has to see the images first.

    Only uint8 fills its type's range as a rule; 12-bit data in uint16 would be scaled to nearly nothing.
    """
    if scheme == "unit":
        return any(np.dtype(case.image.dtype) != np.uint8 for case in cases)
    return scheme != "none"


def default_patch_size(
    cases: Sequence[OpenCase], spacing: Sequence[float], device: str = "cpu", *, voxels: int | None = None
) -> tuple[int, ...]:
    """Choose a patch from the volumes' shapes and spacing.

    The patch has the same physical extent along every axis, as far as the median volume reaches, and about as
    many voxels as suit the device; nnU-Net's planner starts the same way (Isensee et al. 2021).

    Args:
        cases: the opened volumes.
        spacing: voxel size per spatial axis.
        device: `cpu` or `cuda`.
        voxels: about how many a patch is to have; None: as many as suit the device.

    Returns:
        Patch size in voxels, at least 8 along every axis.
    """
    shape = np.median([case.image.shape for case in cases], axis=0)
    budget = voxels or _PATCH_VOXELS[(device if device == "cuda" else "cpu", len(shape))]
    step = np.asarray(spacing, dtype=float)
    # Voxels are given to the axes in inverse proportion to spacing; what an axis cannot use goes to the others.
    free = np.ones(len(shape), dtype=bool)
    size = np.minimum(shape, 1.0)
    while free.any():
        left = budget / float(np.prod(size[~free])) if (~free).any() else float(budget)
        extent = (left * float(np.prod(step[free]))) ** (1.0 / int(free.sum()))
        wanted = extent / step
        full = free & (wanted >= shape)
        if not full.any():
            size[free] = wanted[free]
            break
        size[full] = shape[full]
        free &= ~full
    return tuple(max(8, round(float(value) / 8) * 8 if value >= 16 else math.ceil(value)) for value in size)


def detect_label_kind(
    name: str, config: TargetConfig, cases: Sequence[OpenCase], in_channels: int, origin: str
) -> tuple[str, int]:
    """Tell how a target's labels are read and how many channels its head has.

    What the entry says goes first. Otherwise a label with several channels is a set of overlapping binary masks,
    one with the values 0 and one other is binary, one with more values is a set of exclusive classes. Where no
    label can tell (no volume has one), the head has as many channels as the image.

    Args:
        name: name of the target.
        config: its checked entry.
        cases: the opened volumes.
        in_channels: image channels.
        origin: the file the entry comes from, for errors.

    Returns:
        Kind (binary, multiclass, multilabel) and channels.

    Raises:
        VolumenError: if the labels hold more values than the entry allows, or so many that they must be instances, or
            if what the entry says contradicts itself or the labels.
    """
    where = f"{origin}: targets.{name}"
    kind, head = _kind_and_channels(where, name, config, cases, in_channels)
    _check_agreement(where, config, kind, head)
    return kind, head


def _kind_and_channels(
    where: str, name: str, config: TargetConfig, cases: Sequence[OpenCase], in_channels: int
) -> tuple[str, int]:
    labels = [case.labels[name] for case in cases if name in case.labels]
    channels = {label.channels for label in labels}
    if len(channels) > 1:
        raise VolumenError(where, expected="as many channels in every label", found=sorted(channels))
    if config.kind == "multilabel" or (channels and max(channels) > 1):
        found = max(channels, default=config.out_channels or in_channels)
        return "multilabel", _agreeing(where, config.out_channels, found)
    if config.out_channels is not None:
        kind = config.kind or ("binary" if config.out_channels == 1 else "multiclass")
        return kind, config.out_channels
    if config.kind == "binary":
        return "binary", 1
    if not labels:
        return ("binary" if in_channels == 1 else "multilabel"), in_channels
    classes = _classes(where, labels, config.ignore_label)
    if config.activation == "softmax" or classes > 2 or config.kind == "multiclass":
        return "multiclass", max(classes, 2)
    return "binary", 1


def _check_agreement(where: str, config: TargetConfig, kind: str, head: int) -> None:
    """Refuse an entry whose kind, channels and activation do not go together."""
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
    if config.activation == "softmax" and kind != "multiclass":
        raise VolumenError(
            f"{where}.activation",
            expected=f"sigmoid or none for a {kind} target of {head} channel{'s' * (head != 1)}",
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


def _classes(where: str, labels: Sequence, ignore: int | None) -> int:
    """Count the classes, background included; a single value other than 0, such as 255, is one class."""
    from scripts.data.label_values import label_values

    values: set[int] = set()
    for label in labels:
        values |= set(label_values(label))
        if len(values) > MOST_CLASSES:
            raise VolumenError(
                f"{where} ({label.path})",
                f"holds more than {MOST_CLASSES} values and looks like instances",
                remedy="set kind: binary to learn foreground, or out_channels for that many classes",
            )
    if ignore is not None:
        values.discard(ignore)
    foreground = sorted(values - {0})
    if foreground and foreground[0] < 0:
        raise VolumenError(
            where,
            "the labels hold negative values",
            found=foreground[0],
            remedy=f"set ignore_label: {foreground[0]}",
        )
    if len(foreground) <= 1:
        return 2
    if foreground != list(range(1, len(foreground) + 1)):
        raise VolumenError(
            where,
            expected="classes 0, 1, 2, ... without gaps",
            found=sorted(values)[:12],
            remedy="set ignore_label or out_channels, or renumber the labels",
        )
    return len(foreground) + 1
