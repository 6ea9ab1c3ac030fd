"""Random changes of image intensity, with nnU-Net's published probabilities as defaults.

All are MONAI dictionary transforms of float32 images (C, *spatial), 2D or 3D, and do not change labels.
Strengths are relative to the image's own standard deviation or range, so that they mean the same for [0, 1] images and
z-scores.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from volumen.transforms.kernels import filters
from volumen.transforms.spatial import about_one, thin_axis
from volumen.utils.errors import VolumenError

_SEEDS = 2**32


class RandIntensityd(RandomizableTransform, MapTransform):
    """Base class of the transforms below: with probability `prob` it calls `alter` for every channel.

    Args:
        keys: images to change.
        prob: probability of changing a sample.
        prob_per_channel: probability for each channel of a changed sample.
    """

    def __init__(self, keys: KeysCollection, prob: float, prob_per_channel: float = 1.0) -> None:
        if not 0.0 <= prob <= 1.0:
            raise VolumenError(f"{type(self).__name__} prob", expected="a probability in [0, 1]", found=prob)
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.prob_per_channel = prob_per_channel

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return sample
        for key in self.key_iterator(sample):
            image = np.ascontiguousarray(sample[key], dtype=np.float32)
            out = np.empty_like(image)
            frozen = thin_axis(image.shape[1:], sample.get("spacing") or (1.0,) * (image.ndim - 1))
            for channel in range(len(image)):
                if self.prob_per_channel < 1.0 and self.R.uniform() >= self.prob_per_channel:
                    out[channel] = image[channel]
                else:
                    self.alter(image[channel], out[channel], frozen)
            sample[key] = out
        return sample

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        """Write one changed channel (*spatial) into `out`; axis `frozen` is too coarse to be filtered."""
        raise NotImplementedError


class RandNoised(RandIntensityd):
    """Add Gaussian noise whose standard deviation is a random fraction of the channel's.

    Args:
        sigma_range: smallest and largest fraction.
    """

    def __init__(
        self, keys: KeysCollection = ("image",), prob: float = 0.1, sigma_range: Sequence[float] = (0.0, 0.1)
    ) -> None:
        super().__init__(keys, prob)
        self.sigma_range = _span("sigma_range", sigma_range, 0.0)

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        fraction = self.R.uniform(*self.sigma_range)
        # SFC64 draws float32 normals several times faster than the Mersenne twister behind self.R.
        generator = np.random.Generator(np.random.SFC64(self.R.randint(_SEEDS, dtype=np.uint64)))
        filters.add_noise(image, fraction, generator, out)


class RandBlurd(RandIntensityd):
    """Apply a Gaussian blur, with a random sigma for each axis.

    Args:
        sigma_range: smallest and largest sigma, in voxels.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        prob: float = 0.2,
        sigma_range: Sequence[float] = (0.5, 1.0),
        prob_per_channel: float = 0.5,
    ) -> None:
        super().__init__(keys, prob, prob_per_channel)
        self.sigma_range = _span("sigma_range", sigma_range, 0.0)

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        sigmas = self.R.uniform(*self.sigma_range, size=image.ndim)
        if frozen is not None:
            sigmas[frozen] = 0.0
        filters.gaussian(image, sigmas.tolist(), out)


class RandBrightnessd(RandIntensityd):
    """Multiply by a random factor.

    Args:
        factor_range: smallest and largest factor.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        prob: float = 0.15,
        factor_range: Sequence[float] = (0.75, 1.25),
    ) -> None:
        super().__init__(keys, prob)
        self.factor_range = _span("factor_range", factor_range, 0.0)

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        np.multiply(image, np.float32(about_one(self.R, self.factor_range)), out=out)


class RandContrastd(RandIntensityd):
    """Stretch intensities about their mean, and clip them to their previous range.

    Args:
        factor_range: smallest and largest factor of the stretch.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        prob: float = 0.15,
        factor_range: Sequence[float] = (0.75, 1.25),
    ) -> None:
        super().__init__(keys, prob)
        self.factor_range = _span("factor_range", factor_range, 0.0)

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        filters.contrast(image, about_one(self.R, self.factor_range), out)


class RandLowResolutiond(RandIntensityd):
    """Simulate a lower resolution: take nearest samples and interpolate them back linearly.

    Args:
        zoom_range: range of the lower resolution as a fraction of the original one.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        prob: float = 0.25,
        zoom_range: Sequence[float] = (0.5, 1.0),
        prob_per_channel: float = 0.5,
    ) -> None:
        super().__init__(keys, prob, prob_per_channel)
        self.zoom_range = _span("zoom_range", zoom_range, 0.0)

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        zoom = self.R.uniform(*self.zoom_range)
        zooms = [1.0 if axis == frozen else zoom for axis in range(image.ndim)]
        filters.low_resolution(image, zooms, out)


class RandGammad(RandIntensityd):
    """Raise intensities, scaled to [0, 1], to a random power; range, mean and deviation are preserved.

    Args:
        gamma_range: smallest and largest exponent.
        invert: apply it to the inverted image.
        retain_stats: restore the mean and deviation.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        prob: float = 0.3,
        gamma_range: Sequence[float] = (0.7, 1.5),
        invert: bool = False,
        retain_stats: bool = True,
    ) -> None:
        super().__init__(keys, prob)
        self.gamma_range = _span("gamma_range", gamma_range, 0.0)
        self.invert, self.retain_stats = invert, retain_stats

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        filters.gamma(image, about_one(self.R, self.gamma_range), self.invert, self.retain_stats, out)


def _span(name: str, span: Sequence[float], least: float) -> tuple[float, float]:
    low, high = (float(value) for value in span)
    if not least <= low <= high:
        raise VolumenError(name, expected=f"{least} <= low <= high", found=list(span))
    return low, high
