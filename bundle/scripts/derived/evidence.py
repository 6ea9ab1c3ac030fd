"""Says which outputs of a derived target speak for the label that it is derived from, and with which sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volumen.derived.registry import complete_params, get_task

_SIGNS: dict[str, int] = {"affinities": 1, "skeleton": 1}
_DISTANCES = {"signed": -1, "outside": -1, "inside": 1}
_SIDES = {"inner": 1, "outer": -1}


def label_evidence(params: Mapping[str, Any], ndim: int) -> tuple[int, ...] | None:
    """Return a sign per channel of a derived target; None if its type says nothing about the label.

    1: a larger output (a logit or a value) makes the label more likely, -1: less likely. A signed distance is negative
    inside the label, voxels of an affinity or of a skeleton have the label, the inner side of a boundary has it and the
    outer side has not. A boundary of both sides says nothing. A task of a user may have a method
    `evidence(ndim, params)` that returns the signs.

    Args:
        params: the task's entry in `auxiliary_tasks`, with `type`.
        ndim: 2 or 3.
    """
    task = get_task(params["type"])
    full = complete_params(task, params)
    channels = task.out_channels(ndim, full)
    own = getattr(task, "evidence", None)
    if own is not None:
        signs = own(ndim, full)
        return None if signs is None else tuple(signs)
    if task.type_name == "distance_transform":
        # With a channel per class, a channel belongs to one class of several.
        return (_DISTANCES[full["distance_type"]],) if channels == 1 else None
    if task.type_name == "boundary":
        sign = _SIDES.get(full["side"])
        return None if sign is None else (sign,)
    sign = _SIGNS.get(task.type_name)
    return None if sign is None else (sign,) * channels
