"""Describes the normalisation of a trained network in numbers, for use without this program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volumen.inference.predictor import Predictor
from volumen.transforms.normalize import Normalizer, schemes_of

_OWN_STATISTICS = {
    "unit": "subtract the image's minimum and divide by its maximum less its minimum",
    "percentile": "clip to the image's percentiles 0.5 and 99.5, subtract the lower and divide by their difference",
    "zscore": "subtract the image's mean and divide by its standard deviation",
}


def preprocessing_lines(predictor: Predictor) -> list[str]:
    """Return the steps from raw values to the network's input values; one line per image type if types differ."""
    normalizer, channels = predictor.normalizer, predictor.in_channels
    bytes_, floats = np.dtype("uint8"), np.dtype("float32")
    if "unit" in schemes_of(normalizer.scheme):
        lines = [f"8-bit images: {_steps(normalizer, bytes_, channels)}"]
        if normalizer.properties:
            lines.append(f"other images: {_steps(normalizer, floats, channels)}")
        return lines
    return [_steps(normalizer, floats, channels)]


def preprocessing_code(predictor: Predictor) -> str:
    """Return a Python expression in `image`, raw, (Z, Y, X) or (C, Z, Y, X), that normalises it like the training.

    The expression is for the image type of the training, which is assumed to be bytes unless statistics were sampled.
    """
    normalizer, channels = predictor.normalizer, predictor.in_channels
    dtype = np.dtype("float32" if normalizer.properties or normalizer.scheme == "none" else "uint8")
    if normalizer.goes_by_volume(dtype) and isinstance(normalizer.scheme, str):
        return {
            "unit": "(image - image.min()) / (image.max() - image.min())",
            "percentile": "(lambda a, b: (image.clip(a, b) - a) / (b - a))(*np.percentile(image, [0.5, 99.5]))",
            "zscore": "(image - image.mean()) / image.std()",
        }[normalizer.scheme]
    rows = normalizer.coefficients(dtype, channels)
    low, high, shift, width = (_column(rows[:, number], len(predictor.patch_size)) for number in range(4))
    code = "image"
    if np.isfinite(rows[:, :2]).any():
        code = f"{code}.clip({low}, {high})"
    if np.any(rows[:, 2]):
        code = f"({code} - {shift})"
    return f"{code} / {width}" if np.any(rows[:, 3] != 1) else code


def _steps(normalizer: Normalizer, dtype: np.dtype, channels: int) -> str:
    if normalizer.goes_by_volume(dtype):
        each = ", channel by channel" if channels > 1 else ""
        return _OWN_STATISTICS[schemes_of(normalizer.scheme)[0]] + each
    rows = normalizer.coefficients(dtype, channels)
    texts = [_row(row) for row in rows]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"channel {number}: {text}" for number, text in enumerate(texts))


def _row(row: Sequence[float]) -> str:
    low, high, shift, width = (float(value) for value in row)
    steps = [f"clip to {low:.6g} to {high:.6g}"] if np.isfinite([low, high]).all() else []
    if shift:
        steps.append(f"subtract {shift:.6g}" if shift > 0 else f"add {-shift:.6g}")
    if width != 1:
        steps.append(f"divide by {width:.6g}")
    return ", ".join(steps) or "values as they are"


def _number(value: float) -> str:
    return f"{value:.9g}" if np.isfinite(value) else f"{'-' if value < 0 else ''}np.inf"


def _column(values: np.ndarray, ndim: int) -> str:
    """Return Python text for one number, or for one number per channel that broadcasts over (C, *space)."""
    numbers = [_number(float(value)) for value in values]
    if len(set(numbers)) == 1:
        return numbers[0]
    return f"np.array([{', '.join(numbers)}], np.float32).reshape(-1{', 1' * ndim})"
