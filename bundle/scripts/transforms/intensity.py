"""Random changes of image intensity, with nnU-Net's published probabilities as defaults.

All are MONAI dictionary transforms of float32 images (C, *spatial), 2D or 3D, and do not change labels.
Strengths are relative to the image's own standard deviation or range, so that they mean the same for [0, 1] images and
z-scores.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from volumen.transforms.deferred import Change, RawPatch, Stage
from volumen.transforms.kernels import filters
from volumen.transforms.spatial import about_one, thin_axis
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import DEFERRED

_SEEDS = 2**32


class RandIntensityd(RandomizableTransform, MapTransform):
    """Base class of the transforms below: with probability `prob` it calls `alter` for every channel.

    If the sample's patch is augmented on the training device, it only records in the patch what it draws.

    Args:
        keys: images to change.
        prob: probability of changing a sample.
        prob_per_channel: probability for each channel of a changed sample.
    """

    kind: ClassVar[str] = ""
    """Name of the same change in `volumen.transforms.device.intensity`."""

    def __init__(self, keys: KeysCollection, prob: float, prob_per_channel: float = 1.0) -> None:
        if not 0.0 <= prob <= 1.0:
            raise VolumenError(f"{type(self).__name__} prob", expected="a probability in [0, 1]", found=prob)
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.prob_per_channel = prob_per_channel

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        self.randomize(None)
        if DEFERRED in sample:
            sample[DEFERRED].stages.append(self._stage(sample[DEFERRED]))
            return sample
        if not self._do_transform:
            return sample
        for key in self.key_iterator(sample):
            image = np.ascontiguousarray(sample[key], dtype=np.float32)
            out = np.empty_like(image)
            frozen = thin_axis(image.shape[1:], sample.get("spacing") or (1.0,) * (image.ndim - 1))
            for channel in range(len(image)):
                if self._spares_channel():
                    out[channel] = image[channel]
                else:
                    self.alter(image[channel], out[channel], frozen)
            sample[key] = out
        return sample

    def alter(self, image: np.ndarray, out: np.ndarray, frozen: int | None) -> None:
        """Write one changed channel (*spatial) into `out`; axis `frozen` is too coarse to be filtered."""
        self.apply(image, self.draw(image.ndim, frozen), out)

    def draw(self, ndim: int, frozen: int | None) -> tuple[float, ...]:
        """Draw the numbers for one channel with `ndim` axes, of which `frozen` is too coarse to be filtered."""
        raise NotImplementedError

    def apply(self, image: np.ndarray, values: tuple[float, ...], out: np.ndarray) -> None:
        """Write a channel (*spatial) changed by the numbers of `draw` into `out`."""
        raise NotImplementedError

    def settings(self) -> tuple[Any, ...]:
        """Return the settings that the change needs beside the numbers drawn."""
        return ()

    def noise(self, values: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray | None:
        """Return the standard normal numbers float32 (*shape) that belong to the numbers of `draw`, or None."""
        return None

    def _spares_channel(self) -> bool:
        return self.prob_per_channel < 1.0 and self.R.uniform() >= self.prob_per_channel

    def _stage(self, patch: RawPatch) -> Stage:
        shape, changes = patch.image_shape, []
        frozen = thin_axis(shape, patch.spacing)
        for channel in range(patch.channels if self._do_transform else 0):
            if not self._spares_channel():
                values = self.draw(len(shape), frozen)
                noise = self.noise(values, shape)
                changes.append(Change(channel, values, None if noise is None else torch.from_numpy(noise)))
        return Stage(self.kind, self.settings(), tuple(changes))


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

    kind = "noise"

    def draw(self, ndim: int, frozen: int | None) -> tuple[float, ...]:
        """Draw the fraction, and the seed of the noise."""
        return self.R.uniform(*self.sigma_range), int(self.R.randint(_SEEDS, dtype=np.uint64))

    def apply(self, image: np.ndarray, values: tuple[float, ...], out: np.ndarray) -> None:
        """Add the noise."""
        filters.add_noise(image, values[0], _generator(values[1]), out)

    def noise(self, values: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Draw the noise in the worker: no device draws the same numbers."""
        return _generator(values[1]).standard_normal(shape, dtype=np.float32)


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

    kind = "blur"

    def draw(self, ndim: int, frozen: int | None) -> tuple[float, ...]:
        """Draw a sigma per axis."""
        sigmas = self.R.uniform(*self.sigma_range, size=ndim)
        if frozen is not None:
            sigmas[frozen] = 0.0
        return tuple(sigmas.tolist())

    def apply(self, image: np.ndarray, values: tuple[float, ...], out: np.ndarray) -> None:
        """Blur."""
        filters.gaussian(image, values, out)


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

    kind = "brightness"

    def draw(self, ndim: int, frozen: int | None) -> tuple[float, ...]:
        """Draw the factor."""
        return (about_one(self.R, self.factor_range),)

    def apply(self, image: np.ndarray, values: tuple[float, ...], out: np.ndarray) -> None:
        """Multiply."""
        np.multiply(image, np.float32(values[0]), out=out)


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

    kind = "contrast"

    def draw(self, ndim: int, frozen: int | None) -> tuple[float, ...]:
        """Draw the factor."""
        return (about_one(self.R, self.factor_range),)

    def apply(self, image: np.ndarray, values: tuple[float, ...], out: np.ndarray) -> None:
        """Stretch."""
        filters.contrast(image, values[0], out)


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

    kind = "low_resolution"

    def draw(self, ndim: int, frozen: int | None) -> tuple[float, ...]:
        """Draw the lower resolution, the same for all axes that are filtered."""
        zoom = self.R.uniform(*self.zoom_range)
        return tuple(1.0 if axis == frozen else zoom for axis in range(ndim))

    def apply(self, image: np.ndarray, values: tuple[float, ...], out: np.ndarray) -> None:
        """Sample, and interpolate back."""
        filters.low_resolution(image, values, out)


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

    kind = "gamma"

    def draw(self, ndim: int, frozen: int | None) -> tuple[float, ...]:
        """Draw the exponent."""
        return (about_one(self.R, self.gamma_range),)

    def apply(self, image: np.ndarray, values: tuple[float, ...], out: np.ndarray) -> None:
        """Apply the exponent."""
        filters.gamma(image, values[0], self.invert, self.retain_stats, out)

    def settings(self) -> tuple[Any, ...]:
        """Return `invert` and `retain_stats`."""
        return self.invert, self.retain_stats


def _generator(seed: float) -> np.random.Generator:
    # SFC64 draws float32 normals several times faster than the Mersenne twister behind a transform's own generator.
    return np.random.Generator(np.random.SFC64(int(seed)))


def _span(name: str, span: Sequence[float], least: float) -> tuple[float, float]:
    low, high = (float(value) for value in span)
    if not least <= low <= high:
        raise VolumenError(name, expected=f"{least} <= low <= high", found=list(span))
    return low, high
