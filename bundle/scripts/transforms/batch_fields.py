"""The fields of one label in a batch of patches on the training device, each computed once and shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.transforms.distance_window import check_masks
from scripts.transforms.label_fields import FieldFunctions, LabelFields, core_sizes
from scripts.transforms.torch_fields import erode, gradient, instance_distance, signed_distance, smooth


class BatchFields(LabelFields):
    """`source_fields.SourceFields` for a batch: the same questions, answered in torch with a batch axis in front.

    Args:
        labels: integer (B, C, *spatial). One channel: class numbers. Several: one binary channel per class.
        known: bool (B, 1, *spatial); None for everywhere, which is faster.
        in_volume: bool (B, 1, *spatial); None for everywhere, which is faster.
        spacing: voxel size per spatial axis, the same for the whole batch; default 1.
        halo: voxels per axis on every side that are only there to be looked at.
        reach: the largest reach that any task will ask for, so that one distance serves all.
        margin: voxels per axis around the core on which filters will ask for the distance, at most.
        instances: labels number instances: distances are those to the nearest other one.

    Attributes:
        ndim: 2 or 3.
        spacing: voxel size per axis.
        shape: of the patch, (B, *core).

    Raises:
        ValueError: shapes, spacing or halo do not fit.
    """

    functions = FieldFunctions(signed_distance, instance_distance, smooth, gradient, erode)

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
        """Return where a label is known, inside the volume: bool (B, *window)."""
        window = (slice(None), *self.window(margin))
        masks = [mask[window] for mask in (self._known, self._in_volume) if mask is not None]
        if not masks:
            return torch.ones_like(self._labels[:, 0][window], dtype=torch.bool)
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def _float(self, mask: Tensor) -> Tensor:
        return mask.to(torch.float32)
