"""Writes a phantom data set: a rolled thin sheet in a simulated noisy scan, whose geometry is known exactly."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.phantom.textures import clouds, grain
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import by

logger = logging.getLogger(__name__)

IMAGE, TARGET = "scroll", "surface"
SMALLEST = 48
SLAB, SLAB_PERIOD = 0.35, 0.5
SLICES, SLICE_PERIOD = 5, 16
CHUNK = 64
PARTS = ("images", "labels", "masks", "truth", "heldout")
"""What a phantom has in its folder."""


def write_phantom(
    folder: str | Path,
    shape: Sequence[int] = (192, 192, 192),
    seed: int = 0,
    *,
    heldout_shape: Sequence[int] | None = None,
    spacing: float = 1.0,
    unit: str = "micrometer",
    noise: float = 0.10,
    labelled: str = "slabs",
) -> Path:
    """Write a phantom as OME-Zarr 0.5 in the layout that training reads.

    `images/scroll.zarr` (uint8), `labels/scroll_surface.zarr` (1: sheet) and `masks/scroll_surface.zarr` (1:
    labelled; only some slabs along z). `truth/` holds the exact values for every voxel:
    `scroll_surface` (the full labels), `scroll_distance` (float32, signed, physical units, cut at 12 voxels),
    `scroll_normals` (float32, channels x, y, z) and `scroll_valid` (where these two are exact). `heldout/` is
    another roll in the same layout, labelled everywhere, with its own `truth/`; it serves for scoring.

    Args:
        folder: the folder to write; it is created if it does not exist.
        shape: voxels (Z, Y, X), at least 48 each.
        seed: seed of all random numbers.
        heldout_shape: of the held-out roll; None: half of `shape`, but at least 96 voxels or `shape`'s.
        spacing: size of a voxel.
        unit: unit of the spacing.
        noise: standard deviation of the noise; the sheet is 0.34 brighter than air.
        labelled: "slabs", "slices" (5 of every 16 slices) or "all".

    Returns:
        The folder.

    Raises:
        VolumenError: if the folder already holds a data set, or the shape is too small.
    """
    folder, size = Path(folder), _checked_shape(shape)
    if labelled not in MASKS:
        raise ValueError(f"labelled must be one of {', '.join(MASKS)}, got {labelled!r}")
    check_new(folder)
    if heldout_shape is None:
        heldout_shape = tuple(max(min(voxels, 96), voxels // 2) for voxels in size)
    heldout = _checked_shape(heldout_shape)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_roll(folder, size, seed, (spacing, unit), noise, labelled)
        _write_roll(folder / "heldout", heldout, seed + 1000, (spacing, unit), noise, "all")
    except BaseException:
        for name in PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
        raise
    return folder


def labelled_slabs(shape: Sequence[int]) -> np.ndarray:
    """Return the uint8 mask (Z, Y, X) of the labelled voxels: two slabs, each a quarter of the depth."""
    mask = np.zeros(tuple(shape), np.uint8)
    depth = shape[0]
    for start in (0.125, 0.125 + SLAB_PERIOD):
        mask[round(start * depth) : round((start + SLAB) * depth)] = 1
    return mask


def labelled_slices(shape: Sequence[int]) -> np.ndarray:
    """Return the uint8 mask (Z, Y, X) of the labelled voxels: 5 of every 16 slices, the first gap half as wide."""
    mask = np.zeros(tuple(shape), np.uint8)
    for start in range((SLICE_PERIOD - SLICES) // 2, shape[0], SLICE_PERIOD):
        mask[start : start + SLICES] = 1
    return mask


def _labelled_everywhere(shape: Sequence[int]) -> np.ndarray:
    return np.ones(tuple(shape), np.uint8)


MASKS = {"slabs": labelled_slabs, "slices": labelled_slices, "all": _labelled_everywhere}
"""What is labelled of a roll."""


def check_new(folder: Path) -> None:
    """Refuse a folder with a data set.

    Raises:
        VolumenError: the folder has an entry that a phantom would write.
    """
    if any((folder / name).exists() for name in PARTS):
        raise VolumenError(folder, "already holds a data set", remedy="choose another folder or remove it")


def scan(distance: np.ndarray, along: np.ndarray, seed: int, noise: float = 0.10) -> np.ndarray:
    """Return a simulated scan of a sheet as uint8 (Z, Y, X).

    The sheet is brighter than air, soft at its border, thin in places until it nearly disappears, and
    striped by fibres along its length; the whole image has uneven brightness and grainy noise.

    Args:
        distance: signed distance to the sheet's boundary in voxels, negative inside.
        along: length along the sheet.
        seed: seed of all random numbers.
        noise: see `write_phantom`.
    """
    generator = np.random.default_rng((seed, 1))
    shape = distance.shape
    height = np.arange(shape[0], dtype=np.float32)[:, None, None]
    # The profile of a thin sheet after a scanner's blur of about 0.7 voxels.
    image = 1 / (1 + np.exp(np.clip(distance, -8, 8) / 0.45))
    worn = np.clip(1.35 + 0.55 * clouds(shape, generator, cell=28), 0.25, 1)
    fibres = 1 + 0.10 * np.sin(along * 0.9 + 0.3 * height) + 0.08 * np.sin(height * 0.8 + along * 0.05)
    image *= (worn * fibres).astype(np.float32)
    dust = np.clip(clouds(shape, generator, cell=9) - 1.6, 0, 1)
    image = 0.30 + 0.34 * image + 0.25 * dust
    image *= 1 + 0.18 * clouds(shape, generator, cell=max(shape) / 2)
    image += noise * grain(shape, generator)
    return np.clip(255 * image, 0, 255).astype(np.uint8)


def _write_roll(
    folder: Path,
    shape: tuple[int, int, int],
    seed: int,
    scale: tuple[float, str],
    noise: float,
    labelled: str,
) -> None:
    from volumen.phantom.geometry import Roll, sheet_geometry

    geometry = sheet_geometry(Roll.draw(shape, seed), shape)
    label = (geometry.distance <= 0).astype(np.uint8)
    mask = MASKS[labelled](shape)
    image = scan(geometry.distance, geometry.along, seed, noise)
    named = f"{IMAGE}_{TARGET}.zarr"
    arrays = {
        f"images/{IMAGE}.zarr": image,
        f"labels/{named}": label * mask,
        f"masks/{named}": mask,
        f"truth/{named}": label,
        f"truth/{IMAGE}_distance.zarr": geometry.distance * np.float32(scale[0]),
        f"truth/{IMAGE}_normals.zarr": geometry.normals,
        f"truth/{IMAGE}_valid.zarr": geometry.valid.astype(np.uint8),
    }
    for name, array in arrays.items():
        write_ome_zarr(folder / name, array, *scale)
        logger.debug("wrote %s: %s %s", folder / name, by(array.shape), array.dtype)


def write_ome_zarr(path: Path, array: np.ndarray, spacing: float = 1.0, unit: str = "micrometer") -> None:
    """Write one array as an OME-Zarr 0.5 image of one level.

    Args:
        path: folder to write, which must not exist.
        array: (Z, Y, X) or (C, Z, Y, X).
        spacing: size of a voxel, the same along all axes.
        unit: unit of the spacing.
    """
    import zarr

    channels = array.ndim - 3
    axes: list[Any] = [{"name": "c", "type": "channel"}] * channels
    axes += [{"name": name, "type": "space", "unit": unit} for name in "zyx"]
    scale = [1.0] * channels + [float(spacing)] * 3
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    multiscale: dict[str, Any] = {"name": path.stem, "axes": axes, "datasets": [level]}
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]}
    chunks = (1,) * channels + tuple(min(CHUNK, voxels) for voxels in array.shape[channels:])
    group.create_array("0", data=array, chunks=chunks, dimension_names=["c"] * channels + list("zyx"))


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < SMALLEST:
        raise VolumenError("shape", expected=f"three axes of at least {SMALLEST} voxels", found=tuple(shape))
    return int(shape[0]), int(shape[1]), int(shape[2])
