"""Computes targets that compare neighbouring labels, for a batch on the training device, in torch.

It corresponds to `affinities` and `boundaries`, with a batch axis in front.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from volumen.derived.arrays.affinities import overlap
from volumen.derived.batches.fields import pad_axis


def affinities(labels: Tensor, known: Tensor, offsets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Compute `affinities.affinities` of integer (B, C, *spatial) and bool (B, *spatial).

    Returns:
        affinities bool (B, len(offsets), *spatial); valid bool (B, *spatial).
    """
    shape = known.shape[1:]
    same = torch.zeros((len(labels), len(offsets), *shape), dtype=torch.bool, device=labels.device)
    valid = known.clone()
    for channel, offset in enumerate(offsets):
        here, there = overlap(shape, offset)
        partner = torch.zeros_like(known)
        partner[(slice(None), *here)] = known[(slice(None), *there)]
        valid &= partner
        mine, theirs = labels[(slice(None), slice(None), *here)], labels[(slice(None), slice(None), *there)]
        same[:, channel][(slice(None), *here)] = (mine == theirs).all(dim=1) & (mine > 0).any(dim=1)
    return same & valid[:, None], valid


def boundary(labels: Tensor, known: Tensor, side: str, in_volume: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `boundaries.boundary` of integer (B, C, *spatial) and bool (B, *spatial).

    Returns:
        boundary bool (B, *spatial); valid bool (B, *spatial).
    """
    found, open_question = torch.zeros_like(known), torch.zeros_like(known)
    unknown = ~known if in_volume is None else in_volume & ~known
    for axis in range(1, known.dim()):
        length = known.shape[axis] - 1
        lower, upper = (labels.narrow(axis + 1, start, length) for start in (0, 1))
        differ = (lower != upper).any(dim=1) & known.narrow(axis, 0, length) & known.narrow(axis, 1, length)
        unsure = unknown.narrow(axis, 0, length) | unknown.narrow(axis, 1, length)
        for target, change in ((found, differ), (open_question, unsure)):
            both = pad_axis(change, 1, axis, False)
            target |= both.narrow(axis, 0, length + 1) | both.narrow(axis, 1, length + 1)
    if side == "both":
        valid = known & (found | ~open_question)
        return found & valid, valid
    of_side = (labels > 0).any(dim=1) == (side == "inner")
    valid = known & (found | ~open_question | ~of_side)
    return found & of_side & valid, valid
