"""What the report's pictures are explained with: colours that most eyes tell apart, scale bars, colour bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from volumen.metrics.units import short_unit

# Of Okabe and Ito, "Color Universal Design", 2008: they differ in lightness too, for every kind of colour vision.
COLOURS = {"both": (86, 180, 233), "missed": (240, 228, 66), "false": (213, 94, 0)}
# Dark to light with an even rise in lightness (anchors of matplotlib's viridis).
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
MOST_OF_WIDTH = 0.4
_NICE = (1.0, 2.0, 5.0)


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


def nice_length(most: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that is not above `most`, which is positive."""
    power = 10.0 ** math.floor(math.log10(most))
    fits = [factor * power for factor in _NICE if factor * power <= most * (1 + 1e-9)]
    return fits[-1] if fits else 5 * power / 10


def draw_scale_bar(
    picture: Image.Image, pixels_per_voxel: float, spacing: float | None, unit: str | None
) -> str:
    """Draw a scale bar along x into the lower left corner of a picture, and return its length as text.

    Args:
        picture: drawn into.
        pixels_per_voxel: of the picture, along x.
        spacing: size of a voxel along x, in `unit`; None: unknown, the bar counts voxels.
        unit: of the spacing, as the file names it.
    """
    size = 1.0 if spacing is None else spacing
    most = MOST_OF_WIDTH * picture.width / pixels_per_voxel * size
    if most < size:
        return ""
    length = nice_length(most)
    text = f"{length:g} {short_unit(unit) if spacing is not None else 'voxels'}"
    width = max(2, round(length / size * pixels_per_voxel))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    left, bottom = 8, picture.height - 9
    draw.rectangle((left - 1, bottom - 4, left + width, bottom + 1), fill=(0, 0, 0))
    draw.rectangle((left, bottom - 3, left + width - 1, bottom), fill=(255, 255, 255))
    draw.text(
        (left, bottom - 7),
        text,
        fill=(255, 255, 255),
        font=font,
        anchor="ld",
        stroke_width=2,
        stroke_fill=(0, 0, 0),
    )
    return text


def in_columns(keys: Sequence[str], most: int) -> list[list[str]]:
    """Divide the columns of a table into tables of at most so many, as even as can be."""
    tables = math.ceil(len(keys) / most) or 1
    each = math.ceil(len(keys) / tables) or 1
    return [list(keys[start : start + each]) for start in range(0, len(keys), each)]
