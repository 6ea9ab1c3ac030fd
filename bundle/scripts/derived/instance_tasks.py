"""Derived targets that compare labels of neighbouring voxels: boundary, affinities, shape descriptors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.derived import confidence
from volumen.derived.estimated import EstimatedTask
from volumen.derived.extents import gaussian_radius
from volumen.derived.long_range import long_range_offsets
from volumen.derived.registry import DerivedTask, register_task
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from volumen.derived.batch_fields import BatchFields
    from volumen.derived.source_fields import SourceFields


def chosen_labels(
    source: SourceFields, classes: Sequence[int] | None, margin: Sequence[int] | None = None
) -> np.ndarray:
    """Return the labels (C, *window) with other classes as background; the chosen labels keep their values."""
    import numpy as np

    labels = source.labels(margin)
    if classes is None:
        return labels
    if len(labels) > 1:
        return labels[list(classes)]
    return np.where(source.foreground(classes, margin), labels, labels.dtype.type(0))


def chosen_batch_labels(
    source: BatchFields, classes: Sequence[int] | None, margin: Sequence[int] | None = None
) -> Tensor:
    """Compute `chosen_labels` for a batch: (B, C, *window)."""
    labels = source.labels(margin)
    if classes is None:
        return labels
    if labels.shape[1] > 1:
        return labels[:, list(classes)]
    return labels * source.foreground(classes, margin)[:, None]


@register_task
class Boundary(DerivedTask):
    """Voxels next to another label, see `boundaries.boundary`. Key: `side` "both", "inner" or "outer"."""

    type_name = "boundary"
    kind = "binary"
    turns = ("scalars",)
    defaults: ClassVar[Mapping[str, Any]] = {"side": "both"}
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"side": ("both", "inner", "outer")}

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        return (1,) * len(spacing)

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from volumen.derived.arrays.boundaries import boundary

        margin = self.margin(params, source.spacing)
        labels, known = chosen_labels(source, params["classes"], margin), source.known(margin)
        found, valid = boundary(labels, known, params["side"], source.inside(margin))
        part = source.inner(margin)
        return found[part][None].astype(np.float32), valid[part][None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        from volumen.derived.batches.instances import boundary

        margin = self.margin(params, source.spacing)
        labels, known = chosen_batch_labels(source, params["classes"], margin), source.known(margin)
        found, valid = boundary(labels, known, params["side"], source.inside(margin))
        part = (slice(None), *source.inner(margin))
        return found[part][:, None].float(), valid[part][:, None]


@register_task
class Affinities(DerivedTask):
    """Affinities: whether voxels at fixed offsets belong to the same instance, see `affinities.affinities`.

    Key: `offsets`, a list of voxels per axis in the order of the axes (default: the previous voxel along
    every axis); one channel each. Invalid where a partner is unknown or outside the volume.
    """

    type_name = "affinities"
    kind = "multilabel"
    turns = ("offsets",)
    defaults: ClassVar[Mapping[str, Any]] = {"offsets": None}

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        return len(self.offsets(ndim, params))

    def check(self, name: str, params: Mapping[str, Any]) -> None:
        offsets = params["offsets"]
        good = offsets in (None, "auto") or (
            isinstance(offsets, (list, tuple))
            and len(offsets) > 0
            and all(
                isinstance(one, (list, tuple)) and all(type(step) is int for step in one) for one in offsets
            )
            and len({len(one) for one in offsets}) == 1
            and len(offsets[0]) in (2, 3)
        )
        if not good:
            raise VolumenError(
                f"{name}.offsets",
                expected="auto, or a list of whole numbers per axis, as [[-1, 0, 0]]",
                found=repr(offsets),
            )

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        offsets = self.offsets(len(spacing), params)
        return tuple(max(abs(step) for step in axis) for axis in zip(*offsets))

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from volumen.derived.arrays.affinities import affinities

        margin = self.margin(params, source.spacing)
        offsets = self.offsets(source.ndim, params)
        labels = chosen_labels(source, params["classes"], margin)
        values, valid = affinities(labels, source.known(margin), offsets)
        part = source.inner(margin)
        return values[(slice(None), *part)].astype(np.float32), valid[part][None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        from volumen.derived.batches.instances import affinities

        margin = self.margin(params, source.spacing)
        labels = chosen_batch_labels(source, params["classes"], margin)
        values, valid = affinities(labels, source.known(margin), self.offsets(source.ndim, params))
        part = source.inner(margin)
        return values[(slice(None), slice(None), *part)].float(), valid[(slice(None), *part)][:, None]

    def offsets(self, ndim: int, params: Mapping[str, Any]) -> Sequence[Sequence[int]]:
        offsets = params["offsets"]
        if offsets == "auto":
            # A training replaces this by offsets that suit its voxel size and its objects.
            return long_range_offsets((1.0,) * ndim)
        if offsets is None:
            return [[-int(axis == other) for other in range(ndim)] for axis in range(ndim)]
        if len(offsets[0]) != ndim:
            raise VolumenError(
                "auxiliary_tasks: offsets",
                expected=f"{ndim} numbers each for a {ndim}D image",
                found=offsets[0],
            )
        return offsets


@register_task
class LocalShapeDescriptors(EstimatedTask):
    """Size, mean offset and covariance of an instance within a Gaussian window, see `descriptors`.

    Key: `sigma`, width of the window in voxels of the smallest spacing. 6 channels in 2D, 10 in 3D. Valid
    within instances if all voxels within the window are known.
    """

    type_name = "local_shape_descriptors"
    kind = "field"
    calibration = confidence.DESCRIPTORS
    turns = ("vector", "tensor", "scalars")
    defaults: ClassVar[Mapping[str, Any]] = {"sigma": 4.0}

    def out_channels(self, ndim: int, params: Mapping[str, Any]) -> int:
        return 10 if ndim == 3 else 6

    def check(self, name: str, params: Mapping[str, Any]) -> None:
        sigma = params["sigma"]
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < 1000:
            raise VolumenError(f"{name}.sigma", expected="a number above 0", found=repr(sigma))

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        return gaussian_radius(params["sigma"], spacing)

    def fields(self, source: Any, classes: Sequence[int] | None) -> tuple[Any, Sequence[int] | None]:
        # Instances go on with the number of the nearest known voxel; a surface has no number to go on with.
        return source.continued(), classes

    def sure(self, source: Any, params: Mapping[str, Any]) -> Any:
        margin = self.margin(params, source.spacing)
        return source.erode(source.known(margin), margin, margin)

    def clearance(self, source: Any, params: Mapping[str, Any]) -> Any:
        return source.clearance()

    def distance(self, source: Any, params: Mapping[str, Any]) -> Any:
        # What counts is how much of the window is unknown, wherever the surface is.
        import numpy as np

        return np.zeros(source.shape, np.float32)

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from volumen.derived.arrays.descriptors import local_shape_descriptors

        margin = self.margin(params, source.spacing)
        known = source.known(margin)
        labels = source.labels(margin)
        # With several binary channels, the number of the channel is the number of the instance.
        numbers = (
            labels[0]
            if len(labels) == 1
            else np.where((labels > 0).any(axis=0), labels.argmax(axis=0) + 1, 0)
        )
        numbers = np.where(known, numbers, 0)
        if params["classes"] is not None:
            numbers = np.where(source.foreground(params["classes"], margin), numbers, 0)
        values = local_shape_descriptors(numbers, params["sigma"], source.spacing)
        part = source.inner(margin)
        valid = source.erode(known, margin, margin) & (numbers[part] > 0)
        return values[(slice(None), *part)] * valid, valid[None]
