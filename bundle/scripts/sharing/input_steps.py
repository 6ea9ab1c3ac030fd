"""Describes the normalisation of a trained network as simple steps that other programs implement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.transforms.normalize import Normalizer
from volumen.utils.errors import VolumenError


@dataclass(frozen=True)
class InputSteps:
    """Steps from raw to normalised values, in this order; a step without effect is omitted.

    Args:
        dtype: type of the raw images.
        percentiles: scale the range between these percentiles of each image to [0, 1], per channel.
        standardize: subtract each image's mean and divide by its standard deviation, per channel.
        first: factor and summand per channel.
        clip: whether to clip values to [0, 1] then.
        second: factor and summand per channel, after clipping.
    """

    dtype: np.dtype
    percentiles: tuple[float, float] | None = None
    standardize: bool = False
    first: tuple[tuple[float, float], ...] = ()
    clip: bool = False
    second: tuple[tuple[float, float], ...] = ()

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Return raw images (B, C, *space) normalised, float32."""
        values = raw.astype(np.float32)
        space = tuple(range(2, raw.ndim))
        if self.percentiles is not None:
            low, high = np.percentile(values, self.percentiles, axis=space, keepdims=True).astype(np.float32)
            values = (values - low) / (high - low + 1e-6)
        if self.standardize:
            values = (values - values.mean(space, keepdims=True)) / (values.std(space, keepdims=True) + 1e-6)
        values = _linear(values, self.first)
        if self.clip:
            values = np.clip(values, 0, 1)
        return np.ascontiguousarray(_linear(values, self.second), dtype=np.float32)

    def described(self, v0_5: Any, axes: str) -> list[Any]:
        """Return the steps in the description format of the BioImage Model Zoo.

        Args:
            v0_5: the module `bioimageio.spec.model.v0_5`.
            axes: letters of the spatial axes.
        """
        cast = v0_5.EnsureDtypeDescr(kwargs=v0_5.EnsureDtypeKwargs(dtype="float32"))
        found: list[Any] = [cast]
        if self.percentiles is not None:
            low, high = self.percentiles
            found.append(
                v0_5.ScaleRangeDescr(
                    kwargs=v0_5.ScaleRangeKwargs(axes=list(axes), min_percentile=low, max_percentile=high)
                )
            )
        if self.standardize:
            found.append(
                v0_5.ZeroMeanUnitVarianceDescr(kwargs=v0_5.ZeroMeanUnitVarianceKwargs(axes=list(axes)))
            )
        found += _described_linear(v0_5, self.first)
        if self.clip:
            found.append(v0_5.ClipDescr(kwargs=v0_5.ClipKwargs(min=0.0, max=1.0)))
        return [*found, *_described_linear(v0_5, self.second), cast]


def input_steps(normalizer: Normalizer, dtype: np.dtype, channels: int) -> InputSteps:
    """Return the steps of a normaliser for raw images of a type.

    If the normaliser uses the statistics of each volume, the steps use those of the given image (percentiles 0.5 and
    99.5, or extremes), which is exact for whole volumes.
    """
    dtype = np.dtype(dtype)
    if normalizer.goes_by_volume(dtype):
        if normalizer.scheme == "zscore":
            return InputSteps(dtype, standardize=True)
        if normalizer.scheme == "percentile":
            return InputSteps(dtype, percentiles=(0.5, 99.5), clip=True)
        return InputSteps(dtype, percentiles=(0.5, 99.5) if normalizer.every_type else (0.0, 100.0))
    rows = normalizer.coefficients(dtype, channels).astype(np.float64)
    bounded = np.isfinite(rows[:, :2]).all(axis=1)
    if bounded.any() and not bounded.all():
        raise VolumenError(
            "dataset_config.normalization_scheme",
            "the channels are normalised by steps that this format has no common form for: some are clipped, some not",
            remedy="train with one scheme for all channels, or export to another format",
        )
    if not bounded.all():
        first = tuple((1 / width, -shift / width) for _, _, shift, width in rows)
        return InputSteps(dtype, first=_unless_idle(first))
    # First to [0, 1], so that one pair of bounds clips every channel; then to the range of the training.
    spans = [max(high - low, 1e-8) for low, high, _, _ in rows]
    first = tuple((1 / span, -low / span) for (low, _, _, _), span in zip(rows, spans, strict=True))
    second = tuple(
        (span / width, (low - shift) / width)
        for (low, _, shift, width), span in zip(rows, spans, strict=True)
    )
    return InputSteps(dtype, first=_unless_idle(first), clip=True, second=_unless_idle(second))


def _unless_idle(maps: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    idle = all(abs(gain - 1) < 1e-7 and abs(offset) < 1e-7 for gain, offset in maps)
    return () if idle else tuple((float(gain), float(offset)) for gain, offset in maps)


def _linear(values: np.ndarray, maps: tuple[tuple[float, float], ...]) -> np.ndarray:
    if not maps:
        return values
    shape = (1, -1, *(1,) * (values.ndim - 2))
    gain, offset = (np.array(column, np.float32).reshape(shape) for column in zip(*maps))
    return values * gain + offset


def _described_linear(v0_5: Any, maps: tuple[tuple[float, float], ...]) -> list[Any]:
    if not maps:
        return []
    gains, offsets = (list(column) for column in zip(*maps))
    if len(maps) == 1:
        kwargs = v0_5.ScaleLinearKwargs(gain=gains[0], offset=offsets[0])
    else:
        kwargs = v0_5.ScaleLinearAlongAxisKwargs(axis="channel", gain=gains, offset=offsets)
    return [v0_5.ScaleLinearDescr(kwargs=kwargs)]
