"""Shows a finished prediction as lazy layers with suitable display settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.inference.output.ome_zarr import LABELS
from volumen.napari_plugin.layers import PREDICTION

LayerData = tuple[Any, dict[str, Any], str]

#: Label maps up to this size are read into memory, so that painting on them is fast and does not change the file.
_EDITABLE_BYTES = 1 << 29

_LABELLED = ("binary", "multiclass", "multilabel")


def read_prediction(
    path: str | Path,
    image: str,
    kinds: dict[str, str],
    *,
    scale: Sequence[float],
    translate: Sequence[float],
    units: Sequence[Any] | None = None,
) -> list[LayerData]:
    """Return a prediction's layers as napari's layer tuples.

    Label maps become Labels layers, all other targets Image layers; a target with several channels has one layer per
    channel. The first layer is visible, the others are hidden.

    Args:
        path: OME-Zarr group that `volumen predict` wrote.
        image: name of the predicted layer.
        kinds: kind of every target, such as "binary" or "vector".
        scale: voxel size per spatial axis.
        translate: position of the first voxel per spatial axis.
        units: unit of both per spatial axis, as in the layer; None if it has none.
    """
    import dask.array
    import zarr

    group: Any = zarr.open_group(str(path), mode="r")
    layers: list[LayerData] = []
    for target in sorted(kinds, key=lambda name: kinds[name] not in (*_LABELLED, "instances")):
        place = next((place for place in (f"{LABELS}/{target}", target) if place in group), None)
        if place is None:
            continue
        stored = [group[place][str(level)] for level in range(len(list(group[place].array_keys())))]
        levels = [dask.array.from_array(array, chunks=array.chunks) for array in stored]
        kind = kinds[target]
        labels = kind == "instances" or (kind in _LABELLED and _holds_labels(group[place], levels[0].dtype))
        layers += _layers_of(levels, f"{image} {target}", kind, len(scale), labels=labels)
    for number, (_, options, _) in enumerate(layers):
        options.update(scale=list(scale), translate=list(translate), visible=number == 0)
        if units is not None:
            options["units"] = list(units)
        options["metadata"] = {PREDICTION: options["name"]}
    return layers


def _holds_labels(group: Any, dtype: np.dtype) -> bool:
    """Whether a target is stored as labels: a pyramid of means is one of probabilities, which may be uint8 too."""
    multiscales = group.attrs.get("ome", {}).get("multiscales") or [{}]
    return dtype.kind in "ui" and multiscales[0].get("type") != "mean"


def _layers_of(levels: list[Any], name: str, kind: str, ndim: int, *, labels: bool) -> list[LayerData]:
    if len(levels[0].shape) == ndim:
        return [_layer(levels, name, kind, labels=labels)]
    parts = _channel_names(kind, levels[0].shape[0])
    return [
        _layer([level[number] for level in levels], f"{name} {part}", kind, labels=labels)
        for number, part in enumerate(parts)
    ]


def _channel_names(kind: str, channels: int) -> list[str]:
    if kind in ("vector", "axis"):
        return list("xyz"[:channels])
    if kind == "tensor":
        return ["yy", "yx", "xx"] if channels == 3 else ["zz", "zy", "zx", "yy", "yx", "xx"]
    return [str(number) for number in range(channels)]


def _layer(levels: list[Any], name: str, kind: str, *, labels: bool) -> LayerData:
    finest = levels[0]
    if labels:
        small = finest.nbytes <= _EDITABLE_BYTES
        data = np.asarray(finest) if small else levels
        return data, {"name": name, **({} if small else {"multiscale": len(levels) > 1})}, "labels"
    options: dict[str, Any] = {"name": name, "multiscale": len(levels) > 1}
    if kind in _LABELLED:
        options.update(
            colormap="magma", contrast_limits=(0, 255 if finest.dtype.kind == "u" else 1), blending="additive"
        )
    elif kind in ("vector", "axis"):
        options.update(colormap="twilight_shifted", contrast_limits=(-1, 1))
    elif kind == "distance":
        options.update(colormap="twilight_shifted", contrast_limits=_symmetric(levels[-1]))
    else:
        options.update(colormap="viridis")
    return (levels if len(levels) > 1 else finest), options, "image"


def _symmetric(coarsest: Any) -> tuple[float, float]:
    largest = float(np.abs(np.asarray(coarsest, np.float32)).max()) or 1.0
    return -largest, largest
