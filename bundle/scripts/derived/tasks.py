"""The built-in derived targets, as registered task types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.derived import confidence
from volumen.derived.estimated import EstimatedTask
from volumen.derived.extents import add_radii, distance_halo, gaussian_radius, gradient_radius
from volumen.derived.informed import Informed
from volumen.derived.registry import DerivedTask, register_task
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from volumen.derived.batch_fields import BatchFields
    from volumen.derived.source_fields import SourceFields


@register_task
class DistanceTransform(DerivedTask):
    """Distance to the label's boundary, see `fields.signed_distance`.

    Keys: `distance_type` "signed", "inside" or "outside"; `reach`, the maximum distance, in the unit of
    the spacing (default 16 times the smallest spacing). One channel; with `classes` (or a source of several
    channels) and as many `out_channels`, one channel per class, and otherwise one for their union.
    """

    type_name = "distance_transform"
    kind = "distance"
    turns = ("scalars",)
    defaults: ClassVar[Mapping[str, Any]] = {"distance_type": "signed", "reach": None}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"distance_type": ("signed", "inside", "outside")}

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        return int(params.get("out_channels") or params.get("channels") or 1)

    def check(self, name: str, params: Mapping[str, Any]) -> None:
        channels, classes = self.out_channels(3, params), params["classes"]
        if classes is not None and channels not in (1, len(classes)):
            raise VolumenError(
                f"{name}.out_channels",
                expected=f"1 (all classes together) or {len(classes)} (one channel for each of `classes`)",
                found=channels,
            )

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from volumen.derived.arrays.fields import distance_transform

        values, valid = [], np.ones((1, *source.shape), bool)
        for classes in self._class_groups(source, params):
            signed, known = source.signed_distance(params["reach"], classes)
            values.append(distance_transform(signed, params["distance_type"]))
            valid[0] &= known
        stacked = np.stack(values)
        # A voxel is valid for all channels or for none.
        return (stacked * valid if len(values) > 1 else stacked), valid

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        import torch

        parts = {"signed": (None, None), "inside": (None, 0.0), "outside": (0.0, None)}
        low, high = parts[params["distance_type"]]
        found = [
            source.signed_distance(params["reach"], classes) for classes in self._class_groups(source, params)
        ]
        values = torch.stack([signed for signed, _ in found], dim=1)
        valid = torch.stack([known for _, known in found], dim=1).all(dim=1, keepdim=True)
        if params["distance_type"] != "signed":
            values = values.clamp(low, high)
        if params["distance_type"] == "inside":
            values = values.neg()
        return (values * valid if len(found) > 1 else values), valid

    def derive_informed(self, source: SourceFields, params: Mapping[str, Any]) -> Informed:
        import numpy as np

        from volumen.derived.arrays.fields import distance_transform

        found = [source.distance_bounds(params["reach"], one) for one in self._class_groups(source, params)]
        lower, upper = (np.stack([bounds[end] for bounds in found]) for end in (0, 1))
        known = np.stack([bounds[2] for bounds in found]).all(axis=0, keepdims=True)
        kind = params["distance_type"]
        if kind == "inside":
            lower, upper = upper, lower
        lower, upper = distance_transform(lower, kind), distance_transform(upper, kind)
        valid = known & (lower == upper).all(axis=0, keepdims=True)
        return Informed(lower, valid, known.astype(np.float32), upper)

    def derive_informed_batch(self, source: BatchFields, params: Mapping[str, Any]) -> Informed:
        import torch

        found = [source.distance_bounds(params["reach"], one) for one in self._class_groups(source, params)]
        lower, upper = (torch.stack([bounds[end] for bounds in found], dim=1) for end in (0, 1))
        known = torch.stack([bounds[2] for bounds in found], dim=1).all(dim=1, keepdim=True)
        if params["distance_type"] == "inside":
            lower, upper = -upper, -lower
        if params["distance_type"] != "signed":
            lower, upper = lower.clamp_min(0.0), upper.clamp_min(0.0)
        valid = known & (lower == upper).all(dim=1, keepdim=True)
        return Informed(lower, valid, known.float(), upper)

    def _class_groups(
        self, source: SourceFields | BatchFields, params: Mapping[str, Any]
    ) -> list[list[int] | None]:
        channels, classes = self.out_channels(source.ndim, params), params["classes"]
        if channels == 1:
            return [classes]
        if classes is None:
            first = 0 if source.channels > 1 else 1
            classes = list(range(first, first + channels))
        return [[one] for one in classes]


@register_task
class SurfaceNormals(EstimatedTask):
    """Unit gradient of the signed distance, outward, see `fields.surface_normals`. Channels (x, y[, z]).

    Keys: `grad_sigma`, the smoothing before the gradient in voxels of the smallest spacing, which removes
    the staircase of the labels (raw differences err by 5 to 13 degrees on a sphere, 2.0 leaves 1 to 1.5);
    `reach`.
    """

    type_name = "surface_normals"
    kind = "vector"
    calibration = confidence.NORMAL
    defaults: ClassVar[Mapping[str, Any]] = {"grad_sigma": 2.0, "reach": None}

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        return ndim

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        return gradient_radius(params["grad_sigma"], spacing)

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        from volumen.derived.arrays.fields import surface_normals

        reach = source.resolve_reach(params["reach"])
        slope, valid = source.gradient("sdt", params["grad_sigma"], reach, params["classes"])
        signed, _ = source.signed_distance(reach, params["classes"])
        normals, valid = surface_normals(slope, signed, valid, reach)
        return normals, valid[None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        from volumen.derived.batches.fields import surface_normals

        reach = source.resolve_reach(params["reach"])
        slope, valid = source.gradient("sdt", params["grad_sigma"], reach, params["classes"])
        signed, _ = source.signed_distance(reach, params["classes"])
        normals, valid = surface_normals(slope, signed, valid, reach)
        return normals, valid[:, None]


class _TensorTask(EstimatedTask):
    """Base class of the structure tensor and its axis, which computes the tensor once for both."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "compute_from": "sdt",
        "grad_sigma": 1.0,
        "tensor_sigma": 1.5,
        "reach": None,
    }
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"compute_from": ("sdt", "binary")}

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        return add_radii(
            gradient_radius(params["grad_sigma"], spacing), gaussian_radius(params["tensor_sigma"], spacing)
        )

    def sure(self, source: Any, params: Mapping[str, Any]) -> Any:
        if params["compute_from"] == "binary":
            margin = self.margin(params, source.spacing)
            return source.erode(source.known(margin), margin, margin)
        return super().sure(source, params)

    def halo(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        return (
            self.margin(params, spacing)
            if params["compute_from"] == "binary"
            else super().halo(params, spacing)
        )

    def tensor(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        parameters = self._tensor_parameters(source, params)
        return source.compute_once(("tensor", *parameters), lambda: self._tensor(source, *parameters))

    def batch_tensor(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        parameters = self._tensor_parameters(source, params)
        return source.compute_once(("tensor", *parameters), lambda: self._batch_tensor(source, *parameters))

    @staticmethod
    def _tensor_parameters(source: SourceFields | BatchFields, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the parameters on which the tensor depends: origin, widths, reach and classes."""
        classes = params["classes"]
        return (
            params["compute_from"],
            (float(params["grad_sigma"]), float(params["tensor_sigma"])),
            source.resolve_reach(params["reach"]),
            None if classes is None else tuple(sorted(classes)),
        )

    @staticmethod
    def _tensor(
        source: SourceFields, origin: str, sigmas: tuple[float, float], reach: float, classes: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from volumen.derived.arrays.fields import smooth_products
        from volumen.derived.arrays.tensors import PLAIN_TRACE, tensor_trace

        radius = gaussian_radius(sigmas[1], source.spacing)
        slope, known = source.gradient(origin, sigmas[0], reach, classes, radius)
        inner = source.inner(radius)
        tensor = smooth_products(
            slope, sigmas[1], source.spacing, source.inside(radius), inner, source.wanted()
        )
        valid = source.erode(known, radius, radius) & (tensor_trace(tensor) >= PLAIN_TRACE)
        if origin == "sdt":
            valid &= np.abs(source.signed_distance(reach, classes)[0]) < np.float32(reach)
        if not valid.all():
            tensor *= valid
        return tensor, valid

    @staticmethod
    def _batch_tensor(
        source: BatchFields, origin: str, sigmas: tuple[float, float], reach: float, classes: Any
    ) -> tuple[Tensor, Tensor]:
        import numpy as np

        from volumen.derived.arrays.tensors import PLAIN_TRACE
        from volumen.derived.batches.axes import tensor_trace
        from volumen.derived.batches.fields import smooth_products

        radius = gaussian_radius(sigmas[1], source.spacing)
        slope, known = source.gradient(origin, sigmas[0], reach, classes, radius)
        tensor = smooth_products(
            slope, sigmas[1], source.spacing, source.inside(radius), source.inner(radius)
        )
        valid = source.erode(known, radius, radius) & (tensor_trace(tensor) >= PLAIN_TRACE)
        if origin == "sdt":
            valid = valid & (source.signed_distance(reach, classes)[0].abs() < float(np.float32(reach)))
        return tensor * valid[:, None], valid


@register_task
class StructureTensor(_TensorTask):
    """Smoothed outer product of gradients, see `fields.smooth_products`.

    Keys: `compute_from` "sdt" (signed distance) or "binary" (mask); `grad_sigma`, the smoothing before the
    gradient, and `tensor_sigma`, after the product, both in voxels of the smallest spacing; `reach`.
    Channels (yy, yx, xx) or (zz, zy, zx, yy, yx, xx). Invalid and 0 where the distance is cut at `reach`, and
    where the trace is below 1e-3, because there is no surface within the filters' width.
    The key `ignore_index` is accepted: the mask marks invalid voxels, but losses may still need the
    number.
    """

    type_name = "structure_tensor"
    kind = "tensor"
    calibration = confidence.TENSOR

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        return ndim * (ndim + 1) // 2

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        tensor, valid = self.tensor(source, params)
        return tensor, valid[None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        tensor, valid = self.batch_tensor(source, params)
        return tensor, valid[:, None]


@register_task
class InplaneDirection(_TensorTask):
    """Axis of least change: eigenvector of the smallest eigenvalue of the structure tensor, without sign.

    Keys as in `structure_tensor`. Channels (x, y[, z]). Also invalid where the two smallest eigenvalues
    differ by less than 0.1 % of the largest: on a flat sheet in 3D all directions within it fit equally well.
    """

    type_name = "inplane_direction"
    kind = "axis"
    calibration = confidence.AXIS

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        return ndim

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        from volumen.derived.arrays.tensors import smallest_axis

        tensor, valid = self.tensor(source, params)
        wanted = source.wanted()
        axes, valid = smallest_axis(tensor, valid if wanted is None else valid & wanted)
        return axes, valid[None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        from volumen.derived.batches.axes import smallest_axis

        axes, valid = smallest_axis(*self.batch_tensor(source, params))
        return axes, valid[:, None]


@register_task
class NearestComponent(EstimatedTask):
    """Direction and distance from the background to the nearest foreground, see `components.nearest_component`.

    Key: `reach`. Channels (x, y[, z], distance): the unit vector to the nearest foreground voxel, and the
    distance to the boundary in the unit of the spacing. Invalid within the foreground and where no foreground is
    within reach.
    """

    type_name = "nearest_component"
    kind = "field"
    calibration = confidence.NEAREST
    turns = ("vector", "scalars")
    defaults: ClassVar[Mapping[str, Any]] = {"reach": None}

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        return ndim + 1

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from volumen.derived.arrays.components import nearest_component

        reach = source.resolve_reach(params["reach"])
        signed, valid = source.signed_distance(reach, params["classes"])
        around = distance_halo(reach, source.spacing)
        feature = source.foreground(params["classes"], around) & source.known(around)
        vectors = nearest_component(feature, spacing=source.spacing, reach=reach, region=source.inner(around))
        valid = valid & (signed > 0) & (signed < np.float32(reach))
        return np.concatenate([vectors, signed[None]]) * valid, valid[None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        import numpy as np
        import torch

        from volumen.derived.batches.fields import nearest_vectors

        reach = source.resolve_reach(params["reach"])
        signed, valid = source.signed_distance(reach, params["classes"])
        around = distance_halo(reach, source.spacing)
        feature = source.foreground(params["classes"], around) & source.known(around)
        vectors = nearest_vectors(feature, spacing=source.spacing, reach=reach, region=source.inner(around))
        valid = (valid & (signed > 0) & (signed < float(np.float32(reach))))[:, None]
        return torch.cat([vectors, signed[:, None]], dim=1) * valid, valid


@register_task
class Skeleton(EstimatedTask):
    """Medial surface of sheets and centreline of tubes, see `skeletons.skeleton`.

    Keys: `grad_sigma`, the smoothing before the gradient in voxels of the smallest spacing; `angle`, in
    degrees, the smallest angle between the directions to the surfaces that meet; `reach`, at least half the
    thickness of the structures: where the distance is cut, the skeleton is not known.
    """

    type_name = "skeleton"
    kind = "binary"
    calibration = confidence.SKELETON
    turns = ("scalars",)
    defaults: ClassVar[Mapping[str, Any]] = {"grad_sigma": 1.0, "angle": 120.0, "reach": None}

    def check(self, name: str, params: Mapping[str, Any]) -> None:
        angle = params["angle"]
        if isinstance(angle, bool) or not isinstance(angle, (int, float)) or not 0 < angle < 180:
            raise VolumenError(f"{name}.angle", expected="degrees between 0 and 180", found=repr(angle))

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        return gradient_radius(params["grad_sigma"], spacing)

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from volumen.derived.arrays.skeletons import skeleton

        reach = source.resolve_reach(params["reach"])
        slope, valid = source.gradient("sdt", params["grad_sigma"], reach, params["classes"])
        signed, _ = source.signed_distance(reach, params["classes"])
        valid = valid & (signed > np.float32(-reach))
        ridge = skeleton(slope, signed, params["angle"]) & valid
        return ridge[None].astype(np.float32), valid[None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        import numpy as np

        from volumen.derived.arrays.skeletons import squared_limit

        reach = source.resolve_reach(params["reach"])
        slope, valid = source.gradient("sdt", params["grad_sigma"], reach, params["classes"])
        signed, _ = source.signed_distance(reach, params["classes"])
        valid = valid & (signed > float(np.float32(-reach)))
        ridge = (signed < 0) & ((slope * slope).sum(dim=1) <= squared_limit(params["angle"])) & valid
        return ridge[:, None].float(), valid[:, None]
