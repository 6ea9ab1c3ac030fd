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


class EstimatedTask(DerivedTask):
    """A task that is derived from completed labels near unknown voxels, see `LabelFields.estimated`.

    The values are those that the type derives from the completed labels. So they are exact where no unknown voxel can
    change them, and else estimates with a confidence below 1; where that is 0 they are any finite number. Where only a
    plane is known, such as a single slice, the part of vectors and tensors within it is a target and the rest is free;
    axes have no target there.

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
        if self.kind == "axis":
            flat = source.as_channel(flat) & ~found.valid
            return found._replace(confidence=found.confidence * ~flat)
        flat = flat & ~source.channel(found.valid, 0)
        values, confidence, free = source.functions.within_planes(
            found.values, source.channel(found.confidence, 0), free, flat, self.calibration.plane_confidence
        )
        return found._replace(values=values, confidence=source.as_channel(confidence), free=free)
