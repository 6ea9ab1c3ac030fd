"""Finds critical voxels of a batch of masks, in torch; it corresponds to `arrays.critical`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.derived.arrays.critical import adjacency


def critical(
    mask: Tensor, known: Tensor, in_volume: Tensor | None = None, *, compact: bool | None = None
) -> Tensor:
    """Compute `arrays.critical.critical` of bool (B, *spatial): bool (B, *spatial).

    The neighbourhoods are integers with a bit per voxel. All floods run at once, each step of them a few shifts.

    Args:
        mask: foreground.
        known: voxels whose label is known.
        in_volume: voxels inside the volume; None: all.
        compact: flood only the neighbourhoods that need it, as long as they need it, which reads values back from
            the device; None: on a CPU. The result is the same.
    """
    compact = mask.device.type == "cpu" if compact is None else compact
    ndim = mask.dim() - 1
    inside = torch.ones_like(mask) if in_volume is None else in_volume
    bits_of_mask = _neighbours(mask & inside, ndim)
    bits_inside = _neighbours(inside, ndim)
    bits_unknown = _neighbours(inside & ~known, ndim)
    every = 3**ndim
    all_bits, centre = (1 << every) - 1, 1 << (every // 2)
    # Neighbours outside the volume have the label of the voxel itself.
    foreground = torch.where(mask, bits_of_mask | (all_bits & ~bits_inside), bits_of_mask) & ~centre
    _, _, nearest, faces = adjacency(ndim)
    background = ~foreground & nearest
    touching = background & faces
    sure = known & inside & (bits_unknown & ~centre == 0)
    isolated, enclosed = foreground == 0, touching == 0
    # Only the neighbourhoods that hold both classes are flooded.
    mixed = sure & ~isolated & ~enclosed
    found = sure & ((isolated & mask) | (enclosed & ~mask))
    if not compact:
        return found | (mixed & _is_split(foreground, background, touching, ndim, every))
    found[mixed] = _is_split(foreground[mixed], background[mixed], touching[mixed], ndim, None)
    return found


def _is_split(
    foreground: Tensor, background: Tensor, touching: Tensor, ndim: int, steps: int | None
) -> Tensor:
    """Return where the foreground of a neighbourhood, or the background that touches its centre, is in pieces."""
    split = _flood(foreground & -foreground, foreground, ndim, steps, by_face=False) != foreground
    reached = _flood(touching & -touching, background, ndim, steps, by_face=True)
    return split | ((touching & ~reached) != 0)


def _neighbours(mask: Tensor, ndim: int) -> Tensor:
    """Return the 3^ndim voxels around each voxel as bits in C order, int32; outside the array they are 0."""
    bits = mask.to(torch.int32)
    for axis in range(ndim, 0, -1):
        width = [0, 0] * (ndim - axis) + [1, 1] + [0, 0] * (axis - 1)
        padded, size = F.pad(bits, width), bits.shape[axis]
        shift = 3 ** (ndim - axis)
        bits = (
            padded.narrow(axis, 0, size)
            | padded.narrow(axis, 1, size) << shift
            | padded.narrow(axis, 2, size) << 2 * shift
        )
    return bits


def _flood(start: Tensor, within: Tensor, ndim: int, steps: int | None, *, by_face: bool) -> Tensor:
    """Return the components of `within` that contain the bits of `start`, joined by faces or also by corners.

    Args:
        start, within: neighbourhoods as bits.
        ndim: 2 or 3.
        steps: number of steps, without a look at the values: no path is longer than a neighbourhood has voxels; None:
            as many as are needed.
        by_face: joined by faces only.
    """
    found, done = start, 0
    while steps is None or done < steps:
        done += 1
        grown = found
        for axis in range(ndim):
            shift = 3 ** (ndim - 1 - axis)
            source = found if by_face else grown
            up, down = source & _plane(axis, ndim, (0, 1)), source & _plane(axis, ndim, (1, 2))
            grown = grown | up << shift | down >> shift
        grown = grown & within
        if steps is None and bool((grown == found).all()):
            return found
        found = grown
    return found


def _plane(axis: int, ndim: int, places: tuple[int, ...]) -> int:
    """Return the bits of the neighbourhood's voxels with these places along an axis."""
    size = 3 ** (ndim - 1 - axis)
    return sum(1 << k for k in range(3**ndim) if k // size % 3 in places)
