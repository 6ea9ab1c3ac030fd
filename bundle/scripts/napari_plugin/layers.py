"""Selects the viewer's layers and stores them so that another process can read them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from volumen.utils.errors import VolumenError

#: Key of a layer's metadata: the name under which a prediction was added.
PREDICTION = "volumen_prediction"

_SLAB_BYTES = 1 << 26


@dataclass(frozen=True)
class LayerFile:
    """An Image or Labels layer, its finest array stored as zarr.

    Args:
        name: name of the layer.
        kind: "image" or "labels".
        path: the zarr array.
        scale: voxel size per axis of the layer.
        rgb: whether the last axis contains colours.
        unit: unit of the scale, or None if the layer has none.
        translate: place of the first voxel per axis, in the unit; empty: 0.
    """

    name: str
    kind: str
    path: str
    scale: tuple[float, ...]
    rgb: bool = False
    unit: str | None = None
    translate: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class LayerArray:
    """An Image or Labels layer with its finest array, taken from the viewer.

    Args:
        name: name of the layer.
        kind: "image" or "labels".
        array: any object that can be sliced like an array.
        scale: voxel size per axis of the layer.
        rgb: whether the last axis contains colours.
        unit: unit of the scale, or None if the layer has none.
        translate: place of the first voxel per axis, in the unit; empty: 0.
    """

    name: str
    kind: str
    array: Any
    scale: tuple[float, ...]
    rgb: bool = False
    unit: str | None = None
    translate: tuple[float, ...] = ()

    @property
    def axes(self) -> str:
        """Letters of the array's axes."""
        ndim = len(self.array.shape) - self.rgb
        return {2: "yx", 3: "zyx"}.get(ndim, "czyx") + "c" * self.rgb


def layer_kind(layer: Any) -> str:
    """Return the kind of a napari layer, such as "image" or "labels"."""
    return str(getattr(layer, "_type_string", type(layer).__name__)).lower()


def is_prediction(layer: Any) -> bool:
    """Return whether a layer is a prediction under its original name; a renamed one is a layer like any other."""
    marked = (getattr(layer, "metadata", None) or {}).get(PREDICTION)
    return bool(marked) and str(layer.name).startswith(str(marked))


def trainable_layers(viewer: Any) -> list[Any]:
    """Return the layers to train on: images that have a Labels layer, with their labels and masks.

    Predictions and images without labels are excluded.

    Args:
        viewer: any object with `layers`.
    """
    layers = [layer for layer in viewer.layers if not is_prediction(layer)]
    labels = [layer for layer in layers if layer_kind(layer) == "labels"]
    images = [layer for layer in layers if layer_kind(layer) == "image"]
    labelled = [image for image in images if _labels(labels, image.name)]
    return [*(labelled or images), *labels]


def describe(viewer: Any) -> list[tuple[str, list[str], bool]]:
    """Return the training data: the name of each image, its targets, and whether a mask limits them.

    Raises:
        VolumenError: a layer is missing or does not fit; one line.
    """
    from volumen.data.napari_layers import cases_from_viewer

    layers = trainable_layers(viewer)
    images = [layer.name for layer in layers if layer_kind(layer) == "image"]
    if images and not any(_labels(layers, name) for name in images):
        raise VolumenError(
            "napari",
            expected="a Labels layer named <image>_<target>",
            found=f"none for image {images[0]!r}",
            remedy=f"add one named, say, {images[0]}_surface",
        )
    cases = cases_from_viewer(SimpleNamespace(layers=layers), allow_unlabeled=True)
    return [(case.name, sorted(case.labels), bool(case.masks)) for case in cases]


def _labels(layers: Iterable[Any], image: str) -> list[str]:
    """Return the names of an image's Labels layers, without masks."""
    names = [str(layer.name) for layer in layers if layer_kind(layer) == "labels"]
    return [name for name in names if name.startswith(f"{image}_") and not name.endswith("_mask")]


def take(layers: Iterable[Any]) -> list[LayerArray]:
    """Return the required content of napari layers, so that a thread needs no access to the viewer."""
    return [
        LayerArray(
            str(layer.name),
            layer_kind(layer),
            layer.data[0] if getattr(layer, "multiscale", False) else layer.data,
            tuple(float(value) for value in layer.scale),
            bool(getattr(layer, "rgb", False)),
            _unit(layer),
            tuple(float(value) for value in getattr(layer, "translate", ())),
        )
        for layer in layers
    ]


def _unit(layer: Any) -> str | None:
    """Return the unit of a layer's last axis; napari uses "pixel" if it is not known."""
    units = getattr(layer, "units", None)
    return None if units is None or str(units[-1]) == "pixel" else str(units[-1])


def store(
    arrays: Sequence[LayerArray],
    folder: Path,
    *,
    progress: Callable[[str, float], None] | None = None,
) -> list[LayerFile]:
    """Store layers as zarr, slab by slab; a zarr array on disk is not copied.

    Args:
        arrays: the layers.
        folder: destination folder of `<number>.zarr`.
        progress: called with a layer's name and the written share of it, 0 to 1.

    Raises:
        VolumenError: values are no real numbers, or the disk has too little space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored: list[LayerFile] = []
    for number, layer in enumerate(arrays):
        path = _stored_already(layer.array)
        if path is None:
            path = folder / f"{number}.zarr"
            _write(layer, path, progress or (lambda _name, _share: None))
        stored.append(
            LayerFile(layer.name, layer.kind, str(path), layer.scale, layer.rgb, layer.unit, layer.translate)
        )
    return stored


def _stored_already(array: Any) -> Path | None:
    """Return the folder of a zarr array on disk, or None for any other array."""
    import zarr

    if not isinstance(array, zarr.Array):
        return None
    root = getattr(array.store, "root", None)
    return None if root is None else Path(root) / array.path


def _write(layer: LayerArray, path: Path, progress: Callable[[str, float], None]) -> None:
    import zarr

    array = layer.array
    shape, dtype = tuple(int(size) for size in array.shape), np.dtype(array.dtype)
    if dtype.kind not in "buif":
        raise VolumenError(layer.name, expected="real numbers", found=str(dtype))
    if dtype.kind == "b":
        dtype = np.dtype(np.uint8)
    _check_room(layer.name, path.parent, math.prod(shape) * dtype.itemsize)
    first = layer.axes.index("y") - ("z" in layer.axes)
    chunks = tuple(
        size if letter == "c" else min(size, 64 if "z" in layer.axes else 512)
        for size, letter in zip(shape, layer.axes, strict=True)
    )
    # Compression shrinks labels a hundredfold at no cost; scanned images hardly shrink, and uncompressed ones are
    # read faster.
    compressors: Any = "auto" if layer.kind == "labels" else None
    target = zarr.create_array(path, shape=shape, chunks=chunks, dtype=dtype, compressors=compressors)
    plane = math.prod(shape) * dtype.itemsize // max(1, shape[first])
    step = chunks[first] * max(1, _SLAB_BYTES // max(1, plane * chunks[first]))
    for start in range(0, shape[first], step):
        slab = (slice(None),) * first + (slice(start, start + step),)
        target[slab] = np.asarray(array[slab])
        progress(layer.name, min(1.0, (start + step) / shape[first]))


def _check_room(name: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise VolumenError(
            f"layer {name}",
            expected=f"{needed / 1e9:.1f} GB of free space in {folder}",
            found=f"{free / 1e9:.1f} GB",
            remedy="choose another output folder, or open the image as a zarr array, which is not copied",
        )


def viewer_substitute(files: Sequence[Mapping[str, Any]]) -> SimpleNamespace:
    """Return an object that replaces the viewer in another process.

    Args:
        files: results of `LayerFile.to_dict()`.

    Returns:
        An object with `layers` for `volumen.napari_plugin.viewer.train_from_viewer`.
    """
    import zarr

    layers = [
        SimpleNamespace(
            name=file["name"],
            _type_string=file["kind"],
            data=zarr.open_array(Path(file["path"]), mode="r"),
            scale=tuple(file["scale"]),
            translate=tuple(file.get("translate") or ()) or None,
            units=None if file.get("unit") is None else (file["unit"],),
            rgb=file["rgb"],
            multiscale=False,
        )
        for file in files
    ]
    return SimpleNamespace(layers=layers)
