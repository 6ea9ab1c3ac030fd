"""Derives one target from the labels of a patch or of a whole volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from volumen.derived.arrays.fields import check_spacing
from volumen.derived.informed import DIRECTED_KINDS, Informed
from volumen.derived.registry import DerivedTask, complete_params, get_task
from volumen.derived.source_fields import SourceFields


def derive_target(
    type_name: str,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    in_volume: np.ndarray | None = None,
    spacing: Sequence[float] | None = None,
    halo: Sequence[int] | int = 0,
    instances: bool = False,
    **params: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Derive one target from arrays.

    Args:
        type_name: a registered task type, such as "surface_normals".
        labels: integer (C, *spatial), as in `SourceFields`.
        known, in_volume, spacing, halo, instances: as in `SourceFields`.
        params: the keys of the type.

    Returns:
        values float32 (C, *core), valid bool (1, *core).
    """
    task = get_task(type_name)
    full = complete_params(task, params)
    source = SourceFields(
        labels,
        known=known,
        in_volume=in_volume,
        spacing=spacing,
        halo=halo,
        reach=full.get("reach"),
        margin=task.margin(full, check_spacing(labels.ndim - 1, spacing)),
        instances=instances,
    )
    return derive_from(source, type_name, full)


def derive_from(
    source: SourceFields, type_name: str, params: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Derive one target from fields that other targets may use too; `params` must be complete. Returns the result of
    `derive_target`."""
    task = get_task(type_name)
    if source.empty:
        channels = task.out_channels(source.ndim, params)
        values = np.zeros((channels, *source.core_shape), np.float32)
        return values, np.zeros((1, *source.core_shape), bool)
    values, valid = task.derive(source, params)
    return source.restore(values.astype(np.float32, copy=False)), source.restore(valid)


def derive_informed_from(source: SourceFields, type_name: str, params: Mapping[str, Any]) -> Informed:
    """Derive one target with what is known of it, see `Informed`; `params` must be complete.

    A type that cannot state this has exact validity.
    """
    task = get_task(type_name)
    if not task.informs:
        values, valid = derive_from(source, type_name, params)
        return Informed(values, valid, valid.astype(np.float32))
    if source.empty:
        return _nothing_known(task, source, params)
    found = task.derive_informed(source, params)
    return Informed(*(None if part is None else source.restore(part) for part in found))


def _nothing_known(task: DerivedTask, source: SourceFields, params: Mapping[str, Any]) -> Informed:
    shape, channels = source.core_shape, task.out_channels(source.ndim, params)
    values = np.zeros((channels, *shape), np.float32)
    return Informed(
        values,
        np.zeros((1, *shape), bool),
        np.zeros((1, *shape), np.float32),
        values.copy() if task.kind == "distance" else None,
        np.zeros((source.ndim, *shape), np.float32) if task.kind in DIRECTED_KINDS else None,
    )
