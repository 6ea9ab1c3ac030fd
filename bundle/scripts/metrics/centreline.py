"""clDice: do thin structures stay whole? Exact for blocks of any size, up to a stated depth of structures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from volumen.metrics.grid import BlockGrid, Region, inside, three_axes
from volumen.utils.jit import compiled

DEPTH = 128
"""City-block steps to the outside beyond which all voxels of a structure count as equally deep: what lies deeper, in
structures more than twice as thick, is skeleton as a whole. A block needs a halo of this many voxels at most."""


@compiled
def _sweep(depth, backward):
    """Spread depths from each voxel to the next ones, in one direction; return whether any voxel changed.

    `depth` is int16 (Z, Y, X): 0 outside, steps to the outside within a mask, -1 where unknown.
    """
    nz, ny, nx = depth.shape
    changed = False
    for k in range(nz):
        z = nz - 1 - k if backward else k
        for j in range(ny):
            y = ny - 1 - j if backward else j
            for i in range(nx):
                x = nx - 1 - i if backward else i
                own = depth[z, y, x]
                if own <= 0:
                    continue
                best = own
                if k:
                    before = depth[z + 1, y, x] if backward else depth[z - 1, y, x]
                    if before >= 0 and before + 1 < best:
                        best = before + 1
                if j:
                    before = depth[z, y + 1, x] if backward else depth[z, y - 1, x]
                    if before >= 0 and before + 1 < best:
                        best = before + 1
                if i:
                    before = depth[z, y, x + 1] if backward else depth[z, y, x - 1]
                    if before >= 0 and before + 1 < best:
                        best = before + 1
                if best < own:
                    depth[z, y, x] = best
                    changed = True
    return changed


@compiled
def _largest_nearby(depth):
    """Return where a voxel of a mask is at least as deep as its 26 neighbours, bool (Z, Y, X)."""
    nz, ny, nx = depth.shape
    out = np.zeros((nz, ny, nx), np.bool_)
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                own = depth[z, y, x]
                if own <= 0:
                    continue
                largest = True
                for a in range(max(z - 1, 0), min(z + 2, nz)):
                    for b in range(max(y - 1, 0), min(y + 2, ny)):
                        for c in range(max(x - 1, 0), min(x + 2, nx)):
                            if depth[a, b, c] > own:
                                largest = False
                out[z, y, x] = largest
    return out


def _depths(mask: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """Return the city-block steps to the outside, at most DEPTH, int16 (Z, Y, X); -1 where unknown."""
    depth = np.where(mask, np.int16(DEPTH), np.int16(0))
    if known is not None:
        depth[~known] = -1
    # Two sweeps are exact unless unknown voxels stand in the way.
    while _sweep(depth, False) | _sweep(depth, True):
        if known is None:
            break
    return depth


def skeleton(mask: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the morphological skeleton: at each erosion, what an opening would remove (Lantuejoul 1978).

    The medial surface of a sheet and the centreline of a tube, one or two voxels thick; erosion by the face
    neighbours, dilation by the full cube, as in soft clDice. It is the same as the voxels whose city-block distance to
    the outside is not exceeded by any of their 26 neighbours, which is how it is computed. Thinning to curves would
    shrink a sheet to threads.

    Args:
        mask: bool (Y, X) or (Z, Y, X).
        known: bool; unknown voxels and the border neither end nor erode a structure. None: all are known.

    Returns:
        bool, same shape, within `mask`. A structure more than 2 `DEPTH` thick keeps what lies deeper than that.
    """
    certain = None if known is None or known.all() else np.ascontiguousarray(three_axes(known))
    return _largest_nearby(_depths(np.ascontiguousarray(three_axes(mask)), certain)).reshape(mask.shape)


Read = Callable[[Region], tuple[np.ndarray, np.ndarray, np.ndarray]]


def block_skeleton(
    side: int, box: Region, grid: BlockGrid, read: Read, outer: Region, arrays: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Return the skeleton of a block as it is in the whole volume.

    Args:
        side: 0 for the prediction, 1 for the truth.
        box: the block.
        grid: the blocks of the volume.
        read: gives prediction, truth and known voxels of any region.
        outer: a region around the block, of which the arrays are there already.
        arrays: prediction, truth and known voxels of `outer`, bool (Z, Y, X).
    """
    while True:
        mask, known = arrays[side], arrays[2]
        ring = inside(grid.around(box, 1), outer)
        depth = _depths(np.ascontiguousarray(mask), None if known.all() else np.ascontiguousarray(known))
        halo = _context(box, outer, grid)
        # Depths up to the halo are those of the whole volume; one of the ring around the block has one step less.
        if halo is None or halo > DEPTH or int(depth[ring].max(initial=0)) < halo:
            part = inside(box, grid.around(box, 1))
            return _largest_nearby(np.ascontiguousarray(depth[ring]))[part]
        outer = grid.around(box, min(2 * halo, DEPTH + 1))
        arrays = read(outer)


def _context(box: Region, outer: Region, grid: BlockGrid) -> int | None:
    """Return the voxels around a block on the sides that do not end at the volume's border, None for none."""
    gaps = []
    for part, around, n in zip(box, outer, grid.shape, strict=True):
        gaps += [part.start - around.start] if around.start > 0 else []
        gaps += [around.stop - part.stop] if around.stop < n else []
    return min(gaps, default=None)


def count_centrelines(
    of_pred: np.ndarray, of_truth: np.ndarray, pred: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """Return int64 (4,): voxels of S(pred) in truth, of S(pred), of S(truth) in pred, of S(truth). They add up."""
    return np.array(
        [
            np.count_nonzero(of_pred & truth),
            np.count_nonzero(of_pred),
            np.count_nonzero(of_truth & pred),
            np.count_nonzero(of_truth),
        ],
        np.int64,
    )


def cldice_counts(pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the counts of `count_centrelines` of masks in memory.

    Args:
        pred: bool (Y, X) or (Z, Y, X).
        truth: bool, same shape.
        known: bool; None: all are known.
    """
    return count_centrelines(skeleton(pred, known), skeleton(truth, known), pred, truth)


def cldice(counts: np.ndarray) -> float:
    """Return the harmonic mean of topology precision and sensitivity, Shit et al. 2021.

    0 where one mask is empty and the other not; NaN where both are.
    """
    in_truth, of_pred, in_pred, of_truth = (int(count) for count in counts)
    if not of_pred and not of_truth:
        return math.nan
    if not in_truth or not in_pred:
        return 0.0
    precision, recall = in_truth / of_pred, in_pred / of_truth
    return 2 * precision * recall / (precision + recall)
