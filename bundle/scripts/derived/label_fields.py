"""Base class for the fields of a patch and of a batch: windows around the core; each field is computed once."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

from volumen.derived.arrays.fields import check_spacing
from volumen.derived.arrays.planes import NEAR, SIDE
from volumen.derived.distance_window import Bounds, Region, surroundings
from volumen.derived.extents import add_radii, gradient_radius, in_voxels, resolve_reach
from volumen.utils.boxes import box_of

Classes = Sequence[int] | None


class FieldFunctions(NamedTuple):
    """The functions of `fields`, `instance_distance`, `completion` and `planes`, for arrays or batches of tensors."""

    signed_distance: Callable[..., tuple[Any, Any]]
    instance_distance: Callable[..., tuple[Any, Any]]
    smooth: Callable[..., Any]
    gradient: Callable[..., Any]
    erode: Callable[..., Any]
    distance_bounds: Callable[..., Bounds]
    instance_bounds: Callable[..., Bounds]
    continue_surfaces: Callable[..., Any]
    continue_numbers: Callable[..., Any]
    free_direction: Callable[..., tuple[Any, Any]]
    confidence: Callable[..., Any]
    within_planes: Callable[..., tuple[Any, Any, Any]]
    choose: Callable[..., Any]


class LabelFields(ABC):
    """Fields of one label, on a core and on the margin around it that later filters need.

    Arrays may have any axes before the channels: a patch has none, a batch has one. Do not modify results.

    Args:
        ndim: 2 or 3.
        spacing: voxel size per spatial axis; default 1.
        reach: the largest reach of all tasks, so that one distance serves all of them.
        margin: the largest number of voxels per axis around the core at which filters need the distance.
        instances: labels number instances: distances are those to the nearest other instance, see
            `instance_distance`.

    Attributes:
        ndim: 2 or 3.
        spacing: voxel size per axis.
    """

    functions: ClassVar[FieldFunctions]

    # The subclass sets: integer labels with a channel axis before the spatial ones, masks without one (None for
    # everywhere), and the core as a part of their spatial axes.
    _labels: Any
    _known: Any
    _in_volume: Any
    _wanted: Any = None
    _core: Region

    def __init__(
        self,
        ndim: int,
        *,
        spacing: Sequence[float] | None,
        reach: float | None,
        margin: Sequence[int] | None,
        instances: bool,
    ) -> None:
        self.ndim = ndim
        self.spacing = check_spacing(ndim, spacing)
        self._reach = resolve_reach(reach, self.spacing)
        self._margin = tuple(margin) if margin is not None else (0,) * ndim
        self._instances = instances
        self._shared: dict[Hashable, Any] = {}

    @property
    def channels(self) -> int:
        """The number of channels of the labels."""
        return self._labels.shape[-self.ndim - 1]

    def wanted(self) -> Any:
        """Return where values are needed, bool (..., *core), None for everywhere: where labels were known before."""
        return None if self._wanted is None else self._wanted[(..., *self.window())]

    def labels(self, margin: Sequence[int] | None = None) -> Any:
        """Return the labels (..., C, *window)."""
        return self._labels[(..., *self.window(margin))]

    @abstractmethod
    def known(self, margin: Sequence[int] | None = None) -> Any:
        """Return where a label is known inside the volume: bool (..., *window)."""

    def inside(self, margin: Sequence[int] | None = None) -> Any:
        """Return which voxels lie inside the volume, bool (..., *window), None for all."""
        return None if self._in_volume is None else self._in_volume[(..., *self.window(margin))]

    def foreground(self, classes: Classes = None, margin: Sequence[int] | None = None) -> Any:
        """Return bool (..., *window): label above 0, or one of `classes` (channel numbers where labels have
        channels)."""
        return self._foreground(self.labels(margin), classes)

    def window(self, margin: Sequence[int] | None = None) -> Region:
        """Return the core enlarged by `margin` voxels, clipped to the arrays."""
        around, _ = surroundings(self._labels.shape[-self.ndim :], self._core, margin or (0,) * self.ndim)
        return around

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
    ) -> tuple[Any, Any]:
        """Return `fields.signed_distance` cut at `reach`: distance and validity (..., *window)."""
        cut = self.resolve_reach(reach)
        wide = _larger(margin, self._margin)
        # With unknown voxels, a distance cut at `reach` may be valid where the exact one is not.
        full = max(cut, self._reach) if self._known is None else cut
        distance, valid = self.compute_once(
            ("distance", full, _key(classes), self._place(wide)), lambda: self._distance(full, classes, wide)
        )
        part = (..., *self.inner(wide, margin))
        distance, valid = distance[part], valid[part]
        return (distance.clip(-cut, cut) if cut < full else distance), valid

    def distance_bounds(
        self,
        reach: float | None = None,
        classes: Classes = None,
        margin: Sequence[int] | None = None,
    ) -> Bounds:
        """Return `fields.distance_bounds` cut at `reach`: each part covers (..., *window).

        Bounds of a distance that is cut are the bounds, cut: one computation serves all.
        """
        cut = self.resolve_reach(reach)
        wide, full = _larger(margin, self._margin), max(cut, self._reach)
        bounds = self.compute_once(
            ("bounds", full, _key(classes), self._place(wide)), lambda: self._bounds(full, classes, wide)
        )
        part = (..., *self.inner(wide, margin))
        lower, upper, known, clearance, certain = (field[part] for field in bounds)
        if cut < full:
            certain = certain | (known & (abs(lower) >= cut) & (abs(upper) >= cut))
            lower, upper, clearance = (field.clip(-cut, cut) for field in (lower, upper, clearance))
        return Bounds(lower, upper, known, clearance, certain)

    def clearance(self) -> Any:
        """Return the distance to the nearest unknown voxel, cut at the reach: (..., *core)."""
        known = (
            self._labels[(..., 0, *(slice(None),) * self.ndim)] < 0 if self._known is None else self._known
        )
        return self.compute_once(
            ("clearance",),
            lambda: (
                self.functions.distance_bounds(
                    known,
                    spacing=self.spacing,
                    reach=self._reach,
                    known=self._known,
                    in_volume=self._in_volume,
                    region=self.window(),
                ).clearance
            ),
        )

    def certain(
        self,
        reach: float | None = None,
        classes: Classes = None,
        radii: Sequence[int] | None = None,
    ) -> Any:
        """Return where the distance is known exactly at every voxel within a box of `radii`: bool (..., *core)."""
        radii = radii or (0,) * self.ndim
        return self.erode(self.distance_bounds(reach, classes, radii).certain, radii, radii)

    def estimated(self, classes: Classes = None) -> tuple[LabelFields, Classes]:
        """Return fields whose unknown voxels are completed, and the classes to use with them.

        Known surfaces are continued straight on, see `completion.continue_surfaces`; instances have the number of the
        nearest known voxel. Where no voxel is unknown these are the fields themselves.
        """
        if self._known is None:
            return self, classes
        if self._instances and classes is None and self.channels == 1:
            return self.continued(), None
        return self.compute_once(("completed", _key(classes)), lambda: self._completed(classes)), None

    def continued(self) -> LabelFields:
        """Return fields whose unknown voxels have the label of the nearest known one, within reach."""
        if self._known is None:
            return self
        return self.compute_once(("continued",), self._continued)

    def _completed(self, classes: Classes) -> LabelFields:
        lower, upper = self.distance_bounds(None, classes, self._margin)[:2]
        foreground, window = self._all_foreground(classes), self.window(self._margin)
        # The far bound is the distance to what is known.
        distance = self.functions.choose(foreground[(..., *window)], lower, upper)
        completed = self.functions.continue_surfaces(
            foreground, self._sure(), distance, window, spacing=self.spacing, reach=self._reach
        )
        return self._with_labels(self.as_channel(completed), instances=False)

    def _continued(self) -> LabelFields:
        labels = self.functions.continue_numbers(
            self._labels, self._sure(), spacing=self.spacing, reach=self._reach
        )
        return self._with_labels(labels, instances=self._instances)

    def _with_labels(self, labels: Any, instances: bool) -> LabelFields:
        """Return the same fields of other labels, all of which are known."""
        fields = copy.copy(self)
        fields._labels, fields._known, fields._instances, fields._shared = labels, None, instances, {}
        fields._wanted = self._known
        return fields

    def _sure(self) -> Any:
        """Return where a label is known inside the volume, on the whole arrays."""
        return self._known if self._in_volume is None else self._known & self._in_volume

    def as_channel(self, field: Any) -> Any:
        """Return (..., *spatial) as (..., 1, *spatial)."""
        return field[(..., None, *(slice(None),) * self.ndim)]

    def channel(self, field: Any, number: int) -> Any:
        """Return a channel (..., *spatial) of (..., C, *spatial)."""
        return field[(..., number, *(slice(None),) * self.ndim)]

    def free_direction(self) -> tuple[Any, Any]:
        """Return `planes.free_direction` on the core of a 3D patch: direction (..., 3, *core), flat (..., *core)."""
        margin = (SIDE + NEAR,) * self.ndim
        return self.compute_once(
            ("free",),
            lambda: self.functions.free_direction(
                self.known(margin), self.spacing, self.inside(margin), self.inner(margin)
            ),
        )

    def gradient(
        self,
        compute_from: str,
        sigma: float,
        reach: float | None = None,
        classes: Classes = None,
        margin: Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """Return the gradient of the Gaussian-smoothed signed distance ("sdt") or mask ("binary").

        The gradient of the mask is taken per smallest spacing, so that both have no unit.

        Returns:
            float32 (..., ndim, *window) in the order of the spatial axes; valid bool (..., *window): every value it
            was computed from is valid.
        """
        radius = gradient_radius(sigma, self.spacing)
        wide = _larger(margin, [max(most - used, 0) for most, used in zip(self._margin, radius)])
        key = (compute_from, float(sigma), self.resolve_reach(reach), _key(classes), self._place(wide))
        slope, valid = self.compute_once(
            ("gradient", *key), lambda: self._gradient(compute_from, sigma, reach, classes, wide)
        )
        part = (..., *self.inner(wide, margin))
        return slope[part], valid[part]

    def erode(
        self, valid: Any, radii: Sequence[int], margin: Sequence[int], to: Sequence[int] | None = None
    ) -> Any:
        """Return `fields.erode` of `valid`; the input covers the window of `margin`, the result that of `to`."""
        part = self.inner(margin, to)
        if self._known is None:
            return valid[(..., *part)]
        return self.functions.erode(valid, radii, self.inside(margin), part)

    def compute_once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return the result of `compute()`, which is called once per `key` and then cached."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def _place(self, margin: Sequence[int]) -> Hashable:
        return box_of(self.window(margin))

    @abstractmethod
    def _float(self, mask: Any) -> Any:
        """Return a mask as float32."""

    def _only_channel(self, labels: Any) -> Any:
        return labels[(..., 0, *(slice(None),) * self.ndim)]

    def _all_foreground(self, classes: Classes) -> Any:
        """Return the foreground on the whole arrays."""
        return self.compute_once(
            ("foreground", _key(classes)), lambda: self._foreground(self._labels, classes)
        )

    def _foreground(self, labels: Any, classes: Classes) -> Any:
        if self.channels > 1:
            every = (slice(None),) * self.ndim
            chosen = labels if classes is None else labels[(..., list(classes), *every)]
            return (chosen > 0).any(-self.ndim - 1)
        only = self._only_channel(labels)
        if classes is None:
            return only > 0
        found = only == classes[0]
        for one in classes[1:]:
            found |= only == one
        return found

    def _distance(self, reach: float, classes: Classes, margin: Sequence[int]) -> tuple[Any, Any]:
        """Compute the distance on a window; if labels number instances, to the nearest other instance."""
        functions = (self.functions.signed_distance, self.functions.instance_distance)
        return self._measure(functions, reach, classes, margin)

    def _bounds(self, reach: float, classes: Classes, margin: Sequence[int]) -> Bounds:
        """Compute the bounds of the distance on a window."""
        functions = (self.functions.distance_bounds, self.functions.instance_bounds)
        return self._measure(functions, reach, classes, margin)

    def _measure(
        self, functions: Sequence[Callable[..., Any]], reach: float, classes: Classes, margin: Sequence[int]
    ) -> Any:
        """Call the first function on the foreground, or the second one on the numbers of instances."""
        if self._instances and classes is None and self.channels == 1:
            measure, of = functions[1], self._only_channel(self._labels)
        else:
            measure, of = functions[0], self._all_foreground(classes)
        return measure(
            of,
            spacing=self.spacing,
            reach=reach,
            known=self._known,
            in_volume=self._in_volume,
            region=self.window(margin),
        )

    def _gradient(
        self, compute_from: str, sigma: float, reach: float | None, classes: Classes, margin: Sequence[int]
    ) -> tuple[Any, Any]:
        radius = gradient_radius(sigma, self.spacing)
        outer = add_radii(margin, radius)
        spacing = self.spacing
        if compute_from == "binary":
            field = self._float(self.foreground(classes, outer))
            valid = self.known(outer)
            spacing = in_voxels(spacing)
        else:
            field, valid = self.signed_distance(reach, classes, outer)
        # Central differences need one voxel more than the result.
        between = tuple(size + 1 for size in margin)
        smoothed = self.functions.smooth(
            field, sigma, self.spacing, self.inside(outer), self.inner(outer, between)
        )
        slope = self.functions.gradient(smoothed, spacing, self.inside(between), self.inner(between, margin))
        return slope, self.erode(valid, radius, outer, margin)


def core_sizes(full: Sequence[int], halo: Sequence[int] | int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the halo per axis and the size without the halo.

    Raises:
        ValueError: no voxel remains, or the halo is not one number per axis.
    """
    edges = (halo,) * len(full) if isinstance(halo, int) else tuple(halo)
    core = tuple(size - 2 * edge for size, edge in zip(full, edges))
    if len(edges) != len(full) or min(edges) < 0 or min(core) <= 0:
        raise ValueError(f"a halo of {edges} leaves nothing of labels of shape {tuple(full)}")
    return edges, core


def _larger(first: Sequence[int] | None, second: Sequence[int]) -> tuple[int, ...]:
    return tuple(second) if first is None else tuple(map(max, zip(first, second)))


def _key(classes: Classes) -> tuple[int, ...] | None:
    return None if classes is None else tuple(sorted(classes))
