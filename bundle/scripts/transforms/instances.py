"""Instance labels turned into what a network can learn voxel by voxel."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Transform

from volumen.data.validity import refuse_negative
from volumen.derived.derivation import derive_target
from volumen.derived.extents import distance_halo, in_voxels
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import labelled_key, mask_key

INSTANCE_MODES = ("foreground", "boundary", "interior", "distance")


class InstancesToTargetd(Transform):
    """Turns labels whose values number instances (0 is background) into what their heads learn.

    Stands after `DeriveTargetsd`, whose tasks need the numbers, and before `CropHalod`. Give the reader a halo of
    at least `instance_halo`: else a boundary that only the neighbour outside the patch reveals is missed.

    Args:
        targets: target to "foreground" (any instance), "boundary" (voxels of an instance with a face neighbour of
            another value, so that touching instances are parted), "interior" (foreground without boundary), all
            of these 0 or 1 in uint8, or "distance" (`instance_distance` in voxels of the smallest spacing, negative
            within instances, cut at 16, float32).
        halo: voxels per axis on every side of a patch, where no distance is needed.

    For "boundary" and "interior" a voxel with an unknown face neighbour inside the volume becomes unknown itself,
    unless a known neighbour decides it already. Also writes `<target>_labelled`, bool: where any instance is.

    Raises:
        VolumenError: a mode is unknown, or a known voxel has a negative number.
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
        for target, mode in self.targets.items():
            label, known = sample[target], sample[mask_key(target)]
            refuse_negative(label, known, target, str(sample.get("volume_name", "a volume")))
            inside = label > 0
            sample[labelled_key(target)] = inside
            if mode == "foreground":
                sample[target] = inside.view(np.uint8)
            elif mode == "distance":
                sample[target], sample[mask_key(target)] = self._distance(sample, label, known)
            else:
                differs, unsure = _neighbours(label, known, sample.get("in_volume"))
                chosen = inside & differs if mode == "boundary" else inside & ~differs
                sample[target] = chosen.view(np.uint8)
                undecided = unsure & (inside & ~differs).any(axis=0, keepdims=True)
                sample[mask_key(target)] = known & ~undecided
        return sample

    def _distance(
        self, sample: Mapping[Hashable, Any], label: np.ndarray, known: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        spacing = sample.get("spacing") or (1.0,) * (label.ndim - 1)
        halo = (self.halo,) * len(spacing) if isinstance(self.halo, int) else tuple(self.halo)
        core = tuple(slice(width, size - width) for width, size in zip(halo, label.shape[1:]))
        values, valid = derive_target(
            "distance_transform",
            label,
            known=known,
            in_volume=sample.get("in_volume"),
            spacing=in_voxels(spacing),
            halo=halo,
            instances=True,
        )
        wide, mask = np.zeros(label.shape, np.float32), np.zeros(known.shape, bool)
        wide[(slice(None), *core)], mask[(slice(None), *core)] = values, valid
        return wide, mask


def instance_halo(modes: Collection[str], spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the voxels per axis around a patch that the modes look at.

    Args:
        modes: of `INSTANCE_MODES`.
        spacing: voxel size per axis in units of the smallest one.
    """
    if "distance" in modes:
        return distance_halo(None, spacing)
    return (int(bool({"boundary", "interior"} & set(modes))),) * len(spacing)


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
