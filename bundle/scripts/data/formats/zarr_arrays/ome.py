"""OME-Zarr metadata (0.1 to 0.5): the array, axes, scale and unit of a resolution level, and the labels.

Source: the NGFF specification, sections "axes", "coordinateTransformations", "multiscales" and "labels"
(https://ngff.openmicroscopy.org/0.4, https://ngff.openmicroscopy.org/0.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volumen.utils.errors import VolumenError
from volumen.utils.text import counted

LEVEL_SETTING = "dataset_config.ome_zarr_resolution"


@dataclass(frozen=True)
class LevelInfo:
    """One resolution level of a multiscale image.

    Args:
        path: path of the array inside its group.
        axes: one letter per stored axis, "tczyx" for instance.
        scale: size of a voxel per stored axis (1 for axes without a size), or None where the file gives none.
        unit: unit of the last spatial axis, or None.
    """

    path: str
    axes: str
    scale: tuple[float, ...] | None
    unit: str | None


def multiscale_of(attributes: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the first multiscale image of a group's attributes, or None."""
    images = ome_attributes(attributes).get("multiscales")
    return images[0] if isinstance(images, Sequence) and images else None


def ome_attributes(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes under "ome" (0.5), or all of them (0.4 and before)."""
    inner = attributes.get("ome")
    return inner if isinstance(inner, Mapping) else attributes


def label_names(attributes: Mapping[str, Any]) -> list[str]:
    """Return the names that a `labels` group lists."""
    return [str(name) for name in ome_attributes(attributes).get("labels", [])]


def level_info(where: object, multiscale: Mapping[str, Any], level: int) -> LevelInfo:
    """Read path, axes, scale and unit of a resolution level.

    The scale is the product of the level's own transformation and the one of the whole multiscale.

    Raises:
        VolumenError: there is no such level, or the metadata is malformed.
    """
    datasets = multiscale.get("datasets") or []
    if not 0 <= level < len(datasets):
        found = f"{counted(len(datasets), 'level')} (0 to {len(datasets) - 1})"
        raise VolumenError(where, expected=f"level {level}", found=found, remedy=f"lower {LEVEL_SETTING}")
    axes, unit = _axes(multiscale)
    try:
        scales = [
            _scale(_mapping(entry).get("coordinateTransformations"))
            for entry in (datasets[level], multiscale)
        ]
        scale = _product(where, scales, len(axes))
        return LevelInfo(str(datasets[level]["path"]), axes, scale, unit)
    except (KeyError, TypeError, ValueError) as error:
        raise VolumenError(
            where, f"has malformed multiscales metadata ({error!r})", remedy="write it again"
        ) from error


def _axes(multiscale: Mapping[str, Any]) -> tuple[str, str | None]:
    # Versions before 0.3 had no axes: always t, c, z, y, x. Version 0.3 had plain letters.
    axes = multiscale.get("axes") or list("tczyx")
    letters, unit = [], None
    for axis in axes:
        entry = axis if isinstance(axis, Mapping) else {"name": axis}
        letters.append(_letter(entry))
        if letters[-1] in "zyx":
            unit = entry.get("unit", unit)
    return "".join(letters), unit


def _letter(axis: Mapping[str, Any]) -> str:
    name, kind = str(axis.get("name", "")).lower(), axis.get("type")
    if kind == "channel":
        return "c"
    if kind == "time":
        return "t"
    return name[:1] or "?"


def _scale(transformations: Any) -> Sequence[float] | None:
    for entry in transformations or []:
        if _mapping(entry).get("type") == "scale" and "scale" in entry:
            return [float(value) for value in entry["scale"]]
    return None


def _mapping(entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"expected a mapping, found {entry!r}")
    return entry


def _product(where: object, scales: list[Sequence[float] | None], ndim: int) -> tuple[float, ...] | None:
    given = [scale for scale in scales if scale is not None]
    if not given:
        return None
    product = [1.0] * ndim
    for scale in given:
        if len(scale) != ndim:
            raise VolumenError(
                where, expected=f"a scale of {ndim} values, one per axis", found=str(list(scale))
            )
        product = [a * b for a, b in zip(product, scale)]
    return tuple(product)
