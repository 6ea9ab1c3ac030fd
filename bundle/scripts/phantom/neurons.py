"""Simulates electron microscopy of nerve tissue: neurites that fill space, with dark membranes and organelles.

Every neurite is a smooth random curve, and a voxel belongs to the neurite of the nearest curve, at a place that a
smooth random field displaces. So the membranes are curved and the neurites branch, touch and become thin.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from volumen.phantom.textures import clouds, grain

IMAGE, TARGET = "tissue", "neurons"
SPACING, UNIT = 8.0, "nanometer"
DIAMETER = 18.0
"""Mean diameter of a neurite in voxels."""
SMALLEST = 200
"""Pieces of fewer voxels become part of what surrounds them."""


def write_neurons(folder: Path, shape: tuple[int, int, int], seed: int) -> None:
    """Write a block of tissue in `folder` and another one in `folder/heldout`, as OME-Zarr with numbered neurites.

    Args:
        folder: the folder to write.
        shape: voxels (Z, Y, X) of each block.
        seed: seed of all random numbers.
    """
    from volumen.phantom.volume import write_ome_zarr

    for place, number in ((folder, seed), (folder / "heldout", seed + 1000)):
        label = neurites(shape, number)
        write_ome_zarr(place / f"images/{IMAGE}.zarr", micrograph(label, number), SPACING, UNIT)
        write_ome_zarr(place / f"labels/{IMAGE}_{TARGET}.zarr", label, SPACING, UNIT)


def neurites(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Return the number of the neurite of every voxel, uint32 (Z, Y, X), 1, 2, ...: each is one component."""
    from scipy.spatial import cKDTree

    generator = np.random.default_rng((seed, 2))
    curves = _curves(shape, generator)
    tree = cKDTree(np.concatenate(curves))
    owner = np.repeat(np.arange(len(curves)), [len(curve) for curve in curves])
    places = np.indices(shape, dtype=np.float32)
    places += np.stack([2.2 * clouds(shape, generator, cell=11) for _ in range(3)])
    _, nearest = tree.query(places.reshape(3, -1).T, workers=1)
    return _connected(owner[nearest].reshape(shape))


def micrograph(label: np.ndarray, seed: int) -> np.ndarray:
    """Return a simulated micrograph, uint8 (Z, Y, X): dark membranes, mitochondria, vesicles, uneven brightness.

    The contrast of the membranes varies and nearly disappears in places, where neurites seem to merge.

    Args:
        label: number of the neurite of every voxel.
        seed: seed of all random numbers.
    """
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    generator = np.random.default_rng((seed, 3))
    shape = label.shape
    depth = distance_transform_edt(~_walls(label)).astype(np.float32)
    tone = generator.normal(0, 0.035, int(label.max()) + 1).astype(np.float32)[label]
    image = 0.68 + tone + 0.02 * clouds(shape, generator, cell=4)
    vesicles = clouds(shape, generator, cell=3) - 0.9 * clouds(shape, generator, cell=30)
    image -= 0.16 * (np.clip(vesicles - 1.9, 0, 1) * (depth > 2.5))
    for dark, places in _mitochondria(depth, generator):
        image[places] = dark
    contrast = np.clip(1.15 + 0.33 * clouds(shape, generator, cell=24), 0.3, 1.2)
    image -= 0.42 * contrast * np.exp(-((depth / 1.3) ** 2))
    image = gaussian_filter(image, 0.5)
    image *= 1 + 0.05 * clouds(shape, generator, cell=max(shape) / 2)
    image += 0.045 * grain(shape, generator)
    return np.clip(255 * image, 0, 255).astype(np.uint8)


def _curves(shape: tuple[int, int, int], generator: np.random.Generator) -> list[np.ndarray]:
    """Return points (n, 3), about one voxel apart, of random curves that fill a volume and its surroundings."""
    curves = []
    margin = DIAMETER
    extent = np.array(shape, float) + 2 * margin
    length = float(np.linalg.norm(extent))
    # Curves mostly run along Z, some across; each fills a tube of the mean diameter.
    count = round(1.1 * extent[1] * extent[2] / (math.pi / 4 * DIAMETER**2))
    for number in range(count):
        heading = np.array([1.0, 0.0, 0.0]) if number % 4 else generator.normal(size=3)
        heading = heading + 0.25 * generator.normal(size=3)
        heading /= np.linalg.norm(heading)
        steps = np.arange(-length / 2, length / 2, 1.0)
        start = generator.uniform(-margin, np.array(shape) + margin)
        bends = np.stack([_wave(steps, generator) for _ in range(3)], axis=1)
        points = start + steps[:, None] * heading + bends
        inside = ((points > -margin) & (points < np.array(shape) + margin)).all(axis=1)
        if inside.any():
            curves.append(points[inside])
    return curves


def _wave(steps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    waves = [
        amplitude * np.sin(2 * math.pi * (steps / period + generator.uniform()))
        for amplitude, period in ((6, 140), (3.5, 60), (1.2, 24))
    ]
    return np.sum(waves, axis=0)


def _connected(owner: np.ndarray) -> np.ndarray:
    """Number connected components, and give small ones to the nearest larger one."""
    import cc3d
    from scipy.ndimage import distance_transform_edt

    parts = cc3d.connected_components(owner + 1, connectivity=6)
    small = np.bincount(parts.ravel()) < SMALLEST
    absorbed = small[parts]
    if absorbed.any():
        nearest = distance_transform_edt(absorbed, return_distances=False, return_indices=True)
        parts = parts[tuple(nearest)]
    # A piece may have been given away in two parts, so they are numbered once more.
    return cc3d.connected_components(parts, connectivity=6).astype(np.uint32)


def _walls(label: np.ndarray) -> np.ndarray:
    """Return the voxels that have a face in common with another neurite."""
    walls = np.zeros(label.shape, bool)
    for axis in range(label.ndim):
        a = tuple(slice(1, None) if other == axis else slice(None) for other in range(label.ndim))
        b = tuple(slice(None, -1) if other == axis else slice(None) for other in range(label.ndim))
        differs = label[a] != label[b]
        walls[a] |= differs
        walls[b] |= differs
    return walls


def _mitochondria(
    depth: np.ndarray, generator: np.random.Generator
) -> list[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """Return grey values and voxels of dark ellipsoids in the widest parts of neurites."""
    wide = np.argwhere(depth > 5.5)
    if not len(wide):
        return []
    count = max(1, round(depth.size / 60_000))
    grid = np.moveaxis(np.indices(depth.shape, dtype=np.float32), 0, -1)
    found = []
    for centre in wide[generator.integers(0, len(wide), count)]:
        radii = generator.uniform((6, 3.2, 3.2), (14, 4.6, 4.6))
        box = tuple(
            slice(max(0, int(at - 15)), min(n, int(at + 16)))
            for at, n in zip(centre, depth.shape, strict=True)
        )
        offset = grid[box] - centre
        radius = np.sqrt(np.sum((offset / radii) ** 2, axis=-1))
        inside = (radius < 1) & (depth[box] > 1.5)
        places = tuple(index + part.start for index, part in zip(np.nonzero(inside), box, strict=True))
        cristae = 0.06 * np.sin(1.6 * offset[..., 2] + 0.8 * offset[..., 0])[inside]
        found.append(((0.42 + cristae - 0.12 * (radius[inside] > 0.75)).astype(np.float32), places))
    return found
