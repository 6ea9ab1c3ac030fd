"""Names of the units of length in image files, and their conversion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isclose

COMMON = "micrometer"
"""The unit to which sizes are converted if the axes state different units."""

_METRES = {
    "picometer": 1e-12,
    "angstrom": 1e-10,
    "nanometer": 1e-9,
    "micrometer": 1e-6,
    "millimeter": 1e-3,
    "centimeter": 1e-2,
    "decimeter": 1e-1,
    "meter": 1.0,
    "kilometer": 1e3,
    "inch": 0.0254,
    "foot": 0.3048,
}
"""Metres per unit; the names are those of OME-Zarr (UDUNITS-2)."""

_SYMBOLS = {
    "pm": "picometer",
    "å": "angstrom",
    "ångström": "angstrom",
    "nm": "nanometer",
    "µm": "micrometer",
    "um": "micrometer",
    "micron": "micrometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "dm": "decimeter",
    "m": "meter",
    "km": "kilometer",
    "in": "inch",
    '"': "inch",
    "ft": "foot",
}

_NO_UNIT = ("", "pixel", "voxel", "px", "unknown", "none", "reference frame", "arbitrary")

OME_SYMBOLS = {
    "picometer": "pm",
    "angstrom": "Å",
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "decimeter": "dm",
    "meter": "m",
    "kilometer": "km",
    "inch": "in",
    "foot": "ft",
}
"""Symbols of the OME schema's `UnitsLength`."""


_LENGTH = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([^\W\d_]+)\s*")


def parse_length(text: str) -> tuple[float, str] | None:
    """Return the number and the unit of a length such as "20um" or "0.5 mm"; None if the text is none above 0.

    >>> parse_length("20um"), parse_length("20"), parse_length("20 parsec")
    ((20.0, 'micrometer'), None, None)
    """
    match = _LENGTH.fullmatch(text)
    unit = unit_name(match[2]) if match else None
    if match is None or unit not in _METRES or float(match[1]) <= 0:
        return None
    return float(match[1]), unit


def unit_name(text: object) -> str | None:
    """Return the OME-Zarr name of a unit, the text itself if it is unknown, and None if there is no unit.

    Pixels and voxels are no units of length.
    """
    plain = str(text if text is not None else "").replace("\\u00B5", "µ").replace("μ", "µ").strip()
    short = plain.lower()
    short = (
        short[:-2] + "er" if short.endswith("metre") else short.removesuffix("s").replace("metre", "meter")
    )
    if short in _NO_UNIT:
        return None
    if short in _METRES:
        return short
    return _SYMBOLS.get(short, plain)


def factor(source: str, target: str) -> float | None:
    """Return the factor that converts a size from one unit to another; None if a unit is unknown."""
    if source == target:
        return 1.0
    if source not in _METRES or target not in _METRES:
        return None
    quotient = _METRES[source] / _METRES[target]
    # Powers of ten are exact; the quotient of two rounded numbers is not.
    for power in range(-18, 19):
        if isclose(quotient, 10.0**power, rel_tol=1e-12):
            return float(f"1e{power}")
    return quotient


def common_unit(
    sizes: Sequence[float], units: Sequence[str | None]
) -> tuple[tuple[float, ...], str | None] | None:
    """Return the sizes of all axes in one unit, and that unit.

    Args:
        sizes: size of a voxel per axis.
        units: unit per axis, as `unit_name` returns it.

    Returns:
        The sizes, unchanged if all units agree, else in micrometers; None if they cannot be converted.
    """
    if len(set(units)) == 1:
        return tuple(sizes), units[0]
    factors = [None if unit is None else factor(unit, COMMON) for unit in units]
    if any(value is None for value in factors):
        return None
    return tuple(size * float(value or 0) for size, value in zip(sizes, factors, strict=True)), COMMON
