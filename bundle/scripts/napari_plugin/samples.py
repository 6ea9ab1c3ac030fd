"""Sample data: a phantom for trying the widget."""

from __future__ import annotations

from typing import Any

Layer = tuple[Any, dict[str, Any], str]


def phantom(size: int = 96) -> list[Layer]:
    """Return a scanned roll, its partial labels and the mask of the labelled part, as napari's layer tuples.

    Args:
        size: voxels along each side.
    """
    import numpy as np

    from volumen.phantom.geometry import Roll, sheet_geometry
    from volumen.phantom.volume import IMAGE, TARGET, labelled_slabs, scan

    shape = (size,) * 3
    geometry = sheet_geometry(Roll.draw(shape, 0), shape)
    mask = labelled_slabs(shape)
    label = (geometry.distance <= 0).astype(np.uint8) * mask
    return [
        (scan(geometry.distance, geometry.along, 0), {"name": IMAGE}, "image"),
        (label, {"name": f"{IMAGE}_{TARGET}"}, "labels"),
        (mask, {"name": f"{IMAGE}_mask", "visible": False}, "labels"),
    ]
