"""Instance labels turned into what a network can learn voxel by voxel."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.transforms import Transform

from scripts.errors import VolumenError

MODES = ("foreground", "boundary", "interior")


class InstancesToTargetd(Transform):
    """Turns labels whose values number instances (0 is background) into 0 and 1, uint8.

    Stands right after `ReadPatchd`. Boundaries look one voxel around, so give the reader a halo of at least 1:
    without, a boundary that only the neighbour outside the patch reveals is missed.

    Args:
        targets: target to "foreground" (any instance), "boundary" (voxels of an instance with a face neighbour of
            another value, so that touching instances are parted) or "interior" (foreground without boundary).

    For "boundary" and "interior" a voxel with an unknown face neighbour inside the volume becomes unknown itself,
    unless a known neighbour decides it already.

    Raises:
        VolumenError: a mode is unknown.
    """

    def __init__(self, targets: Mapping[str, str]) -> None:
        for target, mode in targets.items():
            if mode not in MODES:
                raise VolumenError(
                    f"instances of target {target!r}", expected=f"one of {', '.join(MODES)}", found=repr(mode)
                )
        self.targets = dict(targets)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for target, mode in self.targets.items():
            label = sample[target]
            if mode == "foreground":
                sample[target] = (label > 0).view(np.uint8)
                continue
            known = sample[f"{target}_mask"]
            differs, unsure = _neighbours(label, known, sample.get("in_volume"))
            boundary = differs & (label > 0)
            chosen = boundary if mode == "boundary" else (label > 0) & ~boundary
            sample[target] = chosen.view(np.uint8)
            undecided = unsure & ((label > 0) & ~differs).any(axis=0, keepdims=True)
            sample[f"{target}_mask"] = known & ~undecided
        return sample


def _neighbours(
    label: np.ndarray, known: np.ndarray, in_volume: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    # Whether a known face neighbour has another value; whether a face neighbour in the volume is unknown.
    differs = np.zeros(label.shape, dtype=bool)
    unsure = np.zeros(known.shape, dtype=bool)
    unknown = ~known if in_volume is None else ~known & in_volume
    for axis in range(1, label.ndim):
        lower = (slice(None),) * axis + (slice(None, -1),)
        upper = (slice(None),) * axis + (slice(1, None),)
        edge = label[lower] != label[upper]
        differs[lower] |= edge & known[upper]
        differs[upper] |= edge & known[lower]
        unsure[lower] |= unknown[upper]
        unsure[upper] |= unknown[lower]
    return differs, unsure
