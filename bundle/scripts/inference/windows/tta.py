"""Test-time augmentation by signed axis permutations: flips and 90-degree rotations.

The network sees the transformed window; its outputs are turned back, vectors and tensors by components
as well as by place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

MODES = ("none", "mirror", "rotate")


@dataclass(frozen=True)
class AxisTransform:
    """Spatial axes permuted, then flipped: axis `a` of the result is axis `order[a]` of the input.

    Args:
        order: a permutation of the spatial axes.
        flips: whether axis `a` of the result is reversed.
    """

    order: tuple[int, ...]
    flips: tuple[bool, ...]

    def apply(self, window: Tensor) -> Tensor:
        """Transform a window of shape (B, C, *patch)."""
        turned = window.permute(0, 1, *(axis + 2 for axis in self.order))
        return turned.flip([axis + 2 for axis, flip in enumerate(self.flips) if flip])

    def undo(self, window: Tensor) -> Tensor:
        """Bring the places of a transformed window back."""
        turned = window.flip([axis + 2 for axis, flip in enumerate(self.flips) if flip])
        return turned.permute(0, 1, *(self.order.index(axis) + 2 for axis in range(len(self.order))))

    def undo_components(self, output: Tensor, kind: str) -> Tensor:
        """Bring places and components back.

        Args:
            output: a head's output for the transformed window, shape (B, C, *patch).
            kind: the head's kind; vectors and axes have components (x, y[, z]), tensors (yy, yx, xx) or
                (zz, zy, zx, yy, yx, xx), all others are scalars.
        """
        output = self.undo(output)
        if kind in ("vector", "axis"):
            return self._undo_vector(output)
        if kind == "tensor":
            return self._undo_tensor(output)
        return output

    def _source(self, axis: int) -> tuple[int, float]:
        """Return which transformed component, with which sign, is the component along an original axis."""
        place = self.order.index(axis)
        return place, -1.0 if self.flips[place] else 1.0

    def _undo_vector(self, output: Tensor) -> Tensor:
        n = len(self.order)
        result = output.clone()
        for axis in range(n):
            place, sign = self._source(axis)
            # Components run (x, y, z): the last spatial axis comes first.
            result[:, n - 1 - axis] = sign * output[:, n - 1 - place]
        return result

    def _undo_tensor(self, output: Tensor) -> Tensor:
        n = len(self.order)
        pairs = [(i, j) for i in range(n) for j in range(i, n)]
        channel = {pair: number for number, pair in enumerate(pairs)}
        result = output.clone()
        for (i, j), number in channel.items():
            (first, sign_i), (second, sign_j) = self._source(i), self._source(j)
            result[:, number] = sign_i * sign_j * output[:, channel[min(first, second), max(first, second)]]
        return result


def transforms(
    mode: str, patch_size: Sequence[int], spacing: Sequence[float] | None = None
) -> tuple[AxisTransform, ...]:
    """Return the transforms of a mode, the identity first.

    Args:
        mode: "none", "mirror" (all 2^n flips) or "rotate" (flips and 90-degree rotations in the planes of
            axes that have equal patch size and spacing).
        patch_size: shape of a window.
        spacing: voxel size per axis; None for equal.

    Raises:
        ValueError: for an unknown mode.
    """
    ndim = len(patch_size)
    if mode not in MODES:
        raise ValueError(f"tta must be one of {MODES}, got {mode!r}")
    identity = tuple(range(ndim))
    if mode == "none":
        return (AxisTransform(identity, (False,) * ndim),)
    orders = [identity]
    if mode == "rotate":
        sizes = list(zip(patch_size, spacing or (1.0,) * ndim, strict=True))
        orders = [
            order
            for order in itertools.permutations(range(ndim))
            if all(sizes[order[axis]] == sizes[axis] for axis in range(ndim))
        ]
    flips = list(itertools.product((False, True), repeat=ndim))
    return tuple(AxisTransform(order, flip) for order in orders for flip in flips)
