"""Instances of a part of predicted layers, with settings to be tuned; without napari or Qt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import instances_of
from volumen.inference.rules import InstanceRules
from volumen.utils.errors import VolumenError

_WALLS, _FOREGROUND = "walls", "foreground"


@dataclass(frozen=True)
class CropSettings:
    """What is tuned.

    Args:
        threshold: probability from which a voxel is wall, or foreground.
        merge_threshold: fragments merge while the mean wall probability between them is below this.
        min_size: instances of fewer voxels are removed.
        side: voxels of the part per axis.
    """

    threshold: float = 0.5
    merge_threshold: float = 0.5
    min_size: int = 0
    side: int = 96


@dataclass(frozen=True)
class Crop:
    """Instances of a part.

    Args:
        labels: uint32 (*space), 0 for none.
        start: first voxel of the part per axis of the layers.
        count: number of instances.
    """

    labels: np.ndarray
    start: tuple[int, ...]
    count: int


def crop_around(point: Sequence[float], shape: Sequence[int], side: int) -> tuple[slice, ...]:
    """Return the part of up to `side` voxels per axis around a point that lies in a volume.

    Args:
        point: voxel per axis.
        shape: shape of the volume.
        side: voxels per axis.
    """
    region = []
    for at, size in zip(point, shape, strict=True):
        low = min(max(round(at) - side // 2, 0), max(size - side, 0))
        region.append(slice(low, min(low + side, size)))
    return tuple(region)


def segment_crop(
    walls: Any | None,
    foreground: Any | None,
    point: Sequence[float],
    spacing: Sequence[float],
    settings: CropSettings,
) -> Crop:
    """Segment the instances of the part around a point, as `volumen predict --instances` does a volume of its size.

    Args:
        walls: array (*space) of wall probabilities, in [0, 1] or as uint8; None: none.
        foreground: array (*space) of foreground probabilities; None: all is inside.
        point: voxel per axis.
        spacing: voxel size per axis.
        settings: the settings.

    Raises:
        VolumenError: neither walls nor foreground, or arrays of different shapes.
    """
    given = {name: array for name, array in ((_WALLS, walls), (_FOREGROUND, foreground)) if array is not None}
    if not given:
        raise VolumenError("instances", expected="a layer of walls, of foreground, or both", found="none")
    shapes = {tuple(array.shape) for array in given.values()}
    if len(shapes) > 1:
        raise VolumenError(
            "instances", expected="layers of one shape", found=" and ".join(map(str, sorted(shapes)))
        )
    region = crop_around(point, next(iter(shapes)), settings.side)
    rules = InstanceRules(
        boundary=_WALLS if walls is not None else None,
        foreground=_FOREGROUND if foreground is not None else None,
        threshold=settings.threshold,
        merge_threshold=settings.merge_threshold,
        min_size=settings.min_size,
    )
    parts = {name: _probabilities(array, region)[None] for name, array in given.items()}
    labels = instances_of(parts, Source(rules, tuple(float(size) for size in spacing)))
    return Crop(labels, tuple(part.start for part in region), int(labels.max(initial=0)))


def _probabilities(array: Any, region: tuple[slice, ...]) -> np.ndarray:
    values = np.asarray(array[region])
    scale = 255.0 if values.dtype == np.uint8 else 1.0
    return values.astype(np.float32) / scale


def as_flags(settings: CropSettings, walls: str | None, foreground: str | None) -> str:
    """Return the text for `volumen predict --instances`, and for the field of the widget that predicts.

    Args:
        settings: the settings.
        walls, foreground: names of the heads, or None.
    """
    parts = [
        *([f"boundary={walls}"] if walls else []),
        *([f"foreground={foreground}"] if foreground else []),
        f"threshold={settings.threshold:g}",
        f"merge_threshold={settings.merge_threshold:g}",
        f"min_size={settings.min_size}",
    ]
    return ",".join(parts)
