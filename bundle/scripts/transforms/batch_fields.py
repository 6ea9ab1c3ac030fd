"""The fields of one label in a batch of patches on the training device, each computed once and shared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from scripts.transforms.fields import Region, check_spacing
from scripts.transforms.task_registry import gradient_radius, resolve_reach
from scripts.transforms.torch_fields import erode, gradient, instance_distance, signed_distance, smooth

Classes = Sequence[int] | None


class BatchFields:
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
        self.ndim = labels.dim() - 2
        self.spacing = check_spacing(self.ndim, spacing)
        self._reach = resolve_reach(reach, self.spacing)
        self._margin = tuple(margin) if margin is not None else (0,) * self.ndim
        self._full = tuple(labels.shape[2:])
        halo = (halo,) * self.ndim if isinstance(halo, int) else tuple(halo)
        core = tuple(size - 2 * edge for size, edge in zip(self._full, halo))
        if len(halo) != self.ndim or min(halo) < 0 or min(core) <= 0:
            raise ValueError(f"a halo of {halo} leaves nothing of labels of shape {tuple(labels.shape)}")
        for name, mask in (("known", known), ("in_volume", in_volume)):
            if mask is not None and tuple(mask.shape) != (len(labels), 1, *self._full):
                raise ValueError(f"{name} has shape {tuple(mask.shape)}, labels {tuple(labels.shape)}")
        self._core = tuple(slice(edge, edge + size) for edge, size in zip(halo, core))
        self.shape = (len(labels), *core)
        self._labels = labels
        self._instances = instances
        self._known = None if known is None else known[:, 0]
        self._in_volume = None if in_volume is None else in_volume[:, 0]
        self._shared: dict[Hashable, Any] = {}

    @property
    def channels(self) -> int:
        """Number of channels of the labels."""
        return self._labels.shape[1]

    def labels(self, margin: Sequence[int] | None = None) -> Tensor:
        """Return the labels (B, C, *window)."""
        return self._labels[(slice(None), slice(None), *self.window(margin))]

    def known(self, margin: Sequence[int] | None = None) -> Tensor:
        """Return where a label is known, inside the volume: bool (B, *window)."""
        window = (slice(None), *self.window(margin))
        masks = [mask[window] for mask in (self._known, self._in_volume) if mask is not None]
        if not masks:
            return torch.ones_like(self._labels[:, 0][window], dtype=torch.bool)
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]

    def inside(self, margin: Sequence[int] | None = None) -> Tensor | None:
        """Return where the volume is, bool (B, *window), None for everywhere."""
        return None if self._in_volume is None else self._in_volume[(slice(None), *self.window(margin))]

    def foreground(self, classes: Classes = None, margin: Sequence[int] | None = None) -> Tensor:
        """Return bool (B, *window): label above 0, or one of `classes` (channel numbers where labels have
        channels)."""
        return _foreground(self.labels(margin), classes)

    def window(self, margin: Sequence[int] | None = None) -> Region:
        """Return the core with `margin` voxels around it, as far as the arrays go."""
        return tuple(
            slice(max(part.start - extra, 0), min(part.stop + extra, size))
            for part, extra, size in zip(self._core, margin or (0,) * self.ndim, self._full)
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
    ) -> tuple[Tensor, Tensor]:
        """Return the signed distance cut at `reach` and its validity, (B, *window) each."""
        cut = self.resolve_reach(reach)
        wide = _larger(margin, self._margin)
        # With unknown voxels, validity depends on the cut.
        full = max(cut, self._reach) if self._known is None else cut
        distance, valid = self.share(
            ("distance", full, _key(classes), self._place(wide)), lambda: self._distance(full, classes, wide)
        )
        part = (slice(None), *self.inner(wide, margin))
        distance, valid = distance[part], valid[part]
        return (distance.clamp(-cut, cut) if cut < full else distance), valid

    def gradient(
        self,
        compute_from: str,
        sigma: float,
        reach: float | None = None,
        classes: Classes = None,
        margin: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the Gaussian-smoothed signed distance ("sdt") or mask ("binary"):
        float32 (B, D, *window) in the order of the spatial axes, and its validity (B, *window)."""
        radius = gradient_radius(sigma, self.spacing)
        wide = _larger(margin, [max(most - used, 0) for most, used in zip(self._margin, radius)])
        key = (compute_from, float(sigma), self.resolve_reach(reach), _key(classes), self._place(wide))
        slope, valid = self.share(
            ("gradient", *key), lambda: self._gradient(compute_from, sigma, reach, classes, wide)
        )
        part = self.inner(wide, margin)
        return slope[(slice(None), slice(None), *part)], valid[(slice(None), *part)]

    def erode(
        self, valid: Tensor, radii: Sequence[int], margin: Sequence[int], to: Sequence[int] | None = None
    ) -> Tensor:
        """Return where all voxels of the volume within a box of `radii` are valid, on the window of margin `to`,
        of `valid` on that of `margin`."""
        part = self.inner(margin, to)
        if self._known is None:
            return valid[(slice(None), *part)]
        return erode(valid, radii, self.inside(margin), part)

    def share(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return what `compute()` gave when `key` was first asked for."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def _place(self, margin: Sequence[int]) -> Hashable:
        return tuple((part.start, part.stop) for part in self.window(margin))

    def _distance(self, reach: float, classes: Classes, margin: Sequence[int]) -> tuple[Tensor, Tensor]:
        if self._instances and classes is None and self.channels == 1:
            return instance_distance(
                self._labels[:, 0],
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
    ) -> tuple[Tensor, Tensor]:
        radius = gradient_radius(sigma, self.spacing)
        outer = tuple(first + second for first, second in zip(margin, radius))
        spacing = self.spacing
        if compute_from == "binary":
            field = self.foreground(classes, outer).to(torch.float32)
            valid = self.known(outer)
            spacing = tuple(size / min(spacing) for size in spacing)
        else:
            field, valid = self.signed_distance(reach, classes, outer)
        # Central differences look one voxel further than the result.
        between = tuple(size + 1 for size in margin)
        smoothed = smooth(field, sigma, self.spacing, self.inside(outer), self.inner(outer, between))
        slope = gradient(smoothed, spacing, self.inside(between), self.inner(between, margin))
        return slope, self.erode(valid, radius, outer, margin)


def _foreground(labels: Tensor, classes: Classes) -> Tensor:
    if labels.shape[1] > 1:
        chosen = labels if classes is None else labels[:, list(classes)]
        return (chosen > 0).any(dim=1)
    if classes is None:
        return labels[:, 0] > 0
    found = labels[:, 0] == classes[0]
    for one in classes[1:]:
        found = found | (labels[:, 0] == one)
    return found


def _larger(first: Sequence[int] | None, second: Sequence[int]) -> tuple[int, ...]:
    return tuple(second) if first is None else tuple(map(max, zip(first, second)))


def _key(classes: Classes) -> tuple[int, ...] | None:
    return None if classes is None else tuple(sorted(classes))
