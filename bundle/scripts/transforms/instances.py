"""Converts instance labels to targets that a network can learn voxel by voxel."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Transform

from volumen.data.validity import refuse_negative
from volumen.derived.derivation import derive_target
from volumen.derived.extents import distance_halo, in_voxels
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import DEFERRED, labelled_key, mask_key

INSTANCE_MODES = ("foreground", "boundary", "interior", "distance")


class InstancesToTargetd(Transform):
    """Convert labels whose values number instances (0 is background) to the targets of their heads.

    It must follow `DeriveTargetsd`, whose tasks need the numbers, and precede `CropHalod`. The reader needs a halo of
    at least `instance_halo`; otherwise a boundary whose other side lies outside the patch is missed.

    Args:
        targets: target to "foreground" (any instance), "boundary" (voxels of an instance with a face neighbour of
            another value, so that touching instances are separated), "interior" (foreground without boundary), all
            of these 0 or 1 in uint8, or "distance" (`instance_distance` in voxels of the smallest spacing, negative
            within instances, cut at 16, float32).
        halo: voxels per axis on every side of a patch at which no distance is needed.

    For "boundary" and "interior" a voxel with an unknown face neighbour inside the volume becomes invalid itself,
    unless a valid neighbour already decides it. Also writes `<target>_labelled`, bool: True in all instances.

    Raises:
        VolumenError: a mode is unknown, or a valid voxel has a negative number.
    """

    def __init__(self, targets: Mapping[str, str], halo: Sequence[int] | int = 0) -> None:
        for target, mode in targets.items():
            if mode not in INSTANCE_MODES:
                raise VolumenError(
                    f"instances of target {target!r}",
                    expected=f"one of {', '.join(INSTANCE_MODES)}",
                    found=repr(mode),
                )
        self.targets = dict(targets)
        self.halo = halo

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        volume = str(sample.get("volume_name", "a volume"))
        for target, mode in self.targets.items():
            if DEFERRED in sample:
                raw = sample[DEFERRED].labels[target]
                if not raw.lies_within(0, None):
                    values, known = raw.for_checks()
                    refuse_negative(values, known, target, volume)
                if target not in sample:
                    continue
            label, valid = sample[target], sample[mask_key(target)]
            refuse_negative(label, valid, target, volume)
            inside = label > 0
            sample[labelled_key(target)] = inside
            if mode == "foreground":
                sample[target] = inside.view(np.uint8)
            elif mode == "distance":
                sample[target], sample[mask_key(target)] = self._distance(sample, label, valid)
            else:
                differs, unsure = _neighbours(label, valid, sample.get("in_volume"))
                chosen = inside & differs if mode == "boundary" else inside & ~differs
                sample[target] = chosen.view(np.uint8)
                undecided = unsure & (inside & ~differs).any(axis=0, keepdims=True)
                sample[mask_key(target)] = valid & ~undecided
        return sample

    def _distance(
        self, sample: Mapping[Hashable, Any], label: np.ndarray, valid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        spacing = sample.get("spacing") or (1.0,) * (label.ndim - 1)
        halo = (self.halo,) * len(spacing) if isinstance(self.halo, int) else tuple(self.halo)
        core = tuple(slice(width, size - width) for width, size in zip(halo, label.shape[1:]))
        values, core_valid = derive_target(
            "distance_transform",
            label,
            known=valid,
            in_volume=sample.get("in_volume"),
            spacing=in_voxels(spacing),
            halo=halo,
            instances=True,
        )
        wide, mask = np.zeros(label.shape, np.float32), np.zeros(valid.shape, bool)
        wide[(slice(None), *core)], mask[(slice(None), *core)] = values, core_valid
        return wide, mask


def instance_halo(modes: Collection[str], spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the number of voxels per axis around a patch that the modes need.

    Args:
        modes: elements of `INSTANCE_MODES`.
        spacing: voxel size per axis in units of the smallest one.
    """
    if "distance" in modes:
        return distance_halo(None, spacing)
    return (int(bool({"boundary", "interior"} & set(modes))),) * len(spacing)


def _neighbours(
    label: np.ndarray, valid: np.ndarray, in_volume: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    # Returns whether a valid face neighbour has another value, and whether a face neighbour in the volume is unknown.
    differs = np.zeros(label.shape, dtype=bool)
    unsure = np.zeros(valid.shape, dtype=bool)
    unknown = ~valid if in_volume is None else ~valid & in_volume
    for axis in range(1, label.ndim):
        lower = (slice(None),) * axis + (slice(None, -1),)
        upper = (slice(None),) * axis + (slice(1, None),)
        edge = label[lower] != label[upper]
        differs[lower] |= edge & valid[upper]
        differs[upper] |= edge & valid[lower]
        unsure[lower] |= unknown[upper]
        unsure[upper] |= unknown[lower]
    return differs, unsure
