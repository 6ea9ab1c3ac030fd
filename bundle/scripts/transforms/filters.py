"""Compiled single-channel image filters behind the intensity augmentations. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from scripts.transforms.resample import as_box, separable_linear

_TRUNCATE = 3.0  # standard deviations; 99.7 % of a Gaussian's weight
_TINY = np.float32(1e-7)


@njit(cache=True, nogil=True, fastmath=True)
def mean_std(values):
    """Mean and standard deviation (population) of a flat float32 array."""
    total = 0.0
    for value in values:
        total += value
    mean = total / values.size
    spread = 0.0
    for value in values:
        spread += (value - mean) * (value - mean)
    return np.float32(mean), np.float32(np.sqrt(spread / values.size))


@njit(cache=True, nogil=True)
def add_scaled(image, sigma, noise):
    """Turns `noise` into `image + sigma * noise`, all flat float32."""
    for position in range(image.size):
        noise[position] = image[position] + sigma * noise[position]


@njit(cache=True, nogil=True, fastmath=True)
def value_range(values):
    """Smallest and largest value of a flat float32 array."""
    low = high = values[0]
    for value in values:
        low = min(low, value)
        high = max(high, value)
    return low, high


@njit(cache=True, nogil=True)
def contrast(image, factor, out):
    """Stretches a flat float32 image about its mean by `factor`, clipped to its range, into `out`."""
    mean = mean_std(image)[0]
    low, high = value_range(image)
    for position in range(image.size):
        out[position] = min(max((image[position] - mean) * factor + mean, low), high)


def gamma(image: np.ndarray, exponent: float, invert: bool, retain_stats: bool, out: np.ndarray) -> None:
    """Gamma correction of a flat float32 image within its own range, into `out`.

    Args:
        image: (n,) float32.
        exponent: of intensities brought to [0, 1].
        invert: apply it to the negative.
        retain_stats: restore mean and standard deviation.
        out: (n,) float32, overwritten.
    """
    low, high = value_range(image)
    if high - low < _TINY:
        out[...] = image
        return
    sign = np.float32(-1.0 if invert else 1.0)
    base = high if invert else low
    np.subtract(image, base, out=out)
    np.multiply(out, sign / (high - low), out=out)
    np.maximum(out, np.float32(0), out=out)
    np.power(out, exponent, out=out)
    if not retain_stats:
        _linear(out, sign * (high - low), base)
        return
    mean, std = mean_std(image)
    new_mean, new_std = mean_std(out)
    scale = sign * std / max(new_std, _TINY)
    _linear(out, scale, mean - scale * new_mean)


@njit(cache=True, nogil=True, fastmath=True)
def _linear(values, scale, shift):
    for position in range(values.size):
        values[position] = values[position] * scale + shift


def gaussian(image: np.ndarray, sigmas: Sequence[float], out: np.ndarray) -> None:
    """Gaussian blur of a 2D or 3D float32 image into `out`, the border repeated.

    Args:
        image: (*spatial) float32.
        sigmas: voxels per axis; 0 leaves an axis alone.
        out: like `image`, contiguous, overwritten.
    """
    kernels = [_half_kernel(sigma) for sigma in (0.0,) * (3 - image.ndim) + tuple(sigmas)]
    _convolve(as_box(np.ascontiguousarray(image)), *kernels, as_box(out))


def _half_kernel(sigma: float) -> np.ndarray:
    if sigma <= 0:
        return np.ones(1, dtype=np.float32)
    reach = max(1, int(np.ceil(_TRUNCATE * sigma - 0.5)))
    weights = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)
    return (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)


@njit(cache=True, nogil=True, fastmath=True)
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
    """Samples a float32 image at lower resolution (nearest) and back (linear), in one pass, into `out`.

    Args:
        image: (*spatial) float32.
        zooms: per axis, lower resolution as a share of the present one, in (0, 1].
        out: like `image`, contiguous, overwritten.
    """
    taps = [_low_resolution_taps(size, zoom) for size, zoom in zip(image.shape, zooms)]
    alone = (np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32))
    z, y, x = [alone] * (3 - image.ndim) + taps
    separable_linear(as_box(np.ascontiguousarray(image)), *z, *y, *x, as_box(out))


def _low_resolution_taps(size: int, zoom: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    coarse = max(1, round(size * zoom))
    kept = np.minimum(((np.arange(coarse) + 0.5) * size / coarse).astype(np.int64), size - 1)
    at = np.clip((np.arange(size) + 0.5) * coarse / size - 0.5, 0, coarse - 1)
    first = at.astype(np.int64)
    second = np.minimum(first + 1, coarse - 1)
    return kept[first], kept[second], (at - first).astype(np.float32)
