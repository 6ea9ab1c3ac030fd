"""Compiled single-channel image filters for the intensity augmentations, from arrays to arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.transforms.kernels.resample import as_box, blend_separably, linear_taps
from volumen.utils.jit import compiled

_TRUNCATE = 3.0  # standard deviations, which contain 99.7 % of a Gaussian's weight
_TINY = np.float32(1e-7)


def add_noise(image: np.ndarray, fraction: float, generator: np.random.Generator, out: np.ndarray) -> None:
    """Add Gaussian noise whose standard deviation is `fraction` of the image's own.

    Args:
        image: (*spatial) float32.
        fraction: fraction of the image's standard deviation.
        generator: source of the noise.
        out: same shape and type as `image`, contiguous, overwritten.
    """
    sigma = fraction * _mean_std(image, out)[1]
    generator.standard_normal(dtype=np.float32, out=out)
    np.multiply(out, np.float32(sigma), out=out)
    np.add(out, image, out=out)


def contrast(image: np.ndarray, factor: float, out: np.ndarray) -> None:
    """Stretch a float32 image about its mean by `factor`, clipped to its range, into `out`."""
    mean, low, high = image.mean(), image.min(), image.max()
    _stretch(image.reshape(-1), np.float32(factor), mean, low, high, out.reshape(-1))


@compiled
def _stretch(image, factor, mean, low, high, out):
    for position in range(image.size):
        out[position] = min(max((image[position] - mean) * factor + mean, low), high)


def gamma(image: np.ndarray, exponent: float, invert: bool, retain_stats: bool, out: np.ndarray) -> None:
    """Apply a gamma correction to a float32 image within its own range, into `out`.

    Args:
        image: (*spatial) float32.
        exponent: applied to intensities scaled to [0, 1].
        invert: apply it to the inverted image.
        retain_stats: restore mean and standard deviation, which may exceed the previous range.
        out: same shape and type as `image`, contiguous, overwritten.
    """
    low, high = image.min(), image.max()
    if high - low < _TINY:
        out[...] = image
        return
    mean, std = _mean_std(image, out) if retain_stats else (0.0, 0.0)
    scale = (low - high) if invert else (high - low)
    base = high if invert else low
    np.subtract(image, base, out=out)
    np.divide(out, scale, out=out)
    np.power(out, np.float32(exponent), out=out)
    if retain_stats:
        new_mean = out.mean()
        new_std = np.sqrt(_mean_square(out - new_mean))
        scale = np.copysign(np.float32(std / max(new_std, _TINY)), scale)
        base = np.float32(mean) - scale * new_mean
    np.multiply(out, scale, out=out)
    np.add(out, base, out=out)


def _mean_std(image: np.ndarray, scratch: np.ndarray) -> tuple[float, float]:
    # NumPy's pairwise sums vectorise and, unlike BLAS, do not depend on the number of threads.
    mean = image.mean()
    np.subtract(image, mean, out=scratch)
    return float(mean), float(np.sqrt(_mean_square(scratch)))


def _mean_square(values: np.ndarray) -> float:
    np.square(values, out=values)
    return float(values.mean())


def gaussian(image: np.ndarray, sigmas: Sequence[float], out: np.ndarray) -> None:
    """Apply a Gaussian blur to a 2D or 3D float32 image, into `out`; values at the border are repeated.

    Args:
        image: (*spatial) float32.
        sigmas: voxels per axis; 0 leaves an axis unchanged.
        out: same shape and type as `image`, contiguous, overwritten.
    """
    kernels = [half_kernel(sigma) for sigma in (0.0,) * (3 - image.ndim) + tuple(sigmas)]
    _convolve(as_box(np.ascontiguousarray(image)), *kernels, as_box(out))


def half_kernel(sigma: float) -> np.ndarray:
    """Return the weights float32 of a Gaussian from its centre outwards, in voxels; a single 1 for a sigma of 0."""
    if sigma <= 0:
        return np.ones(1, dtype=np.float32)
    reach = max(1, int(np.ceil(_TRUNCATE * sigma - 0.5)))
    weights = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)
    return (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)


@compiled
def _convolve(source, kernel_z, kernel_y, kernel_x, out):
    size_z, size_y, size_x = source.shape
    reach = kernel_x.size - 1
    plane = np.empty((size_y, size_x), dtype=np.float32)
    row = np.empty(size_x + 2 * reach, dtype=np.float32)
    for z in range(size_z):
        for y in range(size_y):
            for x in range(size_x):
                plane[y, x] = kernel_z[0] * source[z, y, x]
        for step in range(1, kernel_z.size):
            before, after, weight = max(z - step, 0), min(z + step, size_z - 1), kernel_z[step]
            for y in range(size_y):
                for x in range(size_x):
                    plane[y, x] += weight * (source[before, y, x] + source[after, y, x])
        for y in range(size_y):
            for x in range(size_x):
                row[reach + x] = kernel_y[0] * plane[y, x]
            for step in range(1, kernel_y.size):
                before, after, weight = max(y - step, 0), min(y + step, size_y - 1), kernel_y[step]
                for x in range(size_x):
                    row[reach + x] += weight * (plane[before, x] + plane[after, x])
            for x in range(reach):
                row[x] = row[reach]
                row[reach + size_x + x] = row[reach + size_x - 1]
            for x in range(size_x):
                out[z, y, x] = kernel_x[0] * row[reach + x]
            for step in range(1, kernel_x.size):
                weight = kernel_x[step]
                for x in range(size_x):
                    out[z, y, x] += weight * (row[reach + x - step] + row[reach + x + step])


def low_resolution(image: np.ndarray, zooms: Sequence[float], out: np.ndarray) -> None:
    """Sample a float32 image at lower resolution (nearest) and back (linear), in one pass, into `out`.

    Args:
        image: (*spatial) float32.
        zooms: per axis, lower resolution as a fraction of the original one, in (0, 1].
        out: same shape and type as `image`, contiguous, overwritten.
    """
    taps = [low_resolution_taps(size, zoom) for size, zoom in zip(image.shape, zooms)]
    z, y, x = [linear_taps(np.zeros(1), 1)] * (3 - image.ndim) + taps
    blend_separably(as_box(np.ascontiguousarray(image)), *z, *y, *x, np.float32(0), as_box(out))


def low_resolution_taps(size: int, zoom: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, like `linear_taps`, where each voxel of an axis comes from that is sampled at a lower resolution."""
    coarse = max(1, round(size * zoom))
    nearest = np.minimum(((np.arange(coarse) + 0.5) * size / coarse).astype(np.int64), size - 1)
    positions = np.clip((np.arange(size) + 0.5) * coarse / size - 0.5, 0, coarse - 1)
    first, second, weight = linear_taps(positions, coarse)
    return nearest[first], nearest[second], weight
