"""Finds where labels of a batch are known in a plane alone, and the confidence of estimates, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from volumen.derived.arrays.planes import LEAST_GAP, LEAST_PART, NEAR, SIDE, lattice
from volumen.derived.batches.axes import smallest_axis
from volumen.derived.batches.fields import along, erode, pad_axis
from volumen.derived.confidence import LEAST, Calibration
from volumen.derived.distance_window import Region


def free_direction(
    known: Tensor, spacing: Sequence[float], in_volume: Tensor | None, region: Region
) -> tuple[Tensor, Tensor]:
    """Compute `planes.free_direction` of bool (B, Z, Y, X): direction (B, 3, *region) and flat (B, *region)."""
    part = (slice(None), *region)
    flat = known[part] & erode(~_interior(known, in_volume), (NEAR,) * 3, None, region)
    places, blocks = zip(*(lattice(one) for one in region))
    moments = _moments(known, places)
    units = torch.eye(3, dtype=torch.int64).tolist()
    count = moments[0, 0, 0].double().clamp_min(1)
    mean = [moments[tuple(unit)].double() / count for unit in units]
    scatter = []
    for i in range(3):
        for j in range(i, 3):
            both = moments[tuple(a + b for a, b in zip(units[i], units[j], strict=True))].double() / count
            scatter.append(both - mean[i] * mean[j])
    tensor = torch.stack(scatter, dim=1).float()
    direction, _ = smallest_axis(tensor, torch.ones_like(tensor[:, 0], dtype=torch.bool), LEAST_GAP)
    sizes = torch.tensor([float(size) for size in reversed(spacing)], device=known.device)
    direction = direction / sizes.view(3, 1, 1, 1)
    direction = direction / direction.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
    for axis, block in enumerate(blocks):
        direction = direction.index_select(axis + 2, torch.from_numpy(block).to(known.device))
    return direction * flat[:, None], flat


def confidence(
    calibration: Calibration, distance: Tensor, clearance: Tensor, sure: Tensor, usable: Tensor
) -> Tensor:
    """Compute `trust.confidence` of a batch."""
    ratio = torch.exp(-2 * calibration.decay * clearance / (distance.abs() + calibration.margin))
    value = 1 / (1 + (calibration.worst / calibration.unit) ** 2 * ratio)
    value = torch.where(value >= LEAST, value, 0.0)
    return torch.where(sure, 1.0, value) * usable


def within_planes(
    values: Tensor, confidence: Tensor, free: Tensor, flat: Tensor, plane_confidence: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `planes.within_planes` of a batch."""
    planar = (free != 0).any(dim=1)
    inside, share = _vectors_across(values, free) if values.shape[1] == 3 else _tensors_across(values, free)
    trust = plane_confidence * share * planar * (confidence > 0)
    return (
        torch.where((flat & planar)[:, None], inside, values),
        torch.where(flat, trust, confidence),
        free * flat[:, None],
    )


def _vectors_across(values: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit vector of the part across `free`, and its length (B, *s), 0 if it is short."""
    parts = values - (values * free).sum(dim=1, keepdim=True) * free
    length = parts.square().sum(dim=1).sqrt()
    return parts / length.clamp_min(1e-6)[:, None], length * (length >= LEAST_PART)


def _tensors_across(values: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tensor's part across `free` on both sides, P A P with P = 1 - f f^T, and 1."""
    direction = free.flip(1).unbind(1)
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    entries = dict(zip(pairs, values.unbind(1), strict=True))
    product = [sum(entries[min(i, j), max(i, j)] * direction[j] for j in range(3)) for i in range(3)]
    both = sum(product[i] * direction[i] for i in range(3))
    inside = [
        entries[i, j]
        - direction[i] * product[j]
        - product[i] * direction[j]
        + both * direction[i] * direction[j]
        for i, j in pairs
    ]
    return torch.stack(inside, dim=1), torch.ones_like(inside[0])


def _interior(known: Tensor, in_volume: Tensor | None) -> Tensor:
    open_side = ~known if in_volume is None else ~known & in_volume
    inner = known.clone()
    for axis in range(1, known.dim()):
        length = known.shape[axis]
        wide = pad_axis(open_side, 1, axis, False)
        inner &= ~(wide.narrow(axis, 0, length) | wide.narrow(axis, 2, length))
    return inner


def _moments(known: Tensor, places: Sequence[np.ndarray]) -> dict[tuple[int, ...], Tensor]:
    """Return the sums of products of offsets to known voxels within a box around places, by powers, up to order 2."""
    parts: dict[tuple[int, ...], Tensor] = {(): known.float()}
    for axis, at in enumerate(places, start=1):
        box = [_box(at, known.shape[axis], power, known.device) for power in range(3)]
        parts = {
            (*powers, power): along(field, box[power], axis)
            for powers, field in parts.items()
            for power in range(3 - sum(powers))
        }
    return parts


def _box(places: np.ndarray, length: int, power: int, device: torch.device) -> Tensor:
    offsets = np.arange(length)[None] - places[:, None]
    return torch.from_numpy(((abs(offsets) <= SIDE) * offsets**power).astype(np.float32)).to(device)
