"""Derives targets of a batch on the training device, so that only labels with their halo are transferred.

A worker packs labels, masks and the state of voxels (`PackSourcesd`). After the transfer `DeriveBatch` derives the
targets from them; they equal those of `DeriveTargetsd`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms.transform import Transform
from torch import Tensor

from volumen.derived.batch_fields import BatchFields
from volumen.derived.batches.fields import exact_products
from volumen.derived.extents import in_voxels
from volumen.derived.informed import INFORMED, Informed
from volumen.derived.registry import (
    DerivedTask,
    complete_params,
    derives_on_device,
    get_task,
    served_extent,
    validate_task,
)
from volumen.transforms.deferred import as_int32
from volumen.transforms.derive import UNITS, informed_entries
from volumen.utils.device import sent
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import DEFERRED, PACKED, mask_key

SPACING_KEY = f"{PACKED}/spacing"
"""Voxel size per axis, float64 (D,)."""
OUTSIDE, UNKNOWN, KNOWN = range(3)


def packed_keys(source: str) -> tuple[str, str, str]:
    """Return the keys of a source's labels, the state of their voxels, and flags of the whole patch.

    A target's name is part of a file's name and holds no slash, so these keys never equal a target's name.
    """
    return f"{PACKED}{source}", f"{PACKED}{source}/state", f"{PACKED}{source}/flags"


class PackSourcesd(Transform):
    """Copy the entries that `DeriveBatch` needs to separate keys of the sample. It must precede `CropHalod`.

    Writes for every source: labels int32 (Ct, *(patch + 2 halo)); the state of every voxel, uint8
    (1, *(patch + 2 halo)), 0 outside the volume, 1 unknown, 2 known; flags bool (2,): there are unknown voxels,
    there are voxels outside. And the spacing, float64 (D,).

    Args:
        sources: labelled targets from which a target is derived on the device.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        if DEFERRED in sample:
            return sample  # the device itself packs what it augments
        for source in self.sources:
            labels, state, flags = packed_keys(source)
            values, known = np.asarray(sample[source]), sample.get(mask_key(source))
            inside = sample.get("in_volume")
            place = np.full((1, *values.shape[1:]), KNOWN, np.uint8)
            if known is not None:
                place[~known] = UNKNOWN
            if inside is not None:
                place[~inside] = OUTSIDE
            sample[labels] = as_int32(values)
            sample[state] = place
            sample[flags] = np.array([(place == UNKNOWN).any(), (place == OUTSIDE).any()])
        if self.sources:
            spacing = sample.get("spacing")
            sample[SPACING_KEY] = (
                np.ones(values.ndim - 1) if spacing is None else np.array(spacing, np.float64)
            )
        return sample


class DeriveBatch:
    """Derive targets of a collated batch, on the device of its labels.

    Tasks whose class has no `derive_batch` (see `DerivedTask`) cannot be derived here; `DeriveTargetsd` derives them in
    the workers.

    Args:
        tasks: entries of `auxiliary_tasks` by name, each with `type`, `source_target` and the type's keys.
        halo: voxels per axis to crop from the results on every side.
        unit: "physical" or "voxel", as for `DeriveTargetsd`.
        instances: sources whose labels number instances, as for `DeriveTargetsd`.
        labelled_only: restrict the masks to voxels whose label is above 0, like `RestrictToLabelledd`.

    Raises:
        VolumenError: an entry is not valid, or its task cannot be derived for a batch.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, Any]],
        halo: Sequence[int] | int = 0,
        unit: str = "physical",
        instances: Collection[str] = (),
        labelled_only: bool = False,
    ) -> None:
        if unit not in UNITS:
            raise VolumenError("unit", expected=f"one of {', '.join(UNITS)}", found=repr(unit))
        self.halo, self.unit, self.labelled_only = halo, unit, labelled_only
        self.instances = frozenset(instances)
        self._tasks: dict[str, tuple[DerivedTask, dict[str, Any]]] = {}
        for name, params in tasks.items():
            validate_task(name, params)
            task = get_task(params["type"])
            full = complete_params(task, params)
            if not derives_on_device(task, full):
                raise VolumenError(
                    f"auxiliary_tasks.{name}",
                    f"{task.type_name} cannot be derived on a device",
                    remedy="use a worker",
                )
            self._tasks[name] = (task, full)

    @property
    def sources(self) -> tuple[str, ...]:
        """The labelled targets that the derivation reads."""
        return tuple(dict.fromkeys(params["source_target"] for _, params in self._tasks.values()))

    def host_facts(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return values that are needed before the first launch, read from the batch while it is on the host.

        Args:
            batch: collated samples of `PackSourcesd`.

        Returns:
            voxel size per sample, and per source whether any voxel is unknown, and any outside.
        """
        facts: dict[str, Any] = {
            source: batch[packed_keys(source)[2]].any(dim=0).tolist() for source in self.sources
        }
        if facts:
            facts[SPACING_KEY] = [tuple(row) for row in batch[SPACING_KEY].tolist()]
        return facts

    @torch.no_grad()
    def __call__(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Replace the packed entries of the batch by its derived targets.

        Args:
            tensors: the batch on the device.
            facts: the result of `host_facts`.

        Returns:
            For every task float32 (B, C, *patch) and "<task>_mask" bool (B, 1, *patch), and the other entries.
        """
        others = {key: value for key, value in tensors.items() if not key.startswith(PACKED)}
        if not self._tasks:
            return others
        spacings = [in_voxels(size) if self.unit == "voxel" else size for size in facts[SPACING_KEY]]
        device = tensors[packed_keys(self.sources[0])[0]].device
        with exact_products(device):
            parts = [
                self._derive(tensors, facts, spacing, _rows(spacings, spacing))
                for spacing in dict.fromkeys(spacings)
            ]
        if len(parts) == 1:
            return {**others, **parts[0]}
        order = [row for spacing in dict.fromkeys(spacings) for row in _rows(spacings, spacing)]
        back = sent(np.argsort(order), device)
        return {**others, **{key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}}

    def _derive(
        self,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        spacing: tuple[float, ...],
        rows: list[int],
    ) -> dict[str, Tensor]:
        """Derive all targets of the samples `rows`, which have the same voxel size."""
        fields = {source: self._fields(tensors, facts, source, spacing, rows) for source in self.sources}
        out: dict[str, Tensor] = {}
        for name, (task, params) in self._tasks.items():
            source = fields[params["source_target"]]
            if params["validity"] == INFORMED and task.informs:
                found = task.derive_informed_batch(source, params)
            else:
                values, valid = task.derive_batch(source, params)
                found = Informed(
                    values.float(), valid, valid.float() if params["validity"] == INFORMED else None
                )
            if self.labelled_only:
                labelled = (source.labels() > 0).any(dim=1, keepdim=True)
                confidence = None if found.confidence is None else found.confidence * labelled
                found = found._replace(valid=found.valid & labelled, confidence=confidence)
            out.update({key: part.contiguous() for key, part in informed_entries(name, found).items()})
        return out

    def _fields(
        self,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        source: str,
        spacing: tuple[float, ...],
        rows: list[int],
    ) -> BatchFields:
        labels_key, state_key, _ = packed_keys(source)
        labels, state = tensors[labels_key], tensors[state_key]
        if len(rows) < len(labels):
            chosen = sent(rows, labels.device)
            labels, state = labels[chosen], state[chosen]
        some_unknown, some_outside = facts[source]
        reach, margin = served_extent(self._tasks.values(), source, spacing)
        return BatchFields(
            labels,
            known=state == KNOWN if some_unknown else None,
            in_volume=state != OUTSIDE if some_outside else None,
            spacing=spacing,
            halo=self.halo,
            reach=reach,
            margin=margin,
            instances=source in self.instances,
        )


def _rows(spacings: Sequence[tuple[float, ...]], spacing: tuple[float, ...]) -> list[int]:
    return [row for row, one in enumerate(spacings) if one == spacing]
