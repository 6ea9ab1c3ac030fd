"""Finds voxels at the boundary of a class or an instance."""

from __future__ import annotations

import numpy as np

BOUNDARY_SIDES = ("both", "inner", "outer")


def boundary(
    labels: np.ndarray, known: np.ndarray, side: str = "both", in_volume: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels that have a face neighbour with another label.

    B = { p : there is a neighbour q across a face with label(q) != label(p) }; "inner": those of B
    with a label above 0, "outer": those in the background. Touching instances have a boundary between them. Such
    maps have separated the cells of electron microscopy since Ciresan et al., "Deep Neural Networks Segment Neuronal
    Membranes in Electron Microscopy Images", 2012.

    Args:
        labels: integer (C, *spatial), 2 or 3 spatial axes; two voxels are equal if all channels are.
        known: bool (*spatial): False for unknown voxels, which form no boundary.
        side: "both", "inner" or "outer".
        in_volume: bool (*spatial), False outside the volume; neighbours there form no boundary; default
        everywhere.

    Returns:
        boundary bool (*spatial); valid bool (*spatial): the voxel is known, and so are its neighbours, unless
        a known neighbour already decides the value.

    Raises:
        ValueError: another `side`.
    """
    if side not in BOUNDARY_SIDES:
        raise ValueError(f"side must be one of {BOUNDARY_SIDES}, got {side!r}")
    found = np.zeros(known.shape, bool)
    open_question = np.zeros(known.shape, bool)
    unknown = ~known if in_volume is None else in_volume & ~known
    for axis in range(known.ndim):
        lines, sure = np.moveaxis(labels, axis + 1, 1), np.moveaxis(known, axis, 0)
        unsure = np.moveaxis(unknown, axis, 0)
        differ = (lines[:, 1:] != lines[:, :-1]).any(axis=0) & sure[1:] & sure[:-1]
        for target, change in ((found, differ), (open_question, unsure[1:] | unsure[:-1])):
            moved = np.moveaxis(target, axis, 0)
            moved[1:] |= change
            moved[:-1] |= change
    of_side = np.ones(known.shape, bool)
    if side != "both":
        of_side = (labels > 0).any(axis=0) == (side == "inner")
    valid = known & (found | ~open_question | ~of_side)
    return found & of_side & valid, valid
