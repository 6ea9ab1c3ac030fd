"""Test-time augmentation by signed axis permutations: flips and 90-degree rotations.

The network receives the transformed window. Its outputs are turned back in place and in components, as each target's
`ChannelLayout` states: vectors, axes and tensors change their components; channels that compare a voxel with the one
at an offset change their channel and place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from volumen.derived.arrays.affinities import overlap
from volumen.derived.channel_layout import ChannelLayout, ChannelPart
from volumen.inference.windows.heads import Head
from volumen.utils.errors import VolumenError

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
        """Undo the transform of voxel places in a window."""
        turned = window.flip([axis + 2 for axis, flip in enumerate(self.flips) if flip])
        return turned.permute(0, 1, *(self.order.index(axis) + 2 for axis in range(len(self.order))))

    def undo_components(self, output: Tensor, layout: ChannelLayout) -> Tensor:
        """Undo the transform of voxel places and of components.

        Args:
            output: a head's output for the transformed window, shape (B, C, *patch).
            layout: meaning of its channels.

        Returns:
            Shape (B, C, *patch); 0 where `known` is False.
        """
        output = self.undo(output)
        parts = torch.split(output, [part.channels for part in layout], dim=1)
        turned = [self._undo_part(values, part) for values, part in zip(parts, layout, strict=True)]
        return turned[0] if len(turned) == 1 else torch.cat(turned, dim=1)

    def known(self, layout: ChannelLayout, shape: Sequence[int]) -> Tensor | None:
        """Return where `undo_components` has values, bool (C, *patch), or None for everywhere.

        A channel that compares a voxel with the one at offset o compares it, in a mirrored window, with the one at
        -o: the same pair of voxels, but stored at the other voxel, which may lie outside the window. If no channel has
        the turned offset, the turned window has no value for this channel.
        """
        if all(part.kind != "offsets" for part in layout):
            return None
        masks = []
        for part in layout:
            mask = torch.ones(part.channels, *shape, dtype=torch.bool)
            if part.kind == "offsets":
                pairs = torch.ones(1, part.channels, *shape)
                mask = self._undo_offsets(pairs, part.offsets)[0] > 0
            masks.append(mask)
        return torch.cat(masks)

    def _undo_part(self, values: Tensor, part: ChannelPart) -> Tensor:
        if part.kind in ("vector", "axis"):
            return self._undo_vector(values)
        if part.kind == "tensor":
            return self._undo_tensor(values)
        if part.kind == "offsets":
            return self._undo_offsets(values, part.offsets)
        return values

    def _source(self, axis: int) -> tuple[int, float]:
        """Return the transformed component, and its sign, that is the component along an original axis."""
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

    def _undo_offsets(self, output: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
        result = torch.zeros_like(output)
        # Channels with the same offset are equal: the first one is used for all of them.
        for number, offset in enumerate(offsets):
            turned = tuple(-offset[a] if flip else offset[a] for a, flip in zip(self.order, self.flips))
            if turned == tuple(offset):
                result[:, number] = output[:, number]
            elif turned in offsets:
                result[:, number] = output[:, offsets.index(turned)]
            elif (opposite := tuple(-step for step in turned)) in offsets:
                # The pair (p, p + o) is stored at its other voxel, p + o.
                here, there = overlap(output.shape[2:], offset)
                source = output[:, offsets.index(opposite)]
                result[:, number][(slice(None), *here)] = source[(slice(None), *there)]
        return result


def check_layouts(heads: Sequence[Head], mode: str) -> None:
    """Check that every head can be augmented.

    Raises:
        VolumenError: augmentation is requested, and a head does not state how its channels turn.
    """
    without_layout = [head.name for head in heads if head.layout is None]
    if mode != "none" and without_layout:
        raise VolumenError(
            f"target {', '.join(without_layout)}",
            f"does not say how its channels turn, so it cannot be averaged over turned windows (tta: {mode})",
            remedy="predict with --tta none, choose other --targets, or add `turns` to its task type, "
            'as turns = ("vector", "scalars")',
        )


def transforms(
    mode: str,
    patch_size: Sequence[int],
    spacing: Sequence[float] | None = None,
    mirror_axes: Sequence[int] | None = None,
) -> tuple[AxisTransform, ...]:
    """Return the transforms of a mode, the identity first.

    Args:
        mode: "none", "mirror" (all 2^n flips) or "rotate" (flips and 90-degree rotations in the planes of
            axes that have equal patch size and spacing).
        patch_size: shape of a window.
        spacing: voxel size per axis; None for equal.
        mirror_axes: the only axes that mirror flips; None: all.

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
    free = range(ndim) if mode == "rotate" or mirror_axes is None else mirror_axes
    flips = list(itertools.product(*((False, True) if axis in free else (False,) for axis in range(ndim))))
    return tuple(AxisTransform(order, flip) for order in orders for flip in flips)
