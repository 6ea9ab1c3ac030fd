"""The truth of a derived target, made from labels block by block with the code that training uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.validity import known_voxels, without_ignored
from volumen.derived.distance_window import surroundings
from volumen.derived.extents import in_voxels
from volumen.derived.registry import derive_halo
from volumen.transforms.derive import DeriveTargetsd
from volumen.transforms.instances import InstancesToTargetd, instance_halo

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

_NO_PARAMETERS = (
    "losses",
    "loss_weight",
    "weight",
    "ds_interpolation",
    "separate_decoder",
    "activation",
    "kind",
    "validity",  # scores compare with exact values only
)


@dataclass(frozen=True)
class DerivedTruth:
    """A derived target of a label volume, computed where it is read, equal to the crop of the whole volume's.

    Args:
        name: the target.
        task: its entry of `auxiliary_tasks`, or None for what a head learns of instance labels (`mode`).
        mode: what is made of labels that number instances, or None where they are classes.
        binary: every value but 0 is foreground.
        spacing: voxel size; distances count in the smallest, as in training.
    """

    name: str
    task: Mapping[str, Any] | None
    mode: str | None
    binary: bool
    spacing: tuple[float, ...]

    @cached_property
    def _tasks(self) -> dict[str, dict[str, Any]]:
        if self.task is None:
            return {}
        kept = {key: value for key, value in self.task.items() if key not in _NO_PARAMETERS}
        return {"derived": {**kept, "source_target": "source"}}

    def derives_like(self, other: DerivedTruth) -> bool:
        """Whether the other derives the same values from the same labels, whatever its losses are."""
        mine, its = ((one.mode, one.binary, one.spacing, one._tasks) for one in (self, other))
        return mine == its

    @cached_property
    def halo(self) -> tuple[int, ...]:
        """Voxels per axis that are read around a region."""
        steps = in_voxels(self.spacing)
        if self.task is None:
            return instance_halo([self.mode or "foreground"], steps)
        return derive_halo(self._tasks, steps)

    def read(
        self, region: tuple[slice, ...], label: Volume, mask: Volume | None, ignore: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the values (C, *region) and where they are known, bool (*region).

        Args:
            region: inside the label.
            label: what it is derived from.
            mask: known where above 0, or None.
            ignore: label value that means unknown, or None.
        """
        values, known, inside = _read_around(region, self.halo, label, mask, ignore)
        if self.task is None:
            sample = self._of_instances(values, known, inside)
            part = tuple(slice(h, h + p.stop - p.start) for h, p in zip(self.halo, region, strict=True))
            return sample["source"][(slice(None), *part)], sample["source_mask"][(0, *part)]
        if self.binary and self.mode is None:
            values = (values != 0).view(np.uint8)
        derive = DeriveTargetsd(
            self._tasks, self.halo, unit="voxel", instances=["source"] if self.mode else []
        )
        sample = derive(
            {"source": values, "source_mask": known, "in_volume": inside, "spacing": self.spacing}
        )
        return sample["derived"], sample["derived_mask"][0]

    def _of_instances(self, values: np.ndarray, known: np.ndarray, inside: np.ndarray) -> dict:
        make = InstancesToTargetd({"source": self.mode or "foreground"}, self.halo)
        return make({"source": values, "source_mask": known, "in_volume": inside, "spacing": self.spacing})


def _read_around(
    region: tuple[slice, ...], halo: Sequence[int], label: Volume, mask: Volume | None, ignore: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return label (Ct, *wide), known and inside the volume, both bool (1, *wide), wide being region and halo."""
    there, _ = surroundings(label.shape, region, halo)
    wide = tuple(part.stop - part.start + 2 * h for part, h in zip(region, halo, strict=True))
    place = tuple(
        slice(t.start - part.start + h, t.stop - part.start + h)
        for t, part, h in zip(there, region, halo, strict=True)
    )
    found = label.read(there)
    trusted = known_voxels(found, None if mask is None else mask.read(there), ignore)
    certain = np.ones(found.shape[1:], bool) if trusted is None else trusted
    found = without_ignored(found, ignore)
    values = np.zeros((len(found), *wide), found.dtype)
    known, inside = np.zeros((2, 1, *wide), bool)
    values[(slice(None), *place)] = found
    known[(0, *place)] = certain
    inside[(0, *place)] = True
    return values, known, inside
