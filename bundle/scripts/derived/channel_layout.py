"""Describes the geometry of a target's channels: how they change when the image is mirrored or rotated.

This module imports no heavy packages, because the task registry and the configuration use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PARTS = ("scalars", "vector", "axis", "tensor", "offsets")


@dataclass(frozen=True)
class ChannelPart:
    """Consecutive channels that change together when the image is rotated.

    Args:
        kind: "scalars": each channel keeps its value; "vector": components (x, y[, z]); "axis": the same,
            without sign; "tensor": the upper triangle of a symmetric matrix, (yy, yx, xx) or (zz, zy, zx, yy,
            yx, xx); "offsets": each channel compares a voxel with the one at its offset, and the order of
            the two does not matter.
        channels: number of channels.
        offsets: voxels per spatial axis, in the order of the axes, for each channel of "offsets".
    """

    kind: str
    channels: int
    offsets: tuple[tuple[int, ...], ...] = ()

    def names(self) -> list[str]:
        """Return a short name for each channel; scalars are numbered, or named "value" if there is only one."""
        if self.kind in ("vector", "axis"):
            return [f"{axis} component" for axis in "xyz"[: self.channels]]
        if self.kind == "tensor":
            return [a + b for a, b in _pairs("zyx" if self.channels == 6 else "yx")]
        if self.kind == "offsets":
            return [f"voxel and the one at ({', '.join(map(str, offset))})" for offset in self.offsets]
        return ["value"] if self.channels == 1 else [f"value {k}" for k in range(1, self.channels + 1)]


ChannelLayout = tuple[ChannelPart, ...]


def make_layout(
    parts: Sequence[str], ndim: int, channels: int, offsets: Sequence[Sequence[int]] = ()
) -> ChannelLayout:
    """Return the layout of a target's channels.

    Args:
        parts: names among `PARTS` in the order of the channels. "scalars" stands for all channels that the
            other parts do not use, so it can occur only once.
        ndim: 2 or 3.
        channels: channels of the target.
        offsets: those of the part "offsets".

    Raises:
        ValueError: an unknown name, "scalars" twice, or parts with another number of channels.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts or parts.count("scalars") > 1:
        raise ValueError(f"parts must be among {PARTS}, 'scalars' once at most, got {list(parts)}")
    sizes = {"vector": ndim, "axis": ndim, "tensor": ndim * (ndim + 1) // 2, "offsets": len(offsets)}
    left = channels - sum(sizes.get(part, 0) for part in parts)
    if left < 0 or (left == 0) == ("scalars" in parts):
        raise ValueError(f"parts {list(parts)} do not make {channels} channels in {ndim}D")
    chosen = tuple(tuple(int(step) for step in offset) for offset in offsets)
    return tuple(
        ChannelPart(part, sizes.get(part, left), chosen if part == "offsets" else ()) for part in parts
    )


def _pairs(axes: str) -> list[tuple[str, str]]:
    return [(a, b) for number, a in enumerate(axes) for b in axes[number:]]
