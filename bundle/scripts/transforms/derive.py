"""Dictionary transforms that add derived targets to a sample."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from monai.transforms.transform import Transform

from volumen.derived.derivation import derive_from
from volumen.derived.extents import in_voxels
from volumen.derived.registry import complete_params, derive_halo, get_task, served_extent, validate_task
from volumen.derived.source_fields import SourceFields
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import mask_key

__all__ = [
    "Affinitiesd",
    "Boundaryd",
    "DeriveTargetsd",
    "DistanceTransformd",
    "InplaneDirectiond",
    "LocalShapeDescriptorsd",
    "NearestComponentd",
    "Skeletond",
    "StructureTensord",
    "SurfaceNormalsd",
    "derive_halo",
]

FIELDS_KEY = "derived_fields"
"""Key under which a sample stores the fields that the tasks of one source use together."""


UNITS = ("physical", "voxel")


class DeriveTargetsd(Transform):
    """Derive targets from labels: after augmentation, on a patch with its halo.

    Reads `sample[source]` integer (Ct, *(patch + 2 halo)), `sample[source + "_mask"]` bool (1, ...) if it exists,
    `sample["in_volume"]` bool (1, ...) or None, and `sample["spacing"]` if it exists. Writes for every task
    `sample[task]` float32 (C, *patch) and `sample[task + "_mask"]` bool (1, *patch). With a halo of at least
    `derive_halo(tasks, spacing)` a value equals the one derived from the whole volume wherever the mask is
    True.

    Args:
        tasks: entries of `auxiliary_tasks` by name, each with `type`, `source_target` and the type's keys.
        halo: voxels per axis to crop from the results on every side.
        spacing: voxel size per axis for samples without one.
        unit: "physical", the unit of the spacing, or "voxel": distances are in the smallest voxel size of the
            sample, so that settings such as a loss's `rho` mean the same for nanometres and millimetres.
        keep_fields: leave the computed fields in the sample (for several single transforms in a row).
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
        keep_fields: bool = False,
        instances: Collection[str] = (),
    ) -> None:
        self.halo = halo
        self.instances = frozenset(instances)
        if unit not in UNITS:
            raise VolumenError("unit", expected=f"one of {', '.join(UNITS)}", found=repr(unit))
        self.spacing = None if spacing is None else tuple(spacing)
        self.unit = unit
        self.keep_fields = keep_fields
        self._tasks = {}
        for name, params in tasks.items():
            validate_task(name, params)
            if not params.get("source_target"):
                raise VolumenError(f"auxiliary_tasks.{name}", "no source_target", remedy="name the target")
            task = get_task(params["type"])
            self._tasks[name] = (task, complete_params(task, params))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        fields: dict[str, SourceFields] = dict(sample.get(FIELDS_KEY, {}))
        for name, (task, params) in self._tasks.items():
            source = params["source_target"]
            if source not in fields:
                fields[source] = self._fields(sample, source)
            values, valid = derive_from(fields[source], task.type_name, params)
            sample[name], sample[mask_key(name)] = values, valid
        if self.keep_fields:
            sample[FIELDS_KEY] = fields
        else:
            sample.pop(FIELDS_KEY, None)
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
        if self.keep_fields:
            # Following transforms may need more voxels around the patch than this one.
            margin = (self.halo,) * (labels.ndim - 1) if isinstance(self.halo, int) else tuple(self.halo)
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


class _SingleTaskd(DeriveTargetsd):
    """A transform for a single derived target; several in a row use the same fields of the source."""

    type_name: ClassVar[str]

    def __init__(
        self,
        source_target: str,
        name: str | None = None,
        halo: Sequence[int] | int = 0,
        spacing: Sequence[float] | None = None,
        **params: Any,
    ) -> None:
        entry = {"type": self.type_name, "source_target": source_target, **params}
        super().__init__({name or self.type_name: entry}, halo, spacing, keep_fields=True)


class DistanceTransformd(_SingleTaskd):
    """`distance_transform` of a source target, see `tasks.DistanceTransform`."""

    type_name = "distance_transform"


class SurfaceNormalsd(_SingleTaskd):
    """`surface_normals` of a source target, see `tasks.SurfaceNormals`."""

    type_name = "surface_normals"


class StructureTensord(_SingleTaskd):
    """`structure_tensor` of a source target, see `tasks.StructureTensor`."""

    type_name = "structure_tensor"


class InplaneDirectiond(_SingleTaskd):
    """`inplane_direction` of a source target, see `tasks.InplaneDirection`."""

    type_name = "inplane_direction"


class NearestComponentd(_SingleTaskd):
    """`nearest_component` of a source target, see `tasks.NearestComponent`."""

    type_name = "nearest_component"


class Skeletond(_SingleTaskd):
    """`skeleton` of a source target, see `tasks.Skeleton`."""

    type_name = "skeleton"


class Boundaryd(_SingleTaskd):
    """`boundary` of a source target, see `instance_tasks.Boundary`."""

    type_name = "boundary"


class Affinitiesd(_SingleTaskd):
    """`affinities` of a source target, see `instance_tasks.Affinities`."""

    type_name = "affinities"


class LocalShapeDescriptorsd(_SingleTaskd):
    """`local_shape_descriptors` of a source target, see `instance_tasks.LocalShapeDescriptors`."""

    type_name = "local_shape_descriptors"
