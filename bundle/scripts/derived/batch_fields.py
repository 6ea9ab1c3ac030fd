"""The fields of one label in a batch of patches on the training device; each is computed once and cached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from volumen.derived.batches.completion import continue_numbers, continue_surfaces
from volumen.derived.batches.fields import (
    distance_bounds,
    erode,
    gradient,
    instance_bounds,
    instance_distance,
    signed_distance,
    smooth,
)
from volumen.derived.batches.planes import confidence, free_direction, within_planes
from volumen.derived.distance_window import check_masks
from volumen.derived.label_fields import FieldFunctions, LabelFields, core_sizes


class BatchFields(LabelFields):
    """`source_fields.SourceFields` for a batch: the same methods, in torch and with a batch axis in front.

    Args:
        labels, known, in_volume, halo: as in `SourceFields`, with a batch axis in front of arrays. None for a mask
            is faster than one that is True everywhere.
        spacing, reach, margin, instances: as in `LabelFields`, the same for the whole batch.

    Attributes:
        ndim, spacing: as in `LabelFields`.
        shape: of the patch, (B, *core).

    Raises:
        ValueError: shapes, spacing or halo do not match.
    """

    functions = FieldFunctions(
        signed_distance,
        instance_distance,
        smooth,
        gradient,
        erode,
        distance_bounds,
        instance_bounds,
        continue_surfaces,
        continue_numbers,
        free_direction,
        confidence,
        within_planes,
        torch.where,
    )

    def __init__(
        self,
        labels: Tensor,
        *,
        known: Tensor | None = None,
        in_volume: Tensor | None = None,
        spacing: Sequence[float] | None = None,
        halo: Sequence[int] | int = 0,
        reach: float | None = None,
        margin: Sequence[int] | None = None,
        instances: bool = False,
    ) -> None:
        if labels.dim() not in (4, 5):
            raise ValueError(f"labels need shape (B, C, Y, X) or (B, C, Z, Y, X), got {tuple(labels.shape)}")
        super().__init__(labels.dim() - 2, spacing=spacing, reach=reach, margin=margin, instances=instances)
        halo, core = core_sizes(labels.shape[2:], halo)
        check_masks((len(labels), 1, *labels.shape[2:]), known=known, in_volume=in_volume)
        self._core = tuple(slice(edge, edge + size) for edge, size in zip(halo, core))
        self.shape = (len(labels), *core)
        self._labels = labels
        self._known = None if known is None else known[:, 0]
        self._in_volume = None if in_volume is None else in_volume[:, 0]

    def known(self, margin: Sequence[int] | None = None) -> Tensor:
        """Return where a label is known inside the volume: bool (B, *window)."""
        window = (slice(None), *self.window(margin))
        masks = [mask[window] for mask in (self._known, self._in_volume) if mask is not None]
        if not masks:
            return torch.ones_like(self._labels[:, 0][window], dtype=torch.bool)
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def _float(self, mask: Tensor) -> Tensor:
        return mask.to(torch.float32)
