"""Checks whether two volumes lie at the same place in space, and reorients or warns if they do not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median

from volumen.data.formats.volumes import Volume
from volumen.data.space.geometry import Geometry, is_parallel, nearest_turn
from volumen.data.turned import TurnedVolume
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

OBLIQUE_DEGREES = 10.0
"""Rotation between two scans, in degrees, from which a warning is logged."""


def aligned_to_grid(
    volume: Volume, geometry: Geometry, shape: Sequence[int], name: str, *, remedy: str | None = None
) -> Volume:
    """Return a volume reoriented to the axes of another grid, if their order or direction differs.

    A volume that lies elsewhere, is rotated by other angles, or has another voxel size is returned unchanged, with a
    warning, or refused. If the place of one of the two is not known, only voxel sizes are compared.

    Args:
        volume: a label, a mask or another prediction of the same image.
        geometry: geometry of the other grid.
        shape: shape of the other grid.
        name: name of the other volume, for messages.
        remedy: what the user can do where the volume must not differ; None: it may, with a warning.

    Raises:
        VolumenError: the volume differs, and a remedy is given.
    """
    own = volume.geometry
    if not (own.is_placed and geometry.is_placed and own.frame == geometry.frame):
        if not own.same_spacing(geometry):
            _differs(volume, _other_size(own, geometry, name), remedy)
        return volume
    turn, angle = nearest_turn(geometry, own)
    if not is_parallel(angle):
        _differs(volume, f"lies elsewhere in space than {name}: turned by {angle:.1f} degrees", remedy)
        return volume
    turned = own.turned(turn, volume.shape)
    if not turn.is_identity:
        if turn.of_axes(volume.shape) == tuple(shape) and geometry.covers(turned):
            logger.info("%s: its axes run otherwise than those of %s, and are turned", volume.source, name)
            return TurnedVolume(volume, turn)
        ways = f"its axes run otherwise{_ways(own, geometry)}, and turned it would cover another place"
        _differs(volume, f"lies elsewhere in space than {name}: {ways}", remedy)
    elif not own.same_spacing(geometry):
        _differs(volume, _other_size(own, geometry, name), remedy)
    elif not geometry.covers(own):
        away = ", ".join(f"{value:.4g}" for value in geometry.shift(own))
        axes = "z, y, x"[-3 * len(shape) + 2 :]
        words = f"lies elsewhere in space than {name}: it begins {away} voxels ({axes}) away"
        _differs(volume, words, remedy, "correct its translation or affine")
    return volume


def _other_size(own: Geometry, other: Geometry, name: str) -> str:
    return f"has voxels of {own.text()}, but those of {name} are {other.text()}"


def _differs(volume: Volume, words: str, remedy: str | None, hint: str = "") -> None:
    """Warn of a difference, or refuse it where a remedy is given.

    Raises:
        VolumenError: a remedy is given.
    """
    if remedy is not None:
        raise VolumenError(volume.source, words, remedy=", or ".join(filter(None, (hint, remedy))))
    logger.warning("%s %s", volume.source, "; ".join(filter(None, (words, hint))))


def _ways(one: Geometry, other: Geometry) -> str:
    return f" ({one.orientation}, not {other.orientation})" if one.orientation and other.orientation else ""


def refuse_impossible(volume: Volume, remedy: str) -> None:
    """Refuse a volume whose file states an impossible voxel size.

    Raises:
        VolumenError: the size is impossible; names the file and the size.
    """
    if volume.geometry.problem:
        raise VolumenError(
            volume.source, expected="voxel sizes above 0", found=volume.geometry.problem, remedy=remedy
        )


def warn_impossible(volume: Volume) -> None:
    """Warn of a volume whose file states an impossible voxel size; the size counts as unknown."""
    if volume.geometry.problem:
        logger.warning("%s: states %s, which counts as unknown", volume.source, volume.geometry.problem)


def common_spacings(
    names: Sequence[str],
    spacings: Sequence[tuple[float, ...] | None],
    units: Sequence[str | None],
    setting: str = "dataset_config.spacing",
) -> tuple[list[tuple[float, ...]], str | None]:
    """Return the voxel sizes of several volumes in the unit of the first volume that states one.

    A volume without a size is assumed to have the median of the others, with a warning.

    Args:
        names: names of the volumes in warnings.
        spacings: size per axis, or None if it is unknown; at least one must be known.
        units: unit of each volume, or None if it is unknown.
        setting: name of the setting that overrides the files.
    """
    unit = next((unit for unit in units if unit is not None), None)
    converted: list[tuple[float, ...] | None] = []
    for name, spacing, own in zip(names, spacings, units, strict=True):
        if spacing is not None and unit is not None and own is None:
            logger.warning("%s: states a voxel size without a unit; it counts as %s", name, unit)
        converted.append(Geometry(spacing, own).in_unit(unit).spacing)
        if own not in (None, unit):
            moved = " x ".join(f"{size:g}" for size in converted[-1] or ())
            logger.info("%s: voxels of %s are %s %s", name, Geometry(spacing, own).text(), moved, unit)
    known = [spacing for spacing in converted if spacing is not None]
    usual = tuple(float(median(axis)) for axis in zip(*known, strict=True))
    for name, spacing in zip(names, converted, strict=True):
        if spacing is None:
            logger.warning(
                "%s: states no voxel size, as other volumes do; it counts as %s, their median. Set %s if that is wrong",
                name,
                Geometry(usual, unit).text(),
                setting,
            )
    return [spacing or usual for spacing in converted], unit
