"""Finds the voxels whose label decides the topology of a mask: critical points, by a test of their neighbourhood."""

from __future__ import annotations

from functools import cache

import numpy as np

from volumen.utils.jit import compiled


def critical(mask: np.ndarray, known: np.ndarray, in_volume: np.ndarray | None = None) -> np.ndarray:
    """Return the known voxels whose flip merges or splits components, or opens or fills a hole, a tunnel or a cavity.

    A voxel is simple if its flip keeps the topology. That holds if and only if T = 1 and T' = 1 (Bertrand and Malandain
    1994): T is the number of components of the foreground among its neighbours (26 in 3D, 8 in 2D, joined by faces,
    edges and corners), T' that of the components of the background that touch the voxel by a face, joined by faces
    within its 18 (8) nearest neighbours. Critical are the voxels that are not simple, without two trivial sorts: voxels
    inside the foreground (T' = 0, the flip would make a hole of one voxel) and inside the background (T = 0, an object
    of one voxel). A hole of one voxel and an object of one voxel are critical.

    Neighbours outside the volume have the label of the voxel itself.

    Args:
        mask: bool (*spatial), 2 or 3 axes.
        known: bool (*spatial). A voxel with an unknown neighbour inside the volume is not critical.
        in_volume: bool (*spatial), default everywhere; voxels outside the array count as outside the volume.

    Returns:
        bool (*spatial).
    """
    ndim = mask.ndim
    state = np.full(
        [n + 2 for n in mask.shape], 3, np.uint8
    )  # 0 background, 1 foreground, 2 unknown, 3 outside
    inner = np.where(known, mask, 2).astype(np.uint8)
    if in_volume is not None:
        inner[~in_volume] = 3
    state[(slice(1, -1),) * ndim] = inner
    offsets = np.array(np.unravel_index(np.arange(3**ndim), (3,) * ndim)) - 1
    steps = np.dot(np.array(state.strides), offsets).astype(np.int64)
    out = np.zeros(state.shape, np.uint8)
    _mark(state.reshape(-1), steps, *adjacency(ndim), out.reshape(-1))
    return out[(slice(1, -1),) * ndim] > 0


@cache
def adjacency(ndim: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Return what joins the voxels of a neighbourhood, as bit masks over its 3^ndim voxels in C order.

    Returns:
        for each voxel those that share a face, edge or corner with it, uint32 (3^ndim,); those that share a face and
        belong to the neighbourhood of the background; that neighbourhood; the voxels that share a face with the centre.
    """
    places = np.array(np.unravel_index(np.arange(3**ndim), (3,) * ndim)).T - 1
    steps = np.abs(places[:, None] - places[None])
    centre = len(places) // 2
    nearest = (np.abs(places).sum(axis=1) <= 2) & (np.arange(len(places)) != centre)
    faces = np.abs(places).sum(axis=1) == 1
    joined = (steps.max(axis=2) == 1) & (np.arange(len(places)) != centre)[None]
    by_face = (steps.sum(axis=2) == 1) & nearest[None]
    bits = np.uint32(1) << np.arange(len(places), dtype=np.uint32)
    return (
        (joined * bits).sum(axis=1).astype(np.uint32),
        (by_face * bits).sum(axis=1).astype(np.uint32),
        int((nearest * bits).sum()),
        int((faces * bits).sum()),
    )


@compiled
def _flood(start, within, joined):
    """Return the component of `within` that contains the bits of `start`."""
    found = np.uint32(start)
    front = found
    while front:
        grown = np.uint32(0)
        rest = front
        place = 0
        while rest:
            if rest & np.uint32(1):
                grown |= joined[place]
            rest >>= np.uint32(1)
            place += 1
        front = grown & within & ~found
        found |= front
    return found


@compiled
def _mark(state, steps, joined, by_face, nearest, faces, out):
    """Set `out` to 1 at the critical voxels of a flat array whose border is outside the volume."""
    centre = steps.size // 2
    for place in range(state.size):
        own = state[place]
        if own > 1:
            continue
        foreground = np.uint32(0)
        unknown = False
        for k in range(steps.size):
            if k == centre:
                continue
            other = state[place + steps[k]]
            if other == 2:
                unknown = True
                break
            if other == 1 or (other == 3 and own == 1):
                foreground |= np.uint32(1) << np.uint32(k)
        if unknown:
            continue
        background = ~foreground & np.uint32(nearest)
        touching = background & np.uint32(faces)
        if foreground == 0:
            out[place] = own
            continue
        if touching == 0:
            out[place] = 1 - own
            continue
        first = foreground & (~foreground + np.uint32(1))
        if _flood(first, foreground, joined) != foreground:
            out[place] = 1
            continue
        first = touching & (~touching + np.uint32(1))
        if touching & ~_flood(first, background, by_face):
            out[place] = 1
