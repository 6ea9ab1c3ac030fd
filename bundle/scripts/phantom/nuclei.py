"""Simulates fluorescence microscopy of nuclei: bright ellipsoids that touch, with blur and shot noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumen.phantom.textures import clouds

TARGET = "cells"
PIXEL, SLICE = 0.5, 1.0
"""Size of a pixel, and distance of two slices of a stack, in micrometers."""
RADIUS = 4.2
"""Mean radius of a nucleus in micrometers."""


def write_nuclei(folder: Path, shape: Sequence[int], seed: int, *, images: int, heldout: int) -> None:
    """Write TIFF images of nuclei, and numbered nuclei as labels; `folder/heldout` has further ones for scoring.

    Args:
        folder: the folder to write.
        shape: voxels (Z, Y, X) or pixels (Y, X) of an image.
        seed: seed of all random numbers.
        images: number of images for training.
        heldout: number of images in `folder/heldout`.
    """
    for place, count, first in ((folder, images, seed), (folder / "heldout", heldout, seed + 1000)):
        for number in range(count):
            name = f"field{number + 1}"
            label = nuclei(shape, first + number)
            _write_tiff(place / f"images/{name}.tif", fluorescence(label, first + number))
            _write_tiff(place / f"labels/{name}_{TARGET}.tif", label)


def nuclei(shape: Sequence[int], seed: int) -> np.ndarray:
    """Return numbered ellipsoids that touch but share no voxel, uint16, 0 between them.

    Args:
        shape: voxels (Z, Y, X) or pixels (Y, X).
        seed: seed of all random numbers.
    """
    generator = np.random.default_rng((seed, 4))
    spacing = _spacing(shape)
    places = np.moveaxis(np.indices(tuple(shape), dtype=np.float32), 0, -1) * spacing
    extent = np.array(shape) * spacing
    nearest = np.full(tuple(shape), 1.0, np.float32)
    label = np.zeros(tuple(shape), np.uint16)
    for number, (centre, radii, turn) in enumerate(_ellipsoids(extent, generator), 1):
        reach = max(radii)
        box = tuple(
            slice(max(0, int((at - reach) / size)), int((at + reach) / size) + 2)
            for at, size in zip(centre, spacing, strict=True)
        )
        radius = np.sqrt(np.sum((((places[box] - centre) @ turn) / radii) ** 2, axis=-1))
        mine = radius < nearest[box]
        nearest[box][mine] = radius[mine]
        label[box][mine] = number
    return _whole(label)


def fluorescence(label: np.ndarray, seed: int) -> np.ndarray:
    """Return a simulated fluorescence image, uint16, with nuclei of different brightness, blur and shot noise.

    Args:
        label: numbered nuclei, 0 between them.
        seed: seed of all random numbers.
    """
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng((seed, 5))
    shape, spacing = label.shape, _spacing(label.shape)
    stain = generator.uniform(0.35, 1.0, int(label.max()) + 1).astype(np.float32)
    stain[0] = 0
    chromatin = np.clip(1 + 0.22 * clouds(shape, generator, cell=4), 0.4, 1.6)
    light = stain[label] * chromatin
    # The microscope blurs more along its axis.
    blur = [0.9 if axis == 0 and len(shape) == 3 else 0.45 for axis in range(len(shape))]
    light = gaussian_filter(light, [width / size for width, size in zip(blur, spacing, strict=True)])
    haze = 0.06 + 0.03 * clouds(shape, generator, cell=max(shape) / 3)
    photons = generator.poisson(90 * np.clip(light + haze, 0.01, None))
    return np.clip(100 + 12 * photons + generator.normal(0, 12, shape), 0, 65535).astype(np.uint16)


def _spacing(shape: Sequence[int]) -> np.ndarray:
    return np.array([SLICE, PIXEL, PIXEL][-len(shape) :])


def _ellipsoids(
    extent: np.ndarray, generator: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return centre, radii and orientation of ellipsoids whose centres are at least 0.85 diameters apart."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    ball = np.pi * (4 / 3) ** (len(extent) == 3) * RADIUS ** len(extent)
    most = round(generator.uniform(0.34, 0.5) * np.prod(extent) / ball)
    for _ in range(600):
        # Nuclei lie in clumps, so most are placed beside an earlier one.
        radii = RADIUS * generator.uniform(0.75, 1.25, len(extent))
        centre = generator.uniform(0, extent)
        if found and generator.uniform() < 0.7:
            beside, other, _ = found[generator.integers(len(found))]
            away = generator.normal(size=len(extent))
            centre = beside + away / np.linalg.norm(away) * 0.9 * (radii.mean() + other.mean())
        apart = all(
            np.linalg.norm(centre - at) > 0.85 * (radii.mean() + other.mean()) for at, other, _ in found
        )
        if apart and (centre >= 0).all() and (centre < extent).all():
            turn, _ = np.linalg.qr(generator.normal(size=(len(extent), len(extent))))
            found.append((centre, radii, turn))
        if len(found) == most:
            break
    return found


def _whole(label: np.ndarray) -> np.ndarray:
    """Retain the largest component of every nucleus, without those of a few voxels, numbered 1, 2, ..."""
    import cc3d

    parts = cc3d.connected_components(label, connectivity=6 if label.ndim == 3 else 4)
    sizes = np.bincount(parts.ravel())
    largest: dict[int, int] = {}
    owner = np.zeros(len(sizes), np.int64)
    owner[parts.ravel()] = label.ravel()
    for part in np.argsort(sizes, kind="stable"):
        if owner[part] and sizes[part] >= 12:
            largest[int(owner[part])] = int(part)
    number = np.zeros(len(sizes), np.uint16)
    for new, part in enumerate(sorted(largest.values()), 1):
        number[part] = new
    return number[parts]


def _write_tiff(path: Path, array: np.ndarray) -> None:
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"axes": "ZYX"[-array.ndim :], "PhysicalSizeX": PIXEL, "PhysicalSizeY": PIXEL}
    if array.ndim == 3:
        metadata["PhysicalSizeZ"] = SLICE
    tifffile.imwrite(path, array, ome=True, photometric="minisblack", metadata=metadata, compression="zlib")
