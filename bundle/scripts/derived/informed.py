"""What is known of a derived target where labels are partly unknown: `validity: informed`."""

from __future__ import annotations

from typing import Any, NamedTuple

EXACT, INFORMED, COMPLETED = VALIDITIES = ("exact", "informed", "completed")

DIRECTED_KINDS = ("vector", "tensor")
"""Kinds of targets of which only a part may be known: that across a direction."""


class Informed(NamedTuple):
    """A derived target with what is known of it at each voxel, for a patch (or for a batch, with an axis in front).

    Attributes:
        values: float32 (C, *spatial). For a distance with `upper` its lower bound, else the value or its estimate.
        valid: bool (1, *spatial), where the values are exact: the mask for code that knows nothing of the rest.
        confidence: float32 (1, *spatial) in [0, 1], the weight in a loss; 1 where `valid`, 0 where nothing is known.
        upper: float32 (C, *spatial), the upper bound; None for targets without bounds.
        free: float32 (D, *spatial), in the order (x, y[, z]): a unit vector along which nothing is known, 0 where the
            target is known in all directions; None for targets without directions.
    """

    values: Any
    valid: Any
    confidence: Any
    upper: Any = None
    free: Any = None
