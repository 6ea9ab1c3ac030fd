"""The fields of one label in one patch; each is computed once and cached for all tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.derived.arrays.completion import continue_numbers, continue_surfaces
from volumen.derived.arrays.fields import distance_bounds, erode, gradient, signed_distance, smooth
from volumen.derived.arrays.instance_distance import instance_bounds, instance_distance
from volumen.derived.arrays.planes import free_direction, within_planes
from volumen.derived.arrays.trust import confidence
from volumen.derived.distance_window import check_masks
from volumen.derived.label_fields import FieldFunctions, LabelFields, core_sizes
from volumen.utils.boxes import bounding_box, whole_box


class SourceFields(LabelFields):
    """Labels of a patch with a halo, and the fields from which tasks derive targets.

    Every field is computed on the core (the array without its halo) and on the margin around it that later filters
    need: one signed distance at the largest reach, one gradient per width. Results of the methods cover the part of
    the core that is inside the volume's bounding box; `restore` puts them back into the core. Do not modify
    them.

    Args:
        labels: integer (C, *spatial). One channel: class numbers. Several: one binary channel per class.
        known: bool (1, *spatial); default everywhere.
        in_volume: bool (1, *spatial); default everywhere.
        halo: number of voxels per axis on every side that are only context for the core.
        spacing, reach, margin, instances: as in `LabelFields`.

    Attributes:
        ndim, spacing: as in `LabelFields`.
        shape: of the results.
        core_shape: shape of the core, which is the result of `restore`.

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
        np.where,
    )

    def __init__(
        self,
        labels: np.ndarray,
        *,
        known: np.ndarray | None = None,
        in_volume: np.ndarray | None = None,
        spacing: Sequence[float] | None = None,
        halo: Sequence[int] | int = 0,
        reach: float | None = None,
        margin: Sequence[int] | None = None,
        instances: bool = False,
    ) -> None:
        if labels.ndim not in (3, 4):
            raise ValueError(f"labels need shape (C, Y, X) or (C, Z, Y, X), got {labels.shape}")
        super().__init__(labels.ndim - 1, spacing=spacing, reach=reach, margin=margin, instances=instances)
        full = labels.shape[1:]
        halo, self.core_shape = core_sizes(full, halo)
        check_masks((1, *full), known=known, in_volume=in_volume)

        inside = None if in_volume is None else np.asarray(in_volume[0], dtype=bool)
        box = tuple(slice(*side) for side in (whole_box(full) if inside is None else bounding_box(inside)))
        self._core = tuple(
            slice(max(edge - part.start, 0), max(min(edge + size, part.stop) - part.start, 0))
            for edge, size, part in zip(halo, self.core_shape, box)
        )
        self._offset = tuple(
            part.start + core.start - edge for part, core, edge in zip(box, self._core, halo)
        )
        self.shape = tuple(max(part.stop - part.start, 0) for part in self._core)
        self._labels = labels[(slice(None), *box)]
        self._known = None if known is None or known.all() else np.asarray(known[0], dtype=bool)[box]
        # A volume usually fills its bounding box: then the array's border is the volume's border.
        self._in_volume = None if inside is None or inside[box].all() else inside[box]

    @property
    def empty(self) -> bool:
        """Whether no voxel of the core is inside the volume."""
        return 0 in self.shape

    def known(self, margin: Sequence[int] | None = None) -> np.ndarray:
        """Return where a label is known inside the volume: bool (*window)."""
        window = self.window(margin)
        known = np.ones([part.stop - part.start for part in window], bool)
        for mask in (self._known, self._in_volume):
            if mask is not None:
                known &= mask[window]
        return known

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Put (C, *shape) into zeros (C, *core): voxels outside the volume are 0, or False."""
        if self.shape == self.core_shape:
            return np.ascontiguousarray(values)
        out = np.zeros((len(values), *self.core_shape), values.dtype)
        part = tuple(slice(start, start + size) for start, size in zip(self._offset, self.shape))
        out[(slice(None), *part)] = values
        return out

    def _float(self, mask: np.ndarray) -> np.ndarray:
        return mask.astype(np.float32)
