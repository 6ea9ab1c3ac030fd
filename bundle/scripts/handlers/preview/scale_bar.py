"""Scale bars for pictures."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from volumen.metrics.units import short_unit
from volumen.utils.picture_text import drawable, picture_font

MOST_OF_WIDTH = 0.4
_NICE = (1.0, 2.0, 5.0)
_FONT = 13


def nice_length(most: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that is not above `most`, which is positive."""
    power = 10.0 ** math.floor(math.log10(most))
    fits = [factor * power for factor in _NICE if factor * power <= most * (1 + 1e-9)]
    return fits[-1] if fits else 5 * power / 10


def draw_scale_bar(
    picture: Image.Image, pixels_per_voxel: float, spacing: float | None, unit: str | None
) -> str:
    """Draw a scale bar along x into the lower left corner of a picture, and return its length as text.

    Nothing is drawn, and "" returned, where not one voxel fits into the bar or the text does not fit into the picture.

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
    shown, draw, font = drawable(text), ImageDraw.Draw(picture), picture_font(_FONT)
    left, bottom = 8, picture.height - 9
    if left + font.getlength(shown) > picture.width or bottom < 2 * _FONT:
        return ""
    draw.rectangle((left - 1, bottom - 4, left + width, bottom + 1), fill=(0, 0, 0))
    draw.rectangle((left, bottom - 3, left + width - 1, bottom), fill=(255, 255, 255))
    draw.text(
        (left, bottom - 7),
        shown,
        fill=(255, 255, 255),
        font=font,
        anchor="ld",
        stroke_width=2,
        stroke_fill=(0, 0, 0),
    )
    return text
