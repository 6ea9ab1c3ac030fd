"""Prepares labels of a patch on the training device: what is known, foreground, classes, and parts of instances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volumen.transforms.deferred import RawLabel
from volumen.transforms.device.sampling import NearestSamples


class PatchLabel(NamedTuple):
    """A label on the patch with its halo.

    Args:
        values: integer or float32 (Ct, *wide), 0 where ignored or outside the bounds.
        known: bool (1, *wide).
        all_known: no voxel can be unknown; decided on the host, so it may be False although all are known.
    """

    values: Tensor
    known: Tensor
    all_known: bool


def sampled_label(raw: RawLabel, samples: NearestSamples) -> PatchLabel:
    """Return a label and where it is known, see `volumen.data.validity`."""
    if raw.values is None:
        shape = samples.grid.patch_shape
        values = torch.zeros((raw.channels, *shape), dtype=torch.uint8, device=samples.device)
        return PatchLabel(values, torch.zeros((1, *shape), dtype=torch.bool, device=samples.device), False)
    values, known = samples.values(raw.values), samples.inside
    if raw.mask is not None:
        inside = samples.values(raw.mask) > 0
        known = inside if known is None else known & inside
    if raw.ignore is not None:
        ignored = (values == raw.ignore).any(dim=0, keepdim=True)
        values = torch.where(ignored, 0, values)
        known = ~ignored if known is None else known & ~ignored
    if known is None:
        return PatchLabel(values, torch.ones_like(values[:1], dtype=torch.bool), True)
    return PatchLabel(values, known, False)


def truth(values: Tensor, classes: int | None) -> Tensor:
    """Return a label as its loss needs it, see `binary_truth` and `class_truth`; the workers have checked it.

    Args:
        values: (Ct, *space).
        classes: number of exclusive classes, or None if every value but 0 is foreground.
    """
    if classes is None:
        return (values != 0).to(torch.uint8)
    if not values.is_floating_point():
        values = values.to(torch.int32)  # a number of classes may exceed the range of the stored type
    return torch.where((values < 0) | (values >= classes), 0, values)


def instance_part(numbers: Tensor, known: Tensor, in_volume: Tensor | None, mode: str) -> PatchLabel:
    """Return the foreground, the boundary or the interior of numbered instances, see `InstancesToTargetd`.

    Args:
        numbers: integer (Ct, *space).
        known: bool (1, *space).
        in_volume: bool (1, *space), None for all.
        mode: "foreground", "boundary" or "interior".
    """
    inside = numbers > 0
    if mode == "foreground":
        return PatchLabel(inside.to(torch.uint8), known, False)
    differs, unsure = _neighbours(numbers, known, in_volume)
    chosen = inside & differs if mode == "boundary" else inside & ~differs
    undecided = unsure & (inside & ~differs).any(dim=0, keepdim=True)
    return PatchLabel(chosen.to(torch.uint8), known & ~undecided, False)


def _neighbours(numbers: Tensor, known: Tensor, in_volume: Tensor | None) -> tuple[Tensor, Tensor]:
    differs = torch.zeros_like(numbers, dtype=torch.bool)
    unsure = torch.zeros_like(known)
    unknown = ~known if in_volume is None else ~known & in_volume
    for axis in range(1, numbers.dim()):
        lower = (slice(None),) * axis + (slice(None, -1),)
        upper = (slice(None),) * axis + (slice(1, None),)
        edge = numbers[lower] != numbers[upper]
        differs[lower] |= edge & known[upper]
        differs[upper] |= edge & known[lower]
        unsure[lower] |= unknown[upper]
        unsure[upper] |= unknown[lower]
    return differs, unsure
