"""Opens a view in napari: lazy layers, vectors as colours and as arrows around a place, distances diverging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from volumen.data.formats.volumes import Volume
from volumen.utils.errors import VolumenError
from volumen.viewing.layers import View, ViewLayer

LayerData = tuple[Any, dict[str, Any], str]

_SIDE, _EVERY = 64, 4
"""Voxels per axis of the part in which arrows are drawn, and the distance between them."""
_PROBABILITIES = ("binary", "multiclass", "multilabel")
_DIVERGING = [[0.1, 0.3, 0.8, 1], [1, 1, 1, 1], [0.8, 0.2, 0.1, 1]]
"""Colours of distances: blue inside, white at the boundary, red outside."""
_ERROR_COLOURS = {1: "orange", 2: "deepskyblue", 3: "magenta", None: "transparent"}


def show(view: View) -> None:
    """Open a window with the layers; return when it is closed.

    Raises:
        VolumenError: napari is not installed.
    """
    try:
        import napari
    except ImportError:
        raise VolumenError(
            "--with napari",
            "napari is not installed",
            remedy="pip install 'volumen[napari]', or --with neuroglancer",
        ) from None
    add_layers(napari.Viewer(title=f"volumen: {view.title}"), view)
    napari.run()


def add_layers(viewer: Any, view: View) -> None:
    """Add the layers of a view to a viewer, and show its position.

    Args:
        viewer: a `napari.Viewer`.
        view: the view.
    """
    from napari.layers import Layer

    for data in napari_layers(view):
        viewer.add_layer(Layer.create(*data))
    if view.position is not None:
        viewer.dims.point = [at * size for at, size in zip(view.position, view.spacing, strict=True)]
        viewer.camera.center = [at * size for at, size in zip(view.position, view.spacing, strict=True)]


def napari_layers(view: View) -> list[LayerData]:
    """Return the layers as napari's layer tuples: scale and translation are those of the first layer's voxels."""
    position = view.position or tuple(n // 2 for n in view.layers[0].levels[0].shape)
    found: list[LayerData] = []
    for item in view.layers:
        scale = view.spacing
        common = {
            "name": item.name,
            "scale": scale,
            "translate": [first * size for first, size in zip(item.start, scale, strict=True)],
            "visible": item.visible,
            "metadata": {"path": item.levels[0].path},
        }
        if view.unit is not None:
            common["units"] = [view.unit] * len(scale)
        found.append(_main_layer(item, common))
        if item.content.kind in ("vector", "axis") and item.content.channels == len(scale):
            found.append(_arrows(item, common, position))
    return found


def _main_layer(item: ViewLayer, common: dict[str, Any]) -> LayerData:
    kind, channels = item.content.kind, item.content.channels
    if item.is_labels:
        options: dict[str, Any] = {}
        if kind == "errors":
            from napari.utils.colormaps import DirectLabelColormap

            options["colormap"] = DirectLabelColormap(color_dict=_ERROR_COLOURS)
        return _multiscale(
            [_array(v)[0] for v in item.levels], {**common, **options, "opacity": 0.5}, "labels"
        )
    arrays = [_array(volume) for volume in item.levels]
    if kind in ("vector", "axis") and channels in (2, 3):
        return _multiscale(
            [_colours(array) for array in arrays], {**common, "rgb": True, "opacity": 0.6}, "image"
        )
    if kind == "image" and channels == 3 and item.levels[0].dtype == np.uint8:
        moved = [array.transpose(*range(1, array.ndim), 0) for array in arrays]
        return _multiscale(moved, {**common, "rgb": True}, "image")
    options = dict(common)
    if kind in _PROBABILITIES:
        options.update(colormap="magma", contrast_limits=(0, item.content.largest), blending="additive")
    elif kind == "distance":
        from napari.utils import Colormap

        reach = _reach(item.levels[-1])
        options.update(colormap=Colormap(_DIVERGING, name="signed distance"), contrast_limits=(-reach, reach))
    elif kind == "image":
        options.update(colormap="gray", contrast_limits=_range(item.levels[-1]))
    if channels == 1:
        return _multiscale([array[0] for array in arrays], options, "image")
    for key in ("scale", "translate"):
        options[key] = [1 if key == "scale" else 0, *options[key]]
    if "units" in options:
        options["units"] = ["pixel", *options["units"]]
    return _multiscale(arrays, options, "image")


def _multiscale(arrays: Sequence[Any], options: dict[str, Any], kind: str) -> LayerData:
    several = len(arrays) > 1
    return (list(arrays) if several else arrays[0]), {**options, "multiscale": several}, kind


def _array(volume: Volume) -> Any:
    """Return a lazy array (channels, *space) of a volume."""
    import dask.array

    shape = (volume.channels, *volume.shape)
    return dask.array.from_array(
        _Sliceable(volume),
        chunks=(
            volume.channels,
            *(min(max(c, 32), n) for c, n in zip(volume.chunks, volume.shape, strict=True)),
        ),
        meta=np.empty((0,) * len(shape), volume.dtype),
        name=False,
    )


class _Sliceable:
    """A volume that is sliced like an array (channels, *space)."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.shape, self.dtype = (volume.channels, *volume.shape), volume.dtype
        self.ndim = len(self.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        channels, *region = index
        whole = tuple(
            slice(*part.indices(size)[:2]) for part, size in zip(region, self._volume.shape, strict=True)
        )
        return self._volume.read(whole)[channels]


def _colours(array: Any) -> Any:
    """Return vectors (2 or 3, *space) as colours (*space, 3): the size of x, y, z as red, green, blue."""
    import dask.array

    values = (abs(array).clip(0, 1) * 255).astype(np.uint8)
    if array.shape[0] == 2:
        values = dask.array.concatenate([values, dask.array.zeros_like(values[:1])])
    return values.transpose(*range(1, array.ndim), 0).rechunk({-1: -1})


def _arrows(item: ViewLayer, common: dict[str, Any], position: Sequence[int]) -> LayerData:
    """Return some vectors around a position: arrows, or lines for directions without a sign."""
    volume = item.levels[0]
    region = []
    for at, first, size in zip(position, item.start, volume.shape, strict=True):
        low = min(max(at - first - _SIDE // 2, 0), max(size - _SIDE, 0))
        region.append(slice(low, min(low + _SIDE, size)))
    values = volume.read(tuple(region)).astype(np.float32)
    step = (slice(None), *[slice(_EVERY // 2, None, _EVERY)] * len(region))
    sampled = values[step]
    grid = np.stack(
        np.meshgrid(*[np.arange(p.start + _EVERY // 2, p.stop, _EVERY) for p in region], indexing="ij")
    ).reshape(len(region), -1)
    ends = sampled.reshape(len(sampled), -1)[::-1]  # stored as (x, y, z), drawn along (Z, Y, X)
    length = np.linalg.norm(ends, axis=0)
    data = np.stack([grid[:, length > 0.1].T, ends[:, length > 0.1].T], axis=1)
    # Components are in space, places in voxels.
    data[:, 1] /= np.asarray(common["scale"]) / min(common["scale"])
    style = "arrow" if item.content.kind == "vector" else "line"
    options = {**common, "name": f"{item.name} {style}s", "vector_style": style, "length": _EVERY * 0.9}
    return data, {**options, "edge_width": 0.3, "edge_color": "yellow", "visible": False}, "vectors"


def _reach(volume: Volume) -> float:
    """Return the largest distance in the middle of a volume."""
    return float(np.abs(_middle(volume).astype(np.float32)).max(initial=0)) or 1.0


def _range(volume: Volume) -> tuple[float, float]:
    """Return contrast limits: the 1st and 99.8th percentile of the middle of a volume."""
    values = _middle(volume).astype(np.float32)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, [1, 99.8]))
    return (low, high) if high > low else (low, low + 1.0)


def _middle(volume: Volume, side: int = 128) -> np.ndarray:
    return volume.read(
        tuple(slice(max(0, n // 2 - side // 2), min(n, n // 2 + side // 2)) for n in volume.shape)
    )
