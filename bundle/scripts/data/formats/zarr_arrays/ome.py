"""Reads OME-Zarr metadata (0.1 to 0.5): array, axes, scale, translation and units of a level, and the labels.

Source: the NGFF specification, sections "axes", "coordinateTransformations", "multiscales" and "labels"
(https://ngff.openmicroscopy.org/0.4, https://ngff.openmicroscopy.org/0.5).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volumen.data.formats.axes import AxisMap
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.units import unit_name
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

LEVEL_SETTING = "dataset_config.ome_zarr_resolution"


@dataclass(frozen=True)
class LevelInfo:
    """One resolution level of a multiscale image.

    Args:
        path: path of the array inside its group.
        axes: one letter per stored axis, such as "tczyx".
        scale: voxel size per stored axis (1 for axes without a size), or None if the file states none.
        translation: place of the first voxel per stored axis.
        units: unit per stored axis, None for axes without one.
    """

    path: str
    axes: str
    scale: tuple[float, ...] | None
    translation: tuple[float, ...]
    units: tuple[str | None, ...]

    def geometry(self, axis_map: AxisMap) -> Geometry:
        """Return the geometry of the level's voxel grid."""
        if self.scale is None:
            return Geometry()
        return stated_geometry(
            axis_map.of_space(self.scale),
            axis_map.of_space(self.units),
            origin=axis_map.of_space(self.translation),
        )


def multiscale_of(attributes: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the first multiscale image in the attributes of a group, or None."""
    images = ome_attributes(attributes).get("multiscales")
    return images[0] if isinstance(images, Sequence) and images else None


def ome_attributes(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes under "ome" (0.5), or all attributes (0.4 and earlier)."""
    inner = attributes.get("ome")
    return inner if isinstance(inner, Mapping) else attributes


def label_names(attributes: Mapping[str, Any]) -> list[str]:
    """Return the names that a `labels` group lists."""
    return [str(name) for name in ome_attributes(attributes).get("labels", [])]


def level_info(where: object, multiscale: Mapping[str, Any], level: int) -> LevelInfo:
    """Read path, axes, scale, translation and units of a resolution level.

    The level's transformations are applied first, then those of the whole multiscale image. In each, the scale is
    applied before the translation.

    Raises:
        VolumenError: there is no such level, or the metadata is malformed.
    """
    datasets = multiscale.get("datasets") or []
    if not 0 <= level < len(datasets):
        found = f"{counted(len(datasets), 'level')} (0 to {len(datasets) - 1})"
        raise VolumenError(where, expected=f"level {level}", found=found, remedy=f"lower {LEVEL_SETTING}")
    axes, units = _axes(multiscale)
    try:
        steps = [
            _mapping(step)
            for entry in (datasets[level], multiscale)
            for step in _mapping(entry).get("coordinateTransformations") or []
        ]
        scale, translation = _transformation(where, steps, len(axes))
        return LevelInfo(str(datasets[level]["path"]), axes, scale, translation, units)
    except (KeyError, TypeError, ValueError) as error:
        raise VolumenError(
            where, f"has malformed multiscales metadata ({error!r})", remedy="write it again"
        ) from error


def _axes(multiscale: Mapping[str, Any]) -> tuple[str, tuple[str | None, ...]]:
    # Versions before 0.3 had no axes: always t, c, z, y, x. Version 0.3 had plain letters.
    axes = multiscale.get("axes") or list("tczyx")
    letters, units = [], []
    for axis in axes:
        entry = axis if isinstance(axis, Mapping) else {"name": axis}
        letters.append(_letter(entry))
        units.append(unit_name(entry.get("unit")))
    return "".join(letters), tuple(units)


def _letter(axis: Mapping[str, Any]) -> str:
    name, kind = str(axis.get("name", "")).lower(), axis.get("type")
    if kind == "channel":
        return "c"
    if kind == "time":
        return "t"
    return name[:1] or "?"


def _mapping(entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"expected a mapping, found {entry!r}")
    return entry


def _transformation(
    where: object, steps: Sequence[Mapping[str, Any]], ndim: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...]]:
    """Return the scale and translation of a sequence of transformations."""
    scale: list[float] | None = None
    translation = [0.0] * ndim
    for step in steps:
        kind = step.get("type")
        values = step.get(kind) if kind in ("scale", "translation") else None
        if values is None:
            if kind != "identity":
                logger.warning("%s: its coordinate transformation of type %s is not applied", where, kind)
            continue
        if len(values) != ndim:
            raise VolumenError(
                where, expected=f"a {kind} of {ndim} values, one per axis", found=str(list(values))
            )
        numbers = [float(value) for value in values]
        if kind == "scale":
            scale = [a * b for a, b in zip(scale or [1.0] * ndim, numbers, strict=True)]
            translation = [a * b for a, b in zip(translation, numbers, strict=True)]
        else:
            translation = [a + b for a, b in zip(translation, numbers, strict=True)]
    return None if scale is None else tuple(scale), tuple(translation)
