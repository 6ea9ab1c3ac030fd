"""Simulates computed tomography of the abdomen: liver, tumours and kidneys of patients, with several voxel sizes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from volumen.phantom.textures import clouds

TARGET = "organs"
LIVER, TUMOUR, KIDNEY = 1, 2, 3
EXTENT = (120.0, 190.0, 230.0)
"""Millimetres of the scanned part along Z, Y, X."""
SPACINGS = ((3.0, 3.0, 3.0), (5.0, 2.7, 2.7), (2.5, 3.4, 3.4), (4.0, 3.0, 3.0))
"""Voxel sizes in millimetres of the scanners, in turn."""


def write_organs(folder: Path, seed: int, *, patients: int, heldout: int) -> None:
    """Write scans as NIfTI, with labels of liver (1), tumour (2) and kidney (3); `folder/heldout` has further patients.

    Voxel sizes differ from scan to scan, and the second one has its X axis the other way round.

    Args:
        folder: the folder to write.
        seed: seed of all random numbers.
        patients: number of scans for training.
        heldout: number of scans in `folder/heldout`.
    """
    for place, count, first in ((folder, patients, seed), (folder / "heldout", heldout, seed + 1000)):
        for number in range(count):
            spacing = SPACINGS[number % len(SPACINGS)]
            image, label = scan(spacing, first + number)
            name = f"patient{number + 1}"
            flipped = number == 1
            _write_nifti(place / f"images/{name}.nii.gz", image, spacing, flipped)
            _write_nifti(place / f"labels/{name}_{TARGET}.nii.gz", label, spacing, flipped)


def scan(spacing: tuple[float, float, float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a scan in Hounsfield units, int16 (Z, Y, X), and its labels, uint8.

    Axes point up, to the back and to the patient's left in the order of the array, (S, P, L).

    Args:
        spacing: voxel size (Z, Y, X) in millimetres.
        seed: seed of the patient.
    """
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng((seed, 6))
    shape = tuple(round(extent / size) for extent, size in zip(EXTENT, spacing, strict=True))
    # Millimetres up, to the front and to the right of the middle, displaced by a smooth field, so that no organ is an
    # exact ellipsoid.
    grid = [
        sign * ((index + 0.5) * size - size * n / 2)
        for sign, index, size, n in zip((1, -1, -1), np.indices(shape, dtype=np.float32), spacing, shape)
    ]
    bend = [3.5 * _field(grid, generator, period=90) for _ in range(3)]
    z, y, x = (axis + shift for axis, shift in zip(grid, bend, strict=True))
    hounsfield = np.full(shape, -1000.0, np.float32)
    label = np.zeros(shape, np.uint8)

    def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
        parts = ((z, 0), (y, 1), (x, 2))
        return sum(((axis - centre[i]) / radii[i]) ** 2 for axis, i in parts) < 1

    size = generator.uniform(0.9, 1.1)
    hounsfield[ellipsoid((0, 0, 0), (400, 86 * size, 108 * size))] = -95
    hounsfield[ellipsoid((0, 2, 0), (400, 76 * size, 97 * size))] = 48
    inner = ellipsoid((0, 4, 0), (400, 64 * size, 86 * size))
    hounsfield[inner] = -70
    bowel = _field(grid, generator, period=34)
    hounsfield[inner & (bowel > 0.25)] = 25
    hounsfield[inner & (bowel > 1.15)] = -700
    hounsfield[ellipsoid((0, -58 * size, 0), (400, 15, 17))] = 260
    hounsfield[ellipsoid((0, -58 * size, 0), (400, 11, 13))] = 120
    hounsfield[ellipsoid((0, -36 * size, -6), (400, 9, 9))] = 150
    spleen = inner & ellipsoid((20, -22, -66 * size), (34, 26, 16))
    hounsfield[spleen] = 108
    side = generator.uniform(-5, 5, 2)
    kidneys = ellipsoid((-22 + side[0], -34, 46), (34, 17, 15)) | ellipsoid(
        (-12 + side[1], -34, -44), (34, 17, 15)
    )
    kidneys &= inner & ~spleen
    hounsfield[kidneys] = 165
    label[kidneys] = KIDNEY
    lobe = ellipsoid((12, 8, 42), (52, 46 * size, 40 * size)) | ellipsoid((22, 26, 2), (26, 26, 46))
    liver = lobe & inner & ~kidneys
    hounsfield[liver] = generator.uniform(95, 115)
    label[liver] = LIVER
    for _ in range(generator.integers(2, 5)):
        at = np.argwhere(liver)[generator.integers(int(liver.sum()))]
        centre = tuple(float(axis[tuple(at)]) for axis in (z, y, x))
        radius = generator.uniform(10, 17)
        tumour = liver & ellipsoid(centre, (radius, radius * generator.uniform(0.8, 1.2), radius))
        hounsfield[tumour] = generator.uniform(40, 62)
        label[tumour] = TUMOUR
    vessels = liver & (label == LIVER) & (np.abs(_field(grid, generator, period=48)) < 0.06)
    hounsfield[vessels] = 165
    smooth = gaussian_filter(hounsfield, [1.6 / step for step in spacing])
    # Thin voxels catch fewer photons.
    noise = 12 * math.sqrt(27 / math.prod(spacing))
    smooth += gaussian_filter(generator.normal(0, 1.0, shape), 0.5) * noise * 1.6
    smooth += 4 * clouds(shape, generator, cell=12)
    return np.clip(smooth, -1024, 3071).astype(np.int16), label


def _field(grid: list[np.ndarray], generator: np.random.Generator, period: float) -> np.ndarray:
    """Return a smooth random function of the place in millimetres, the same for any voxel size, of about unit size."""
    total = np.zeros(grid[0].shape, np.float32)
    for _ in range(6):
        direction = generator.normal(size=3)
        direction *= 2 * math.pi / period / np.linalg.norm(direction)
        phase = generator.uniform(0, 2 * math.pi)
        wave = phase + sum(float(d) * axis for d, axis in zip(direction, grid, strict=True))
        total += np.sin(wave).astype(np.float32)
    return total / math.sqrt(3)


def _write_nifti(path: Path, array: np.ndarray, spacing: tuple[float, float, float], flipped: bool) -> None:
    """Write an array (S, P, L) with the affine of its axes; flipped, its X axis points to the right instead."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    values = (array[:, :, ::-1] if flipped else array).transpose(2, 1, 0)
    # NIfTI's world is right, anterior, superior; its origin is the middle of the scan.
    steps = np.array([1.0 if flipped else -1.0, -1.0, 1.0]) * spacing[::-1]
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = steps * (1 - np.array(values.shape)) / 2
    picture = nibabel.Nifti1Image(np.ascontiguousarray(values), affine)
    picture.header.set_xyzt_units("mm")
    nibabel.save(picture, path)
