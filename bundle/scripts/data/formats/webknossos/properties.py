"""The description of a WEBKNOSSOS dataset: the file `datasource-properties.json`.

Source: https://docs.webknossos.org/webknossos/data/wkw.html and the `webknossos` Python library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volumen.utils.errors import VolumenError

PROPERTIES = "datasource-properties.json"
SEGMENTATION = "segmentation"
_UNIT = "nanometer"


@dataclass(frozen=True)
class Mag:
    """A magnification of a layer.

    Args:
        factor: voxels of the finest grid per voxel, (X, Y, Z).
        path: its folder, relative to the dataset.
        axes: letters of the axes of its array, "cxyz" in most datasets.
    """

    factor: tuple[int, ...]
    path: str
    axes: str = "cxyz"

    @property
    def name(self) -> str:
        """The name that WEBKNOSSOS shows: "2", or "4-4-1"."""
        return mag_name(self.factor)


@dataclass(frozen=True)
class Layer:
    """A layer of a dataset.

    Args:
        name: its name.
        category: "color" or "segmentation".
        format: "wkw", "zarr", "zarr3", ...
        start, size: bounding box in voxels of the finest grid, (X, Y, Z).
        mags: its magnifications, the finest first.
    """

    name: str
    category: str
    format: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    mags: tuple[Mag, ...]


@dataclass(frozen=True)
class Properties:
    """The description of a dataset.

    Args:
        layers: its layers.
        spacing: voxel size of the finest grid, (X, Y, Z).
        unit: unit of the spacing.
    """

    layers: tuple[Layer, ...]
    spacing: tuple[float, ...]
    unit: str

    @property
    def factors(self) -> list[tuple[int, ...]]:
        """The magnifications of all layers, the finest first: level 0, 1, ..."""
        return sorted({mag.factor for layer in self.layers for mag in layer.mags}, key=lambda f: (max(f), f))


def mag_name(factor: Sequence[int]) -> str:
    """Return the name of a magnification."""
    return str(factor[0]) if len(set(factor)) == 1 else "-".join(map(str, factor))


def parse_properties(where: object, content: Mapping[str, Any]) -> Properties:
    """Return the description of a dataset.

    Args:
        where: the dataset, named in errors.
        content: the content of the file.

    Raises:
        VolumenError: something is missing.
    """
    try:
        scale = content["scale"]
        unit = scale.get("unit", _UNIT) if isinstance(scale, Mapping) else _UNIT
        factor = scale["factor"] if isinstance(scale, Mapping) else scale
        layers = tuple(_layer(entry) for entry in content["dataLayers"])
        return Properties(layers, tuple(float(value) for value in factor), str(unit))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise VolumenError(
            where,
            f"its {PROPERTIES} is damaged",
            found=f"{type(error).__name__}: {error}",
            remedy="copy it again",
        ) from None


def _layer(entry: Mapping[str, Any]) -> Layer:
    box = entry["boundingBox"]
    mags = []
    for mag in entry.get("mags") or entry.get("wkwResolutions") or entry.get("resolutions") or ():
        factor = _factor(mag.get("mag", mag.get("resolution")) if isinstance(mag, Mapping) else mag)
        stated = mag if isinstance(mag, Mapping) else {}
        order = stated.get("axisOrder")
        axes = "cxyz" if not order else "".join(sorted(order, key=lambda name: int(order[name])))
        path = str(stated.get("path") or f"{entry['name']}/{mag_name(factor)}").removeprefix("./")
        mags.append(Mag(factor, path, axes))
    return Layer(
        entry["name"],
        entry.get("category", "color"),
        entry.get("dataFormat", "wkw"),
        tuple(int(value) for value in box["topLeft"]),
        (int(box["width"]), int(box["height"]), int(box["depth"])),
        tuple(sorted(mags, key=lambda mag: (max(mag.factor), mag.factor))),
    )


def _factor(value: Any) -> tuple[int, ...]:
    if isinstance(value, Mapping):
        value = [value[axis] for axis in "xyz"]
    if isinstance(value, str):
        value = [int(part) for part in value.split("-")]
    values = list(value) if isinstance(value, Sequence) else [value]
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"a magnification of {value}")
    return tuple(int(part) for part in values)
