"""The confidence of estimates, in compiled code."""

from __future__ import annotations

import numpy as np

from volumen.derived.confidence import LEAST, Calibration
from volumen.derived.kernels.completion import estimate_confidence


def confidence(
    calibration: Calibration,
    distance: np.ndarray,
    clearance: np.ndarray,
    sure: np.ndarray,
    usable: np.ndarray,
) -> np.ndarray:
    """Return `Calibration.confidence`, 1 where `sure` and 0 where not `usable`: float32 of their shape.

    Args:
        calibration: of the type.
        distance, clearance: float32 (*spatial), in the smallest voxel size.
        sure, usable: bool (*spatial).
    """
    out = np.empty(distance.shape, np.float32)
    arrays = (distance, clearance, sure, usable, out)
    *fields, target = (one if one.ndim == 3 else one[None] for one in arrays)
    numbers = (calibration.worst / calibration.unit, calibration.decay, calibration.margin, LEAST)
    estimate_confidence(*fields, *map(np.float32, numbers), target)
    return out
