"""What the report's pictures are explained with: colours that most eyes tell apart, scale bars, colour bars."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from volumen.handlers.preview.scale_bar import MOST_OF_WIDTH, nice_length

# Of Okabe and Ito, "Color Universal Design", 2008, and a violet: they differ in lightness too, for every kind of colour
# vision.
COLOURS = {
    "both": (86, 180, 233),
    "missed": (240, 228, 66),
    "false": (213, 94, 0),
    "class": (120, 40, 140),
}
PARTS = ((0, 224, 224), (0, 114, 178), (64, 0, 0), (128, 0, 224), (0, 0, 64), (160, 96, 96))
"""Colours of the parts of an object, the largest first: as far as can be from each other and from those of missed and
false voxels for every kind of colour vision, found by a greedy search of the colours of 8 steps a channel."""
# Dark to light with an even rise in lightness (anchors of matplotlib's viridis).
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def ramp_colours(share: np.ndarray) -> np.ndarray:
    """Return the colours (*share.shape, 3) float32 of values in [0, 1] along `RAMP`."""
    position = np.clip(share, 0, 1) * (len(RAMP) - 1)
    anchors = np.array(RAMP, np.float32)
    steps = np.arange(len(RAMP))
    return np.stack([np.interp(position, steps, anchors[:, c]) for c in range(3)], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class ColourBar:
    """What a colour bar along `RAMP` says.

    Args:
        low: value at its dark end.
        high: value at its light end.
        words: what the values are.
    """

    low: str
    high: str
    words: str


@dataclass(frozen=True)
class ScaleBar:
    """A scale bar along the columns of a picture.

    Args:
        share: of the picture's width.
        words: its length with its unit.
    """

    share: float
    words: str


def scale_bar(columns: int, spacing: float | None, unit: str) -> ScaleBar | None:
    """Return a bar of a round length, at most `MOST_OF_WIDTH` of a picture; None where a voxel is longer than that.

    Args:
        columns: voxels that the picture is wide.
        spacing: size of a voxel along them; None: not known, the bar counts voxels.
        unit: of the spacing, as it is written behind a number.
    """
    size = 1.0 if spacing is None else spacing
    most = MOST_OF_WIDTH * columns * size
    if most < size:
        return None
    length = nice_length(most)
    words = f"{length:g} {unit if spacing is not None else 'voxels'}"
    return ScaleBar(length / size / columns, words)


def outline(mask: np.ndarray) -> str:
    """Return the outline of a mask (rows, columns) as an SVG path in pixels: all edges between it and its outside."""
    padded = np.pad(mask.astype(np.int8), 1)
    path = []
    # Edges below and above pixels, then those beside them.
    for upright in (False, True):
        steps = np.diff(padded.T if upright else padded, axis=0)[:, 1:-1]
        for place in np.flatnonzero(steps.any(axis=1)):
            row = np.pad(np.abs(steps[place]), 1)
            ends = np.flatnonzero(np.diff(row))
            for start, stop in ends.reshape(-1, 2):
                length = stop - start
                path.append(f"M{place} {start}v{length}" if upright else f"M{start} {place}h{length}")
    return "".join(path)


def png(pixels: np.ndarray) -> str:
    """Return a picture (rows, columns), (rows, columns, 3) or (rows, columns, 4), uint8, as base64 of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def in_columns(keys: Sequence[str], most: int) -> list[list[str]]:
    """Divide the columns of a table into tables of at most so many, as even as can be."""
    tables = math.ceil(len(keys) / most) or 1
    each = math.ceil(len(keys) / tables) or 1
    return [list(keys[start : start + each]) for start in range(0, len(keys), each)]
