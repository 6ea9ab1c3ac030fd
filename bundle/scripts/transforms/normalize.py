"""Normalises intensities by a clip and a linear map per channel, the same in training and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.utils.errors import VolumenError
from volumen.utils.jit import compiled

SCHEMES = ("unit", "percentile", "zscore", "ct", "none")
_COMPILED = ("uint8", "uint16", "int16", "float32")
_BY_TYPE = ("bool", "uint8")  # the scheme "unit" uses the range of these types
_MIN_RANGE = 1e-8  # avoids division by zero for a constant image


def schemes_of(scheme: str | Sequence[str]) -> tuple[str, ...]:
    """Return the schemes of a setting: one, or one for each channel."""
    return (scheme,) if isinstance(scheme, str) else tuple(scheme)


class Normalizer:
    """Map raw intensities to the network's input values: `(clip(v, low, high) - shift) / width`.

    Schemes:
        unit: [0, 1]: 8-bit unsigned images by their type's range; others by the sampled minimum and maximum,
            or, without properties, by the range of their integer type.
        percentile: [0, 1] between the sampled percentiles 0.5 and 99.5, clipped there.
        zscore: sampled mean 0, standard deviation 1.
        ct: clipped to the percentiles 0.5 and 99.5 of the sampled foreground, then normalised by the foreground's mean
            and standard deviation (nnU-Net's CTNormalization).
        none: the raw values.

    Properties sampled with `per_volume` make unit, percentile and zscore use the statistics of the very volume: there
    `for_volume` gives the normaliser to call. With `every_type`, unit does so for bytes too, and its range is then that
    of the percentiles 0.5 and 99.5, without clipping; properties of earlier versions lack it.

    Args:
        scheme: one of the schemes above, or one for each channel, which then take the statistics of the training set.
        properties: the result of `volumen.transforms.intensity_properties.sample_intensity_properties`.

    Raises:
        VolumenError: the scheme is unknown, or needs properties that were not sampled.
    """

    def __init__(
        self, scheme: str | Sequence[str] = "unit", properties: Mapping[str, Any] | None = None
    ) -> None:
        each = schemes_of(scheme)
        for one in each:
            if one not in SCHEMES:
                raise VolumenError(
                    "dataset_config.normalization_scheme",
                    expected=f"one of {', '.join(SCHEMES)}",
                    found=repr(one),
                )
        sampled = [one for one in each if one in ("percentile", "zscore", "ct")]
        if sampled and not properties:
            raise VolumenError(
                "dataset_config.intensity_properties",
                expected=f"sampled properties for the scheme {sampled[0]!r}",
                found="none",
                remedy="leave normalization to the training command, which samples them, or use 'unit'",
            )
        #: The scheme of all channels, or of each.
        self.scheme: str | tuple[str, ...] = scheme if isinstance(scheme, str) else each
        self.properties = dict(properties) if properties else None
        self._coefficients: dict[np.dtype, np.ndarray] = {}
        self._volumes: dict[str, Normalizer] = {}

    @classmethod
    def from_config(cls, scheme: str | Sequence[str], properties: Mapping[str, Any] | None) -> Normalizer:
        """Return the normaliser of a snapshot's `normalization_scheme` and `intensity_properties`."""
        return cls(scheme, properties)

    def for_volume(self, volume: Any) -> Normalizer:
        """Return the normaliser for images read from `volume`: this one, unless statistics are per volume.

        Args:
            volume: a `Volume`; the statistics sampled from it are cached under its path.
        """
        if not self.goes_by_volume(volume.dtype):
            return self
        if volume.path not in self._volumes:
            from volumen.transforms.intensity_properties import volume_properties

            self._volumes[volume.path] = Normalizer(self.scheme, self._owned(volume_properties(volume)))
        return self._volumes[volume.path]

    def for_array(self, image: np.ndarray) -> Normalizer:
        """Return the normaliser for an image in memory: this one, unless statistics are per volume.

        Args:
            image: (C, *spatial), the whole volume.
        """
        if not self.goes_by_volume(image.dtype):
            return self
        from volumen.data.formats.volumes import ArrayVolume
        from volumen.transforms.intensity_properties import volume_properties

        axes = "c" + "zyx"[-(image.ndim - 1) :]
        return Normalizer(self.scheme, self._owned(volume_properties(ArrayVolume(image, axes=axes))))

    @property
    def every_type(self) -> bool:
        """Whether statistics per volume hold for bytes too, and the scheme unit goes by percentiles."""
        return bool(self.properties and self.properties.get("every_type"))

    def _owned(self, properties: Mapping[str, Any]) -> dict[str, Any]:
        """A volume's own statistics, to be used as these ones are."""
        return {**properties, "every_type": self.every_type}

    def goes_by_volume(self, dtype: np.dtype) -> bool:
        """Whether images of a type are normalised by the statistics of their own volume."""
        name = np.dtype(dtype).name
        if self.scheme in ("ct", "none") or not isinstance(self.scheme, str):
            return False
        if self.scheme == "unit" and (name == "bool" or (name in _BY_TYPE and not self.every_type)):
            return False
        return bool(self.properties and self.properties.get("per_volume"))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Normalise an image (C, *spatial) of any real dtype into a new, contiguous float32 array."""
        return self.apply(image, self.coefficients(image.dtype, len(image)))

    @staticmethod
    def apply(image: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Normalise with given coefficients, which may belong to another dtype, as for an image that was resampled.

        Args:
            image: (C, *spatial), any real dtype.
            coefficients: (C, 4) from `coefficients`.

        Returns:
            float32 (C, *spatial), new and contiguous.
        """
        if image.dtype == np.bool_:
            image = image.view(np.uint8)
        elif image.dtype.name not in _COMPILED or not image.dtype.isnative:
            image = image.astype(np.float32)
        out = np.empty(image.shape, dtype=np.float32)
        for channel, (low, high, shift, width) in enumerate(coefficients):
            flat = np.ascontiguousarray(image[channel]).reshape(-1)
            _clip_and_map(flat, low, high, shift, width, out[channel].reshape(-1))
        return out

    @staticmethod
    def zero_level(coefficients: np.ndarray) -> np.ndarray:
        """Return the raw value per channel (C,) float32 that normalises to zero, from `coefficients`."""
        return coefficients[:, 2]

    def coefficients(self, dtype: np.dtype, channels: int) -> np.ndarray:
        """Return rows (low, high, shift, width) per channel, float32, for images of `dtype`.

        Raises:
            VolumenError: the properties describe another number of channels.
            ValueError: statistics are per volume, and this normaliser does not belong to a volume.
        """
        dtype = np.dtype(dtype)
        if self.goes_by_volume(dtype):
            raise ValueError(
                "intensity statistics are per volume: call for_volume(volume) for the normalizer"
            )
        if not isinstance(self.scheme, str) and len(self.scheme) != channels:
            raise VolumenError(
                "dataset_config.normalization_scheme",
                expected=f"{channels} schemes, one for each channel",
                found=len(self.scheme),
                remedy="list one for each channel, or give one for all",
            )
        if dtype not in self._coefficients or len(self._coefficients[dtype]) != channels:
            rows = [self._row(dtype, channel, channels) for channel in range(channels)]
            self._coefficients[dtype] = np.asarray(rows, dtype=np.float32)
        return self._coefficients[dtype]

    def _row(self, dtype: np.dtype, channel: int, channels: int) -> tuple[float, float, float, float]:
        scheme = self.scheme if isinstance(self.scheme, str) else self.scheme[channel]
        if scheme == "none":
            return -np.inf, np.inf, 0.0, 1.0
        if scheme == "unit":
            low, high = self._unit_range(dtype, channel, channels)
            return -np.inf, np.inf, low, max(high - low, _MIN_RANGE)
        if scheme == "percentile":
            statistics = self._statistics_of("channels", channel, channels)
            low, high = statistics["percentile_00_5"], statistics["percentile_99_5"]
            return low, high, low, max(high - low, _MIN_RANGE)
        if scheme == "zscore":
            statistics = self._statistics_of("channels", channel, channels)
            return -np.inf, np.inf, statistics["mean"], max(statistics["std"], _MIN_RANGE)
        statistics = self._statistics_of("foreground", channel, channels)
        return (
            statistics["percentile_00_5"],
            statistics["percentile_99_5"],
            statistics["mean"],
            max(statistics["std"], _MIN_RANGE),
        )

    def _unit_range(self, dtype: np.dtype, channel: int, channels: int) -> tuple[float, float]:
        if dtype == np.bool_:
            return 0.0, 1.0
        if self.every_type:
            known = self._statistics_of("channels", channel, channels)
            return known["percentile_00_5"], known["percentile_99_5"]
        if dtype.name not in _BY_TYPE and self.properties:
            statistics = self._statistics_of("channels", channel, channels)
            return statistics["min"], statistics["max"]
        if np.issubdtype(dtype, np.integer):
            return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
        raise VolumenError(
            "dataset_config.intensity_properties",
            expected=f"sampled minimum and maximum to bring {dtype} images to [0, 1]",
            found="none",
            remedy="leave normalization to the training command, or use normalization_scheme: none",
        )

    def _statistics_of(self, region: str, channel: int, channels: int) -> Mapping[str, float]:
        assert self.properties is not None
        statistics = self.properties.get(region) or self.properties.get("channels")
        if not statistics:
            raise VolumenError(
                "dataset_config.intensity_properties",
                expected="statistics under channels, as a run's own snapshot holds them",
                found=", ".join(map(str, self.properties)),
                remedy="leave it out: the training samples them",
            )
        if len(statistics) != channels:
            raise VolumenError(
                "dataset_config.intensity_properties",
                expected=f"{channels} channels, as the image has",
                found=len(statistics),
                remedy="sample them again from these images",
            )
        return statistics[channel]


@dataclass(frozen=True)
class NormalizerOfType:
    """Normalises interpolated values as a normaliser does those of the stored type.

    Args:
        normalizer: of the volume.
        dtype: type of the stored values.
    """

    normalizer: Normalizer
    dtype: np.dtype

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Normalise an image (C, *spatial) of any real dtype into a new, contiguous float32 array."""
        return self.normalizer.apply(image, self.normalizer.coefficients(self.dtype, len(image)))


@compiled
def _clip_and_map(source, low, high, shift, width, out):
    for position in range(source.size):
        value = min(max(np.float32(source[position]), low), high)
        out[position] = (value - shift) / width
