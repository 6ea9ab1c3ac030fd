"""Random textures of simulated images: smooth clouds and correlated noise."""

from __future__ import annotations

import numpy as np


def clouds(shape: tuple[int, ...], generator: np.random.Generator, cell: float) -> np.ndarray:
    """Return smooth noise of about unit variance whose details are `cell` voxels large."""
    from scipy.ndimage import zoom

    coarse = generator.standard_normal([max(2, round(voxels / cell) + 1) for voxels in shape])
    factors = [voxels / cells for voxels, cells in zip(shape, coarse.shape)]
    # Linear interpolation lowers the variance; 1.5 restores it on average.
    return 1.5 * zoom(coarse.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest")


def grain(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return noise of unit variance, correlated between neighbours like the noise of a reconstruction."""
    from scipy.ndimage import gaussian_filter

    white = generator.standard_normal(shape, dtype=np.float32)
    correlated = gaussian_filter(white, 0.6)
    return correlated / correlated.std()
