"""Where windows lie, how they are weighted, and what a window holds beyond the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from volumen.data.space.reflection import reflect


@dataclass(frozen=True)
class WindowRules:
    """How windows are laid over an image; networks of other programs need the rules that they were made for.

    Args:
        spread: whether windows are spread evenly over an axis; else they lie a fixed stride apart, and the last one is
            shifted inward.
        later_centre: whether the weights of a window of even length are highest at the voxel after its middle; else
            they are symmetric.
        zero_beyond: whether a window is 0 beyond the image, after normalisation; else the image is reflected.
        shrinks: whether windows become smaller for smaller images.
    """

    spread: bool = False
    later_centre: bool = False
    zero_beyond: bool = False
    shrinks: bool = True

    def pad(self, values: np.ndarray, starts: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Return a box of an image (C, *space) that may reach beyond its borders; see `reflect`."""
        if not self.zero_beyond:
            return reflect(values, starts, shape)
        result = np.zeros((len(values), *shape), values.dtype)
        inside = [
            slice(max(start, 0), min(start + count, size))
            for start, count, size in zip(starts, shape, values.shape[1:], strict=True)
        ]
        local = [slice(part.start - start, part.stop - start) for part, start in zip(inside, starts)]
        result[(slice(None), *local)] = values[(slice(None), *inside)]
        return result


OURS = WindowRules()
NNUNET = WindowRules(spread=True, later_centre=True, zero_beyond=True, shrinks=False)


def spread_starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    """Return starts of windows as nnU-Net spreads them (`compute_steps_for_sliding_window`).

    They are at most `patch * (1 - overlap)` voxels apart, and equally far up to rounding.

    Args:
        size: length of the axis in voxels, at least `patch`.
        patch: length of a window.
        overlap: share of a window that the next one covers, in [0, 1).
    """
    most = max(1.0, patch * (1 - overlap))
    count = math.ceil((size - patch) / most) + 1
    step = (size - patch) / max(1, count - 1)
    return tuple(round(step * number) for number in range(count))
