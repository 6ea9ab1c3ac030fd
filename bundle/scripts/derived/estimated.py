"""Base class of derived targets that are estimated near unknown voxels, with a confidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.derived.confidence import Calibration
from volumen.derived.informed import Informed
from volumen.derived.registry import DerivedTask

if TYPE_CHECKING:
    from volumen.derived.batch_fields import BatchFields
    from volumen.derived.label_fields import LabelFields
    from volumen.derived.source_fields import SourceFields

LEAST_PART = 0.3
"""A vector of which a smaller part lies within the plane that is known has no target there."""


class EstimatedTask(DerivedTask):
    """A task that is derived from completed labels near unknown voxels, see `LabelFields.estimated`.

    The values are those that the type derives from the completed labels. So they are exact where no unknown voxel can
    change them, and else estimates with a confidence below 1. Where only a plane is known, such as a single slice, the
    part of vectors and tensors within it is a target and the rest is free; axes have no target there.

    Attributes:
        calibration: the expected error.
    """

    calibration: ClassVar[Calibration]

    @property
    def informs(self) -> bool:
        return True

    @property
    def informs_on_device(self) -> bool:
        return self.on_device

    def fields(self, source: Any, classes: Sequence[int] | None) -> tuple[Any, Sequence[int] | None]:
        """Return the fields of completed labels from which values are derived, and the classes to use with them."""
        return source.estimated(classes)

    def sure(self, source: Any, params: Mapping[str, Any]) -> Any:
        """Return where no unknown voxel changes what the value is computed from: bool (..., *shape)."""
        return source.certain(params.get("reach"), params["classes"], self.margin(params, source.spacing))

    def distance(self, source: Any, params: Mapping[str, Any]) -> Any:
        """Return the distance from the surface on which the confidence depends, of completed labels: (..., *shape)."""
        return source.signed_distance(params.get("reach"), params["classes"])[0]

    def clearance(self, source: Any, params: Mapping[str, Any]) -> Any:
        """Return the distance to the nearest unknown voxel (..., *shape)."""
        return source.distance_bounds(None, params["classes"]).clearance

    def derive_informed(self, source: SourceFields, params: Mapping[str, Any]) -> Informed:
        return self._informed(source, params, self.derive)

    def derive_informed_batch(self, source: BatchFields, params: Mapping[str, Any]) -> Informed:
        return self._informed(source, params, self.derive_batch)

    def _informed(
        self, source: LabelFields, params: Mapping[str, Any], derive: Callable[..., Any]
    ) -> Informed:
        fields, classes = self.fields(source, params["classes"])
        completed = {**params, "classes": classes}
        values, defined = derive(fields, completed)
        # Without the channel axis.
        usable = source.channel(defined, 0) & source.compute_once(("known",), source.known)
        sure = self.sure(source, params) & usable
        distance, clearance = self.distance(fields, completed), self.clearance(source, params)
        finest = min(source.spacing)
        if finest != 1:
            distance, clearance = distance / finest, clearance / finest
        confidence = source.functions.confidence(self.calibration, distance, clearance, sure, usable)
        found = Informed(values, source.as_channel(sure), source.as_channel(confidence))
        if source.ndim == 2 or self.kind not in ("vector", "axis", "tensor"):
            return found
        return self._within_planes(source, found)

    def _within_planes(self, source: LabelFields, found: Informed) -> Informed:
        """Where only a plane is known, replace estimates by the part within it."""
        free, flat = source.free_direction()
        if flat is None:
            return found if self.kind == "axis" else found._replace(free=free)
        flat = source.as_channel(flat) & ~found.valid
        choose = source.functions.choose
        if self.kind == "axis":
            return found._replace(confidence=found.confidence * ~flat)
        values, share = (_vector if self.kind == "vector" else _tensor)(source, found.values, free)
        planar = source.as_channel((free != 0).any(-source.ndim - 1))
        trust = self.calibration.plane_confidence * share * planar * (found.confidence > 0)
        return found._replace(
            values=choose(flat & planar, values, found.values),
            confidence=choose(flat, trust, found.confidence),
            free=free * flat,
        )


def _vector(source: LabelFields, values: Any, free: Any) -> tuple[Any, Any]:
    """Return the unit vector of the part across `free`, and its length, 0 if it is short: (..., 1, *shape)."""
    axes = range(source.ndim)
    along = sum(source.channel(values, i) * source.channel(free, i) for i in axes)
    parts = [source.channel(values, i) - along * source.channel(free, i) for i in axes]
    length = sum(part * part for part in parts) ** 0.5
    unit = source.functions.stack([part / length.clip(1e-6, None) for part in parts], -source.ndim - 1)
    return unit, source.as_channel(length * (length >= LEAST_PART))


def _tensor(source: LabelFields, values: Any, free: Any) -> tuple[Any, Any]:
    """Return the tensor's part across `free` on both sides, P A P with P = 1 - f f^T, and 1."""
    axes = range(source.ndim)
    direction = [source.channel(free, i) for i in reversed(axes)]
    pairs = [(i, j) for i in axes for j in axes if j >= i]
    entries = {pair: source.channel(values, number) for number, pair in enumerate(pairs)}
    product = [sum(entries[min(i, j), max(i, j)] * direction[j] for j in axes) for i in axes]
    both = sum(product[i] * direction[i] for i in axes)
    inside = [
        entries[i, j]
        - direction[i] * product[j]
        - product[i] * direction[j]
        + both * direction[i] * direction[j]
        for i, j in pairs
    ]
    return source.functions.stack(inside, -source.ndim - 1), 1.0
