"""Colours for the values of targets: classes, distances, directions, tensors."""

from __future__ import annotations

import numpy as np

# One colour per class index; most kinds of colour vision can distinguish them (after Okabe and Ito 2008).
PALETTE = np.array(
    [
        (255, 176, 0),
        (86, 180, 233),
        (0, 200, 140),
        (240, 100, 160),
        (230, 225, 80),
        (213, 94, 0),
        (140, 120, 250),
        (200, 200, 200),
    ],
    np.float32,
)
# Blue is below zero, white is zero, red is above zero (ColorBrewer RdBu, reversed).
DIVERGING = np.array(
    [
        (5, 48, 97),
        (67, 147, 195),
        (209, 229, 240),
        (247, 247, 247),
        (253, 219, 199),
        (214, 96, 77),
        (103, 0, 31),
    ],
    np.float32,
)
# From dark to light; the lightness rises evenly (anchors of viridis).
SEQUENTIAL = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)],
    np.float32,
)
AXES = ((255, 60, 60), (60, 220, 60), (90, 110, 255))
INVALID, INVALID_STRIPE = 24.0, 58.0
OVERLAY = 0.75


def through(anchors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Interpolate along colour anchors (n, 3); returns float32 (*values.shape, 3) for values in [0, 1]."""
    position = np.clip(np.nan_to_num(values), 0, 1) * (len(anchors) - 1)
    steps = np.arange(len(anchors))
    return np.stack([np.interp(position, steps, anchors[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def key_colours() -> np.ndarray:
    """Return the colours (n, 3) that occur in colour keys."""
    ramps = [through(anchors, np.linspace(0, 1, 24)) for anchors in (DIVERGING, SEQUENTIAL)]
    return np.concatenate([*ramps, PALETTE, np.array(AXES, np.float32)])


def grey(values: np.ndarray) -> np.ndarray:
    """Return the colours (*spatial, 3) of an image (C, *spatial) in [0, 1]: three channels are RGB."""
    channels = values[:3] if len(values) >= 3 else np.repeat(values[:1], 3, axis=0)
    return 255 * np.moveaxis(np.clip(np.nan_to_num(channels), 0, 1), 0, -1).astype(np.float32)


def overlay(base: np.ndarray, weights: np.ndarray, first: int = 0) -> np.ndarray:
    """Blend class colours over an image, with their weights (C, *spatial) in [0, 1]."""
    colours = base * 0.8
    for index, weight in enumerate(np.clip(np.nan_to_num(weights), 0, 1)):
        share = OVERLAY * weight[..., None]
        colours = colours * (1 - share) + PALETTE[(first + index) % len(PALETTE)] * share
    return colours


def diverging(values: np.ndarray, below: float, above: float) -> np.ndarray:
    """Return the colours of one channel (*spatial), white at 0, saturated at -below and at +above."""
    return through(DIVERGING, 0.5 + 0.5 * np.where(values < 0, values / below, values / above))


def directions(vectors: np.ndarray, *, signed: bool) -> np.ndarray:
    """Return the colours of vectors (2 or 3, *spatial) in the order x, y[, z]: red, green, blue.

    A signed component is drawn from 0 (dark) at -1 to 255 at +1, an unsigned one from 0 at 0 to 255 at +-1. Vectors
    are drawn at unit length.
    """
    length = np.sqrt(np.sum(np.square(vectors), axis=0, keepdims=True))
    unit = np.nan_to_num(vectors / np.maximum(length, 1e-6))
    shown = (unit + 1) / 2 if signed else np.abs(unit)
    if len(shown) == 2:
        shown = np.concatenate([shown, np.full_like(shown[:1], 0.5 if signed else 0.0)])
    return 255 * np.moveaxis(shown, 0, -1).astype(np.float32)


def tensor_diagonal(components: np.ndarray, limit: float) -> np.ndarray:
    """Return the colours of a symmetric tensor: its diagonal, x red, y green, z blue, square-rooted.

    Args:
        components: (3, *spatial) in the order yy, yx, xx or (6, *spatial): zz, zy, zx, yy, yx, xx.
        limit: diagonal element drawn at full brightness.
    """
    order = (5, 3, 0) if len(components) == 6 else (2, 0)
    diagonal = np.stack([components[index] for index in order])
    if len(order) == 2:
        diagonal = np.concatenate([diagonal, np.zeros_like(diagonal[:1])])
    return 255 * np.moveaxis(np.sqrt(np.clip(np.nan_to_num(diagonal) / limit, 0, 1)), 0, -1).astype(
        np.float32
    )


def dim_invalid(colours: np.ndarray, valid: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
    """Return the colours with dark stripes where no voxel is valid.

    Args:
        colours: (H, W, 3).
        valid: bool (H, W), the valid pixels.
        base: colours of the image that remains visible below the stripes, or None.
    """
    rows, columns = np.indices(valid.shape)
    stripes = (rows + columns) % 6 < 2
    dark = np.where(stripes, INVALID_STRIPE, INVALID)[..., None]
    if base is not None:
        dark = 0.35 * base + dark * 0.65
    return np.where(valid[..., None], colours, dark)
