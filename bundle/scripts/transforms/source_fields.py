"""The fields of one label in one patch, each computed once and shared between tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from scripts.transforms.fields import Region, check_spacing, erode, gradient, signed_distance, smooth
from scripts.transforms.instance_distance import instance_distance
from scripts.transforms.task_registry import (
    add_radii,
    complete_params,
    get_task,
    gradient_radius,
    resolve_reach,
)

Classes = Sequence[int] | None


class SourceFields:
    """Labels of a patch with a halo, and what tasks derive from them.

    Every field is computed on the core (the array less its halo) and as much around it as later filters need:
    one signed distance at the largest reach, one gradient per width. Results of the methods cover the part of
    the core that is inside the volume's bounding box; `restore` puts them back into the core. Do not write
    into them.

    Args:
        labels: integer (C, *spatial). One channel: class numbers. Several: one binary channel per class.
        known: bool (1, *spatial); default everywhere.
        in_volume: bool (1, *spatial); default everywhere.
        spacing: voxel size per spatial axis; default 1.
        halo: voxels per axis on every side that are only there to be looked at.
        reach: the largest reach that any task will ask for, so that one distance serves all.
        margin: voxels per axis around the core on which filters will ask for the distance, at most.
        instances: labels number instances: distances are those to the nearest other one, see
            `instance_distance`.

    Attributes:
        ndim: 2 or 3.
        spacing: voxel size per axis.
        shape: of the results.
        core_shape: of the patch, which `restore` fills.

    Raises:
        ValueError: shapes, spacing or halo do not fit.
    """

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
        self.ndim = labels.ndim - 1
        self.spacing = check_spacing(self.ndim, spacing)
        self._reach = resolve_reach(reach, self.spacing)
        self._margin = tuple(margin) if margin is not None else (0,) * self.ndim
        full = labels.shape[1:]
        halo = (halo,) * self.ndim if isinstance(halo, int) else tuple(halo)
        self.core_shape = tuple(size - 2 * edge for size, edge in zip(full, halo))
        if len(halo) != self.ndim or min(halo) < 0 or min(self.core_shape) <= 0:
            raise ValueError(f"a halo of {halo} leaves nothing of labels of shape {labels.shape}")
        for name, mask in (("known", known), ("in_volume", in_volume)):
            if mask is not None and tuple(mask.shape) != (1, *full):
                raise ValueError(f"{name} has shape {mask.shape}, labels {labels.shape}")

        inside = None if in_volume is None else np.asarray(in_volume[0], dtype=bool)
        box = _bounding_box(inside, full)
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
        # Inside its bounding box a volume mostly fills everything: then the array's border is the volume's.
        self._in_volume = None if inside is None or inside[box].all() else inside[box]
        self._box_shape = self._labels.shape[1:]
        self._instances = instances
        self._shared: dict[Hashable, Any] = {}

    @property
    def empty(self) -> bool:
        """Whether no voxel of the core is inside the volume."""
        return 0 in self.shape

    @property
    def channels(self) -> int:
        """Number of channels of the labels."""
        return len(self._labels)

    def labels(self, margin: Sequence[int] | None = None) -> np.ndarray:
        """Return the labels (C, *window)."""
        return self._labels[(slice(None), *self.window(margin))]

    def known(self, margin: Sequence[int] | None = None) -> np.ndarray:
        """Return where a label is known, inside the volume: bool (*window)."""
        window = self.window(margin)
        known = np.ones([part.stop - part.start for part in window], bool)
        for mask in (self._known, self._in_volume):
            if mask is not None:
                known &= mask[window]
        return known

    def inside(self, margin: Sequence[int] | None = None) -> np.ndarray | None:
        """Return where the volume is (*window), None for everywhere."""
        return None if self._in_volume is None else self._in_volume[self.window(margin)]

    def foreground(self, classes: Classes = None, margin: Sequence[int] | None = None) -> np.ndarray:
        """Return bool (*window): label above 0, or one of `classes` (channel numbers where labels have
        channels)."""
        return _foreground(self.labels(margin), classes)

    def window(self, margin: Sequence[int] | None = None) -> Region:
        """Return the core with `margin` voxels around it, as far as the volume's bounding box goes."""
        return tuple(
            slice(max(part.start - extra, 0), min(part.stop + extra, size))
            for part, extra, size in zip(self._core, margin or (0,) * self.ndim, self._box_shape)
        )

    def inner(self, outer: Sequence[int] | None, inner: Sequence[int] | None = None) -> Region:
        """Return the window of margin `inner` as slices of an array on the window of margin `outer`."""
        return tuple(
            slice(small.start - large.start, small.stop - large.start)
            for small, large in zip(self.window(inner), self.window(outer))
        )

    def resolve_reach(self, reach: float | None) -> float:
        """Return the reach in the unit of the spacing."""
        return resolve_reach(reach, self.spacing)

    def signed_distance(
        self,
        reach: float | None = None,
        classes: Classes = None,
        margin: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `fields.signed_distance` cut at `reach`: distance and validity (*window)."""
        cut = self.resolve_reach(reach)
        wide = _larger(margin, self._margin)
        full = max(cut, self._reach)
        key: tuple = ("distance", _key(classes))
        if self._known is not None:
            # A value beyond the cut may be valid where the exact one is not: an unknown voxel lies between.
            full, key = cut, (*key, cut)
        distance, valid = self.share(
            (*key, full, self._place(wide)), lambda: self._distance(full, classes, wide)
        )
        part = self.inner(wide, margin)
        distance, valid = distance[part], valid[part]
        if cut < full:
            distance = distance.clip(np.float32(-cut), np.float32(cut))
        return distance, valid

    def gradient(
        self,
        compute_from: str,
        sigma: float,
        reach: float | None = None,
        classes: Classes = None,
        margin: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradient of the Gaussian-smoothed signed distance ("sdt") or mask ("binary").

        The gradient of the mask is taken per smallest spacing, so that both have no unit.

        Returns:
            float32 (ndim, *window) in the order of the spatial axes; valid bool (*window): so is all that it
            was computed from.
        """
        radius = gradient_radius(sigma, self.spacing)
        spare = [max(most - used, 0) for most, used in zip(self._margin, radius)]
        wide = _larger(margin, spare)
        key = (
            "gradient",
            compute_from,
            float(sigma),
            self.resolve_reach(reach),
            _key(classes),
            self._place(wide),
        )
        slope, valid = self.share(key, lambda: self._gradient(compute_from, sigma, reach, classes, wide))
        part = self.inner(wide, margin)
        return slope[(slice(None), *part)], valid[part]

    def erode(
        self, valid: np.ndarray, radii: Sequence[int], margin: Sequence[int], to: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return `fields.erode` of `valid`, given on the window of `margin`, on the window of margin `to`."""
        part = self.inner(margin, to)
        if self._known is None:
            return valid[part].copy()
        return erode(valid, radii, self.inside(margin), part)

    def share(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what `compute()` gave when `key` was first asked for."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Put (C, *shape) into zeros (C, *core): what lies outside the volume is 0, or False."""
        if self.shape == self.core_shape:
            return np.ascontiguousarray(values)
        out = np.zeros((len(values), *self.core_shape), values.dtype)
        part = tuple(slice(start, start + size) for start, size in zip(self._offset, self.shape))
        out[(slice(None), *part)] = values
        return out

    def _place(self, margin: Sequence[int]) -> Hashable:
        return tuple((part.start, part.stop) for part in self.window(margin))

    def _distance(
        self, reach: float, classes: Classes, margin: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._instances and classes is None and self.channels == 1:
            return instance_distance(
                self._labels[0],
                spacing=self.spacing,
                reach=reach,
                known=self._known,
                in_volume=self._in_volume,
                region=self.window(margin),
            )
        return signed_distance(
            _foreground(self._labels, classes),
            spacing=self.spacing,
            reach=reach,
            known=self._known,
            in_volume=self._in_volume,
            region=self.window(margin),
        )

    def _gradient(
        self, compute_from: str, sigma: float, reach: float | None, classes: Classes, margin: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        radius = gradient_radius(sigma, self.spacing)
        outer = add_radii(margin, radius)
        spacing = self.spacing
        if compute_from == "binary":
            field = self.foreground(classes, outer).astype(np.float32)
            valid = self.known(outer)
            spacing = tuple(size / min(spacing) for size in spacing)
        else:
            field, valid = self.signed_distance(reach, classes, outer)
        # Central differences look one voxel further than the result.
        between = tuple(size + 1 for size in margin)
        smoothed = smooth(field, sigma, self.spacing, self.inside(outer), self.inner(outer, between))
        slope = gradient(smoothed, spacing, self.inside(between), self.inner(between, margin))
        return slope, self.erode(valid, radius, outer, margin)


def derive_target(
    type_name: str,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    in_volume: np.ndarray | None = None,
    spacing: Sequence[float] | None = None,
    halo: Sequence[int] | int = 0,
    instances: bool = False,
    **params: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Derive one target from arrays.

    Args:
        type_name: a registered task type, such as "surface_normals".
        labels: integer (C, *spatial), as of `SourceFields`.
        known, in_volume, spacing, halo, instances: as of `SourceFields`.
        params: the keys of the type.

    Returns:
        values float32 (C, *core), valid bool (1, *core).
    """
    task = get_task(type_name)
    full = complete_params(task, params)
    source = SourceFields(
        labels,
        known=known,
        in_volume=in_volume,
        spacing=spacing,
        halo=halo,
        reach=full.get("reach"),
        margin=task.margin(full, check_spacing(labels.ndim - 1, spacing)),
        instances=instances,
    )
    return derive_from(source, type_name, full)


def derive_from(
    source: SourceFields, type_name: str, params: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Derive one target from fields that may serve others too; `params` complete. Returns as
    `derive_target`."""
    task = get_task(type_name)
    if source.empty:
        channels = task.out_channels(source.ndim, params)
        values = np.zeros((channels, *source.core_shape), np.float32)
        return values, np.zeros((1, *source.core_shape), bool)
    values, valid = task.derive(source, params)
    return source.restore(values.astype(np.float32, copy=False)), source.restore(valid)


def _foreground(labels: np.ndarray, classes: Classes) -> np.ndarray:
    if len(labels) > 1:
        chosen = labels if classes is None else labels[list(classes)]
        return np.asarray((chosen > 0).any(axis=0))
    if classes is None:
        return labels[0] > 0
    found = labels[0] == classes[0]
    for one in classes[1:]:
        found |= labels[0] == one
    return found


def _bounding_box(inside: np.ndarray | None, shape: Sequence[int]) -> Region:
    """Return the smallest box that holds all True voxels; an empty one where there is none."""
    if inside is None:
        return tuple(slice(0, size) for size in shape)
    box = []
    for axis in range(inside.ndim):
        others = tuple(other for other in range(inside.ndim) if other != axis)
        found = np.flatnonzero(inside.any(axis=others))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0))
    return tuple(box)


def _larger(first: Sequence[int] | None, second: Sequence[int]) -> tuple[int, ...]:
    return tuple(second) if first is None else tuple(map(max, zip(first, second)))


def _key(classes: Classes) -> tuple[int, ...] | None:
    return None if classes is None else tuple(sorted(classes))
