"""clDice: do thin structures stay whole?"""

from __future__ import annotations

import math

import numpy as np


def _any_of_three(x: np.ndarray, axis: int) -> np.ndarray:
    """Return where a voxel or one of its two neighbours along an axis is True."""
    out = x.copy()
    low = [slice(None)] * x.ndim
    high = list(low)
    low[axis], high[axis] = slice(None, -1), slice(1, None)
    out[tuple(low)] |= x[tuple(high)]
    out[tuple(high)] |= x[tuple(low)]
    return out


def _erode(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Take away what touches the outside by a face; unknown voxels and the border are no outside."""
    outside = ~x & known
    touched = outside.copy()
    for axis in range(x.ndim):
        touched |= _any_of_three(outside, axis)
    return known & ~touched


def _dilate(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    for axis in range(x.ndim):
        x = _any_of_three(x, axis)
    return x & known


def skeleton(mask: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the morphological skeleton: at each erosion, what an opening would remove (Lantuejoul 1978).

    The medial surface of a sheet and the centreline of a tube, one or two voxels thick; erosion by the face
    neighbours, dilation by the full cube, as in soft clDice. Thinning to curves would shrink a sheet to
    threads.

    Args:
        mask: bool, spatial.
        known: bool; unknown voxels and the border neither end nor erode a structure. None: all known.

    Returns:
        bool, same shape, within `mask`.
    """
    known = np.ones_like(mask) if known is None else known
    x = mask & known
    found = x & ~_dilate(_erode(x, known), known)
    while True:
        x, before = _erode(x, known), x
        # A structure without any outside, such as a full array, never erodes.
        if not x.any() or np.array_equal(x, before):
            return found | x
        found |= x & ~_dilate(_erode(x, known), known)


def cldice_counts(pred: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return float64 (4,): voxels of S(pred) in truth, of S(pred), of S(truth) in pred, of S(truth). They add up.

    Args:
        pred: bool, spatial.
        truth: bool, same shape.
        known: bool; None: all known.
    """
    of_pred, of_truth = skeleton(pred, known), skeleton(truth, known)
    return np.array(
        [
            np.count_nonzero(of_pred & truth),
            np.count_nonzero(of_pred),
            np.count_nonzero(of_truth & pred),
            np.count_nonzero(of_truth),
        ],
        dtype=np.float64,
    )


def cldice(counts: np.ndarray) -> float:
    """Return the harmonic mean of topology precision and sensitivity, Shit et al. 2021.

    0 where one mask is empty and the other not; NaN where both are.
    """
    in_truth, of_pred, in_pred, of_truth = counts
    if not of_pred and not of_truth:
        return math.nan
    if not in_truth or not in_pred:
        return 0.0
    precision, recall = in_truth / of_pred, in_pred / of_truth
    return float(2 * precision * recall / (precision + recall))
