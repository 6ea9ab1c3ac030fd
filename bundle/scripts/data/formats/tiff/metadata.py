"""Voxel sizes in TIFF files: from ImageJ's description and from OME-XML."""

from __future__ import annotations

from typing import Any

from volumen.data.formats.axes import AxisMap

Spacing = tuple[tuple[float, ...] | None, str | None]

_MICROMETERS = {
    "pm": 1e-6,
    "Å": 1e-4,
    "nm": 1e-3,
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
}


def tiff_spacing(tiff: Any, axis_map: AxisMap) -> Spacing:
    """Return the voxel size per spatial axis and its unit, (None, None) where the file states none.

    Plain TIFF resolutions are left aside: most of them are print resolutions made up by a program.

    Args:
        tiff: an open `tifffile.TiffFile`.
        axis_map: the axes of its first series.
    """
    ndim = len(axis_map.spatial)
    if tiff.is_ome:
        return _ome_spacing(tiff, ndim)
    if tiff.is_imagej:
        return _imagej_spacing(tiff, ndim)
    return None, None


def _imagej_spacing(tiff: Any, ndim: int) -> Spacing:
    """ImageJ: pixels per unit in the resolution tags, the distance of slices in the description."""
    metadata, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
    unit = str(metadata.get("unit", "")).replace("\\u00B5", "µ")
    plane = [_inverse(tags.get(name)) for name in ("YResolution", "XResolution")]
    if unit in ("", "pixel", "pixels") and "spacing" not in metadata:
        return None, None
    sizes = [float(metadata.get("spacing", 1.0)) or 1.0, *(size or 1.0 for size in plane)]
    return tuple(abs(size) for size in sizes[-ndim:]), _unit(unit)


def _inverse(tag: Any) -> float | None:
    if tag is None:
        return None
    numerator, denominator = tag.value
    return denominator / numerator if numerator and denominator else None


def _ome_spacing(tiff: Any, ndim: int) -> Spacing:
    """OME-XML: PhysicalSizeX, Y, Z of the first image, each with a unit that defaults to micrometers."""
    import tifffile

    try:
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        sizes = [float(pixels[f"PhysicalSize{axis}"]) for axis in "ZYX"[-ndim:]]
    except (KeyError, TypeError, ValueError):
        return None, None
    units = [str(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "ZYX"[-ndim:]]
    if len(set(units)) > 1:
        if not set(units) <= set(_MICROMETERS):
            return None, None
        sizes = [size * _MICROMETERS[unit] for size, unit in zip(sizes, units)]
        units = ["µm"]
    return tuple(sizes), _unit(units[-1])


def _unit(text: str) -> str | None:
    names = {
        "µm": "micrometer",
        "um": "micrometer",
        "micron": "micrometer",
        "Å": "angstrom",
        "nm": "nanometer",
        "mm": "millimeter",
    }
    return names.get(text.replace("μ", "µ"), text) or None
