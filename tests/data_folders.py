"""Small data folders in the layout the program reads, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

SHORT = ["--max-epochs", "1", "--steps-per-epoch", "1", "--val-steps", "1", "--workers", "0"]
"""Flags of a training of one step in this process."""


def ball(shape: tuple[int, ...], radius: float = 0.3) -> np.ndarray:
    """A ball (or disc) of 1 in 0, its radius a share of the shortest side."""
    grids = np.meshgrid(*[np.arange(size) - (size - 1) / 2 for size in shape], indexing="ij")
    return (sum(grid**2 for grid in grids) < (radius * min(shape)) ** 2).astype(np.uint8)


def shells(shape: tuple[int, ...], period: float = 8.0) -> np.ndarray:
    """Concentric shells, two of every `period` voxels thick: thin sheets wherever a patch is cut."""
    grids = np.meshgrid(*[np.arange(size) - (size - 1) / 2 for size in shape], indexing="ij")
    return (np.sqrt(sum(grid**2 for grid in grids)) % period < 2.5).astype(np.uint8)


def image_of(label: np.ndarray, seed: int = 0) -> np.ndarray:
    """A noisy uint8 image in which the label is brighter."""
    noise = np.random.default_rng(seed).normal(0, 12, label.shape)
    return np.clip(60 + 120 * (label > 0) + noise, 0, 255).astype(np.uint8)


def write_tiff_folder(
    root: Path,
    labels: dict[str, dict[str, np.ndarray]],
    *,
    images: dict[str, np.ndarray] | None = None,
    masks: dict[str, dict[str, np.ndarray]] | None = None,
) -> Path:
    """Write images/, labels/ and masks/ as TIFF.

    Args:
        root: the folder to make.
        labels: image name -> target -> array.
        images: image name -> array; made from the first label where not given.
        masks: image name -> target -> array.
    """
    for part in ("images", "labels", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for name, targets in labels.items():
        image = (images or {}).get(name)
        if image is None:
            image = image_of(next(iter(targets.values())))
        tifffile.imwrite(root / "images" / f"{name}.tif", image)
        for target, array in targets.items():
            tifffile.imwrite(root / "labels" / f"{name}_{target}.tif", array)
    for name, targets in (masks or {}).items():
        for target, array in targets.items():
            tifffile.imwrite(root / "masks" / f"{name}_{target}.tif", array)
    return root
