"""Continues partly known labels of a batch into unknown voxels: `arrays.completion` in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from volumen.derived.arrays.completion import step_costs
from volumen.derived.batches.fields import FAR, nearest_steps, pad_axis
from volumen.derived.distance_window import Region


def continue_surfaces(
    foreground: Tensor,
    known: Tensor,
    distance: Tensor,
    region: Region,
    *,
    spacing: Sequence[float],
    reach: float | None = None,
) -> Tensor:
    """Compute `completion.continue_surfaces` of bool (B, *spatial) and float32 (B, *region): bool (B, *spatial)."""
    squared, steps = _nearest_known(known, spacing, reach)
    fields = torch.stack([distance, *_slopes(distance, known[(slice(None), *region)])], dim=0)
    offsets = [part.start for part in region]
    inside, index = _index(steps, [part.stop - part.start for part in region], offsets)
    chosen = (
        fields.flatten(2)
        .gather(2, index.flatten(1).expand(len(fields), -1, -1))
        .unflatten(2, known.shape[1:])
    )
    value = chosen[0]
    for slope, step in zip(chosen[1:], steps, strict=True):
        value = value - slope * step
    _, whole = _index(steps, known.shape[1:], [0] * len(steps))
    same = foreground.flatten(1).gather(1, whole.flatten(1)).unflatten(1, known.shape[1:])
    found = torch.where(inside, value < 0, same) & (squared < FAR)
    return torch.where(known, foreground, found)


def continue_numbers(
    numbers: Tensor, known: Tensor, *, spacing: Sequence[float], reach: float | None = None
) -> Tensor:
    """Compute `completion.continue_numbers` of integer (B, C, *spatial) and bool (B, *spatial)."""
    squared, steps = _nearest_known(known, spacing, reach)
    _, index = _index(steps, known.shape[1:], [0] * len(steps))
    index = index.flatten(1)[:, None].expand(-1, numbers.shape[1], -1)
    found = numbers.flatten(2).gather(2, index).unflatten(2, known.shape[1:])
    return found * (squared < FAR)[:, None]


def _nearest_known(known: Tensor, spacing: Sequence[float], reach: float | None) -> tuple[Tensor, Tensor]:
    """Return the squared distance (B, *spatial) and the steps (D, B, *spatial) to the nearest known voxel."""
    squared = torch.where(known, 0.0, FAR)
    steps = torch.zeros((known.dim() - 1, *known.shape), dtype=torch.int16, device=known.device)
    costs = step_costs(spacing, reach)
    for axis in reversed(range(len(costs))):
        whole = slice(0, known.shape[axis + 1])
        squared, steps = nearest_steps(squared, steps, costs[axis].tolist(), axis, whole)
    return squared, steps


def _slopes(distance: Tensor, known: Tensor) -> list[Tensor]:
    """Return per axis the mean of the differences per voxel to the one or two known neighbours."""
    slopes = []
    for axis in range(1, distance.dim()):
        length = distance.shape[axis]
        both = known.narrow(axis, 1, length - 1) & known.narrow(axis, 0, length - 1)
        rise = pad_axis(torch.diff(distance, dim=axis) * both, 1, axis, 0.0)
        pairs = pad_axis(both.to(distance.dtype), 1, axis, 0.0)
        rises = rise.narrow(axis, 0, length) + rise.narrow(axis, 1, length)
        sides = pairs.narrow(axis, 0, length) + pairs.narrow(axis, 1, length)
        slopes.append(rises / sides.clamp_min(1))
    return slopes


def _index(steps: Tensor, shape: Sequence[int], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return whether the voxel that the steps lead to lies in a part of the array, and its flat index there (B, *s)."""
    index = torch.zeros(steps.shape[1:], dtype=torch.int64, device=steps.device)
    inside = torch.ones(steps.shape[1:], dtype=torch.bool, device=steps.device)
    for axis, (step, size, start) in enumerate(zip(steps, shape, starts, strict=True)):
        at = torch.arange(step.shape[axis + 1], device=steps.device) - start
        place = step.long() + at.view([-1 if other == axis + 1 else 1 for other in range(step.dim())])
        inside &= (place >= 0) & (place < size)
        index = index * size + place.clamp(0, size - 1)
    return inside, index
