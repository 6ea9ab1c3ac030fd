"""Metadata of a prediction for viewers: colours of labels, ranges of channels, and the list of its images.

Sources: the NGFF specification 0.5, sections "omero", "image-label" and "bioformats2raw"
(https://ngff.openmicroscopy.org/0.5), and the OME schema 2016-06.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from volumen.data.space.units import OME_SYMBOLS
from volumen.inference.output.stored import OutputSpec

OME_VERSION = "0.5"
_SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_CHANNEL_COLOURS = ("FFFFFF", "FF0000", "00FF00", "0000FF", "00FFFF", "FF00FF", "FFFF00", "FF8000")
_ONE_COLOUR = "FFFFFF"
_PIXEL_TYPES = {
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "float16": "float",
    "float32": "float",
}


def omero(stored: OutputSpec) -> dict[str, Any]:
    """Return the `omero` metadata: name, colour and range of every channel of an image."""
    names = channel_names(stored)
    low, high = _value_range(stored)
    channels = []
    for number, name in enumerate(names):
        colour = _ONE_COLOUR if len(names) == 1 else _CHANNEL_COLOURS[1:][number % 7]
        channel: dict[str, Any] = {"label": name, "color": colour, "active": True}
        if low is not None:
            channel["window"] = {"min": low, "max": high, "start": low, "end": high}
        channels.append(channel)
    return {"channels": channels, "rdefs": {"model": "color"}}


def channel_names(stored: OutputSpec) -> list[str]:
    """Return the names of the stored channels: components of vectors and tensors, else numbers."""
    count, kind = stored.channels, stored.head.kind
    if count == 1:
        return [stored.head.name]
    if kind in ("vector", "axis"):
        return list("xyz"[:count])
    if kind == "tensor":
        return ["yy", "yx", "xx"] if count == 3 else ["zz", "zy", "zx", "yy", "yx", "xx"]
    return [str(number) for number in range(count)]


def _value_range(stored: OutputSpec) -> tuple[float, float] | tuple[None, None]:
    if stored.dtype == np.uint8:
        return (0, 1) if stored.is_labels else (0, 255)
    if stored.head.is_probability:
        return 0, 1
    return (-1, 1) if stored.head.kind in ("vector", "axis") else (None, None)


def image_label(stored: OutputSpec, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the `image-label` metadata: a colour per class, and its name if it has one.

    Instances have no entry, so that the viewer chooses their colours.

    Args:
        stored: a label map.
        classes: names of the classes from 0 on, or only the name of a single class.
    """
    from volumen.handlers.preview.colours import PALETTE

    result: dict[str, Any] = {"version": OME_VERSION}
    if stored.head.kind == "instances":
        return result
    values = stored.head.values or range(
        1, max(2, stored.head.channels if stored.head.activation == "softmax" else 2)
    )
    result["colors"] = [
        {"label-value": value, "rgba": [*(int(part) for part in PALETTE[(value - 1) % len(PALETTE)]), 255]}
        for value in values
    ]
    names = dict(enumerate(classes or ())) if stored.head.activation == "softmax" else {}
    if stored.head.values:
        names = dict(zip(stored.head.values, classes or (), strict=False))
    result["properties"] = [
        {
            "label-value": value,
            "class": str(names.get(value, stored.head.name if len(values) == 1 else value)),
        }
        for value in values
    ]
    return result


def ome_xml(
    images: Mapping[str, OutputSpec], shape: tuple[int, ...], spacing: tuple[float, ...], unit: str | None
) -> bytes:
    """Return the text of `OME/METADATA.ome.xml`, which lists the images of a container.

    Args:
        images: how each image is stored, by the path of its group.
        shape: spatial shape.
        spacing: voxel size per axis.
        unit: unit of the spacing, or None.
    """
    root = ElementTree.Element("OME", {"xmlns": _SCHEMA, "Creator": "volumen"})
    sizes = dict(zip("ZYX"[-len(shape) :], shape, strict=True))
    steps = dict(zip("ZYX"[-len(shape) :], spacing, strict=True))
    for number, (path, stored) in enumerate(images.items()):
        # napari-ome-zarr takes the group's path from the ID.
        image = ElementTree.SubElement(root, "Image", {"ID": f"Image:{path}", "Name": stored.head.name})
        pixels = ElementTree.SubElement(
            image,
            "Pixels",
            {
                "ID": f"Pixels:{number}",
                "DimensionOrder": "XYZCT",
                "Type": _PIXEL_TYPES[stored.dtype.name],
                "SizeX": str(sizes["X"]),
                "SizeY": str(sizes["Y"]),
                "SizeZ": str(sizes.get("Z", 1)),
                "SizeC": str(stored.channels),
                "SizeT": "1",
                **{f"PhysicalSize{axis}": f"{step:.12g}" for axis, step in steps.items()},
                **{f"PhysicalSize{axis}Unit": OME_SYMBOLS.get(unit or "", "pixel") for axis in steps},
            },
        )
        for channel, name in enumerate(channel_names(stored)):
            attributes = {"ID": f"Channel:{number}:{channel}", "Name": name, "SamplesPerPixel": "1"}
            ElementTree.SubElement(pixels, "Channel", attributes)
        ElementTree.SubElement(pixels, "MetadataOnly")
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
