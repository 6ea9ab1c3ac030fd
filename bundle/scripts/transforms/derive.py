"""Dictionary transforms that add derived targets to a sample."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms.transform import Transform

from volumen.derived.derivation import derive_from, derive_informed_from
from volumen.derived.extents import in_voxels
from volumen.derived.informed import INFORMED, Informed
from volumen.derived.registry import complete_params, derive_halo, get_task, served_extent, validate_task
from volumen.derived.source_fields import SourceFields
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import confidence_key, free_key, mask_key, upper_key

__all__ = ["DeriveTargetsd", "derive_halo"]

UNITS = ("physical", "voxel")


class DeriveTargetsd(Transform):
    """Derive targets from labels: after augmentation, on a patch with its halo.

    Reads `sample[source]` integer (Ct, *(patch + 2 halo)), `sample[source + "_mask"]` bool (1, ...) if it exists,
    `sample["in_volume"]` bool (1, ...) or None, and `sample["spacing"]` if it exists. Writes for every task
    `sample[task]` float32 (C, *patch) and `sample[task + "_mask"]` bool (1, *patch). With a halo of at least
    `derive_halo(tasks, spacing)` a value equals the one derived from the whole volume wherever the mask is
    True. A task with `validity: informed` also has "<task>_confidence" and, by its kind, "<task>_upper" or
    "<task>_free", see `Informed`.

    Args:
        tasks: entries of `auxiliary_tasks` by name, each with `type`, `source_target` and the type's keys.
        halo: voxels per axis to crop from the results on every side.
        spacing: voxel size per axis for samples without one.
        unit: "physical", the unit of the spacing, or "voxel": distances are in the smallest voxel size of the
            sample, so that settings such as a loss's `rho` mean the same for nanometres and millimetres.
        instances: sources whose labels number instances; touching instances are separated, see `instance_distance`.

    Raises:
        VolumenError: an entry is not valid, see `validate_task`.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, Any]],
        halo: Sequence[int] | int = 0,
        spacing: Sequence[float] | None = None,
        unit: str = "physical",
        instances: Collection[str] = (),
    ) -> None:
        self.halo = halo
        self.instances = frozenset(instances)
        if unit not in UNITS:
            raise VolumenError("unit", expected=f"one of {', '.join(UNITS)}", found=repr(unit))
        self.spacing = None if spacing is None else tuple(spacing)
        self.unit = unit
        self._tasks = {}
        for name, params in tasks.items():
            validate_task(name, params)
            if not params.get("source_target"):
                raise VolumenError(f"auxiliary_tasks.{name}", "no source_target", remedy="name the target")
            task = get_task(params["type"])
            self._tasks[name] = (task, complete_params(task, params))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        fields: dict[str, SourceFields] = {}
        for name, (task, params) in self._tasks.items():
            source = params["source_target"]
            if source not in fields:
                fields[source] = self._fields(sample, source)
            if params["validity"] == INFORMED:
                found = derive_informed_from(fields[source], task.type_name, params)
                sample.update(informed_entries(name, found))
            else:
                values, valid = derive_from(fields[source], task.type_name, params)
                sample[name], sample[mask_key(name)] = values, valid
        return sample

    def _fields(self, sample: Mapping[Hashable, Any], source: str) -> SourceFields:
        if source not in sample:
            raise KeyError(
                f"source target {source!r} is not in the sample; it has {sorted(map(str, sample))}"
            )
        labels = np.asarray(sample[source])
        spacing = sample.get("spacing", self.spacing)
        spacing = (1.0,) * (labels.ndim - 1) if spacing is None else tuple(float(size) for size in spacing)
        if self.unit == "voxel":
            spacing = in_voxels(spacing)
        reach, margin = served_extent(self._tasks.values(), source, spacing)
        return SourceFields(
            labels,
            known=sample.get(mask_key(source)),
            in_volume=sample.get("in_volume"),
            spacing=spacing,
            halo=self.halo,
            reach=reach,
            margin=margin,
            instances=source in self.instances,
        )


def informed_entries(name: str, found: Informed) -> dict[str, Any]:
    """Return the entries of a sample, or of a batch, that hold a derived target with what is known of it."""
    keys = (name, mask_key(name), confidence_key(name), upper_key(name), free_key(name))
    return {key: part for key, part in zip(keys, found, strict=True) if part is not None}
