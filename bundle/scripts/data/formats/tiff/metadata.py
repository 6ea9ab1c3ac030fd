"""Reads voxel sizes in TIFF files from ImageJ's description, from OME-XML, and from the resolution tags."""

from __future__ import annotations

import logging
from typing import Any

from volumen.data.formats.axes import AxisMap
from volumen.data.space.geometry import Geometry, stated_geometry
from volumen.data.space.units import unit_name

logger = logging.getLogger(__name__)

_PRINT = (
    1, 72, 75, 90, 96, 100, 120, 144, 150, 180, 200, 203, 240, 250, 254, 300, 350, 360, 400, 500, 508, 600, 720, 800,
    1000, 1016, 1200, 1440, 2400, 2540, 4800,
)  # fmt: skip
"""Pixels per inch of screens, printers and scanners, which programs write into any picture."""
_INCH, _CENTIMETER = 2, 3


def tiff_geometry(tiff: Any, axis_map: AxisMap) -> Geometry:
    """Return the voxel size that the file states.

    A resolution tag alone states the size of a pixel in 2D. It is ignored if its value is one of screens and printers,
    and in 3D, where it does not state the distance of slices.

    Args:
        tiff: an open `tifffile.TiffFile`.
        axis_map: axes of its first series.
    """
    ndim = len(axis_map.spatial)
    if tiff.is_ome:
        return _ome_geometry(tiff, ndim)
    if tiff.is_imagej:
        return _imagej_geometry(tiff, ndim)
    return _tag_geometry(tiff.pages[0].tags) if ndim == 2 else Geometry()


def _imagej_geometry(tiff: Any, ndim: int) -> Geometry:
    """Read ImageJ's metadata: pixels per unit in the resolution tags, distance of slices in the description.

    `unit` is that of X, and also of Y and Z unless `yunit` and `zunit` state another.
    """
    metadata, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
    unit = unit_name(metadata.get("unit"))
    if unit is None and "spacing" not in metadata:
        return Geometry()
    units = [unit_name(metadata.get(key)) or unit for key in ("zunit", "yunit", "unit")]
    plane = [_inverse(tags.get(name)) or 1.0 for name in ("YResolution", "XResolution")]
    sizes = [_number(metadata.get("spacing", 1.0)), *plane]
    return stated_geometry(sizes[-ndim:], units[-ndim:])


def _ome_geometry(tiff: Any, ndim: int) -> Geometry:
    """Read OME-XML: PhysicalSizeX, Y, Z of the first image, each with a unit that defaults to micrometers."""
    import tifffile

    try:
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
    except (KeyError, TypeError, ValueError):
        return Geometry()
    axes = "ZYX"[-ndim:]
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in axes]
    if None in sizes:
        if any(size is not None for size in sizes):
            missing = [axis.lower() for axis, size in zip(axes, sizes, strict=True) if size is None]
            logger.warning(
                "%s: states no voxel size along %s; all count as unknown", tiff.filehandle.path, missing[0]
            )
        return Geometry()
    units = [unit_name(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in axes]
    return stated_geometry([_number(size) for size in sizes], units)


def _tag_geometry(tags: Any) -> Geometry:
    """Return the size of a pixel from the resolution tags, which are per inch or centimetre."""
    unit = tags.get("ResolutionUnit")
    inch = {_INCH: 1.0, _CENTIMETER: 2.54}.get(int(unit.value) if unit else 0)
    sizes = [_inverse(tags.get(name)) for name in ("YResolution", "XResolution")]
    if inch is None or None in sizes:
        return Geometry()
    per_inch = [inch / float(size or 1) for size in sizes]
    if any(abs(value - known) <= 0.01 * known for value in per_inch for known in _PRINT):
        return Geometry()
    return stated_geometry([25400.0 / value for value in per_inch], "micrometer")


def _inverse(tag: Any) -> float | None:
    """Return the size of a pixel from a tag of pixels per unit; None without a tag, or for a resolution of 0."""
    if tag is None:
        return None
    numerator, denominator = tag.value
    return denominator / numerator if numerator and denominator else None


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return float("nan")
