"""Changes the intensities of the channels of a batch, as `kernels.filters` does with one channel in a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from volumen.transforms.deferred import Change, Stage
from volumen.transforms.kernels.filters import half_kernel, low_resolution_taps
from volumen.utils.device import sent

_TINY = 1e-7


@torch.no_grad()
def change_intensities(image: Tensor, stages: Sequence[Sequence[Stage]]) -> Tensor:
    """Return a batch of images after the intensity transforms of its samples.

    Args:
        image: float32 (B, C, *space).
        stages: per sample the transforms in their order, the same ones for all samples.

    Returns:
        float32 (B, C, *space).
    """
    channels = image.shape[1]
    rows = image.flatten(0, 1)
    for step in zip(*stages, strict=True):
        changes = [
            (number * channels + change.channel, change)
            for number, stage in enumerate(step)
            for change in stage.changes
        ]
        if not changes:
            continue
        chosen = sent([row for row, _ in changes], image.device)
        found = CHANGES[step[0].kind](
            rows.index_select(0, chosen), [change for _, change in changes], *step[0].settings
        )
        rows = rows.index_copy(0, chosen, found)
    return rows.reshape(image.shape)


def add_noise(rows: Tensor, changes: Sequence[Change]) -> Tensor:
    """Add to every row (R, *space) its noise, times a fraction of the row's standard deviation."""
    noise = torch.stack([change.noise for change in changes])  # type: ignore[misc]
    return rows + noise * (_column(rows, [change.values[0] for change in changes]) * _deviation(rows))


def blur(rows: Tensor, changes: Sequence[Change]) -> Tensor:
    """Apply to every row a Gaussian blur, with a sigma per axis; values at the border are repeated."""
    for axis in range(rows.dim() - 1):
        kernels = [half_kernel(change.values[axis]) for change in changes]
        reach = max(len(kernel) for kernel in kernels) - 1
        if not reach:
            continue
        table = np.zeros((len(kernels), reach + 1), np.float32)
        for weights, kernel in zip(table, kernels):
            weights[: len(kernel)] = kernel
        # One transfer for all weights; a column of them broadcasts to the rows.
        columns = sent(table, rows.device).reshape(len(rows), *(1,) * (rows.dim() - 1), -1)
        size = rows.shape[axis + 1]
        line = torch.arange(size, device=rows.device)
        out = columns[..., 0] * rows
        for step in range(1, reach + 1):
            before = rows.index_select(axis + 1, (line - step).clamp_min(0))
            after = rows.index_select(axis + 1, (line + step).clamp_max(size - 1))
            out = out + columns[..., step] * (before + after)
        rows = out
    return rows


def brighten(rows: Tensor, changes: Sequence[Change]) -> Tensor:
    """Multiply every row by its factor."""
    return rows * _column(rows, [change.values[0] for change in changes])


def stretch(rows: Tensor, changes: Sequence[Change]) -> Tensor:
    """Stretch every row about its mean by its factor, clipped to its range."""
    space = _space(rows)
    mean, low, high = rows.mean(space, keepdim=True), rows.amin(space, True), rows.amax(space, True)
    factors = _column(rows, [change.values[0] for change in changes])
    return ((rows - mean) * factors + mean).clamp(low, high)


def lower_resolution(rows: Tensor, changes: Sequence[Change]) -> Tensor:
    """Sample every row at its lower resolution (nearest), and back (linear)."""
    for axis in range(rows.dim() - 1):
        size = rows.shape[axis + 1]
        taps = [low_resolution_taps(size, change.values[axis]) for change in changes]
        first, second, weight = (
            sent(np.stack(part), rows.device).reshape(
                len(rows), *(-1 if number == axis else 1 for number in range(rows.dim() - 1))
            )
            for part in zip(*taps)
        )
        near, far = (rows.gather(axis + 1, index.expand(rows.shape)) for index in (first, second))
        rows = near + weight * (far - near)
    return rows


def apply_gamma(rows: Tensor, changes: Sequence[Change], invert: bool, retain_stats: bool) -> Tensor:
    """Raise every row, scaled to [0, 1] within its own range, to its power; see `filters.gamma`."""
    space = _space(rows)
    low, high = rows.amin(space, True), rows.amax(space, True)
    flat = high - low < _TINY
    scale, base = (low - high, high) if invert else (high - low, low)
    exponents = _column(rows, [change.values[0] for change in changes])
    out = torch.pow((rows - base) / torch.where(flat, 1.0, scale), exponents)
    if retain_stats:
        mean = out.mean(space, keepdim=True)
        scale = torch.copysign(_deviation(rows) / _deviation(out).clamp_min(_TINY), scale)
        base = rows.mean(space, keepdim=True) - scale * mean
    return torch.where(flat, rows, out * scale + base)


def _space(rows: Tensor) -> tuple[int, ...]:
    return tuple(range(1, rows.dim()))


def _column(rows: Tensor, values: Sequence[float]) -> Tensor:
    """Return one number per row, in a shape that broadcasts to the rows."""
    return sent(values, rows.device, torch.float32).reshape(-1, *(1,) * (rows.dim() - 1))


def _deviation(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(_space(rows), keepdim=True)
    return centred.square().mean(_space(rows), keepdim=True).sqrt()


CHANGES: dict[str, Callable[..., Any]] = {
    "noise": add_noise,
    "blur": blur,
    "brightness": brighten,
    "contrast": stretch,
    "low_resolution": lower_resolution,
    "gamma": apply_gamma,
}
