"""The overview picture of suggestions: for each box its middle plane, with the label to paint and the uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Volume
from volumen.suggestion.record import BOXES, IMAGE, UNCERTAINTY, SuggestedBox, Suggestions
from volumen.suggestion.to_paint import label_name
from volumen.utils.boxes import box_text
from volumen.utils.picture_text import drawable, picture_font

_TILE, _GAP, _LINE = 220, 10, 18
_PER_ROW = 3
_BACKGROUND, _TEXT, _FRAME = (24, 24, 27), (228, 228, 231), (255, 255, 255)
# From dark to light, even in lightness (anchors of inferno).
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)
_CONTOUR = np.array((255, 176, 0), np.float32)


def write_overview(path: Path, folder: Path, found: Suggestions) -> None:
    """Write a PNG with two tiles per box: the image with the outline of the label to paint, and the uncertainty.

    Args:
        path: the picture.
        folder: of the suggestions, with the boxes already written.
        found: the suggestions.
    """
    from PIL import Image, ImageDraw

    font = picture_font(13)
    columns = min(_PER_ROW, max(1, len(found.boxes)))
    rows = math.ceil(max(1, len(found.boxes)) / columns)
    width = 2 * _TILE + _GAP
    height = _TILE + 3 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * height + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, box in enumerate(found.boxes):
        left = _GAP + (number % columns) * (width + _GAP)
        top = _GAP + (number // columns) * height
        lines = [f"{box.rank}  {box.volume}  {box_text(box.box)}", *_wrapped(box.reason, width, font)]
        for line, text in enumerate(lines[:3]):
            draw.text((left, top + line * _LINE), drawable(text), fill=_TEXT, font=font)
        for place, picture in enumerate(_tiles(folder / BOXES / box.folder, box, found)):
            sheet.paste(Image.fromarray(picture), (left + place * (_TILE + _GAP), top + 3 * _LINE))
    sheet.save(path, format="PNG")


def _tiles(folder: Path, box: SuggestedBox, found: Suggestions) -> list[np.ndarray]:
    ndim = len(box.box)
    image = open_volume(folder / f"{IMAGE}.zarr", ndim=ndim)
    heat = open_volume(folder / f"{UNCERTAINTY}.zarr", ndim=ndim)
    label = open_volume(folder / f"{label_name(box.target)}.zarr", ndim=ndim, labels=True)
    spacing = found.geometry[box.volume]["spacing"] or [1.0] * ndim
    start = [max(0, low - round((high - low) / 2)) for low, high in box.box]
    inner = [slice(low - first, high - first) for (low, high), first in zip(box.box, start, strict=True)]
    plane = tuple(slice(0, n) for n in image.shape)
    if ndim == 3:
        middle = (inner[0].start + inner[0].stop) // 2
        plane = (slice(middle, middle + 1), *plane[1:])
    grey, warm = _grey(_plane(image, plane)), _heat(_plane(heat, plane)[0])
    own = [slice(0, n) for n in label.shape]
    if ndim == 3:
        own[0] = slice(plane[0].start - inner[0].start, plane[0].stop - inner[0].start)
    step = (float(spacing[-2]), float(spacing[-1]))
    scale = _TILE / max(side * size for side, size in zip(grey.shape[:2], step, strict=True))
    pictures = [_enlarged(picture, step, scale) for picture in (grey, warm)]
    rows, columns = (
        (round(part.start * size * scale), max(1, round(part.stop * size * scale)))
        for part, size in zip(inner[-2:], step, strict=True)
    )
    painted = _nearest(_plane(label, tuple(own)).max(axis=0), rows[1] - rows[0], columns[1] - columns[0])
    window = pictures[0][rows[0] : rows[1], columns[0] : columns[1]]
    window[_edges(painted)[: window.shape[0], : window.shape[1]]] = _CONTOUR
    tiles = []
    for picture in pictures:
        tile = np.zeros((_TILE, _TILE, 3), np.uint8)
        _frame(picture, rows, columns)
        tile[: picture.shape[0], : picture.shape[1]] = picture[:_TILE, :_TILE].astype(np.uint8)
        tiles.append(tile)
    return tiles


def _plane(volume: Volume, region: tuple[slice, ...]) -> np.ndarray:
    values = volume.read(region)
    return values[:, 0] if values.ndim == 4 else values


def _grey(image: np.ndarray) -> np.ndarray:
    """Scale an image (C, Y, X) to float32 (Y, X, 3), 0 to 255; three channels are colours."""
    channels = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    values = np.nan_to_num(channels.astype(np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, (0.5, 99.5))
    return np.asarray(
        np.clip((values - low) / max(high - low, 1e-6), 0, 1).transpose(1, 2, 0) * np.float32(255)
    )


def _heat(values: np.ndarray) -> np.ndarray:
    place = values.astype(np.float32) / 255 * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int), len(_HEAT) - 2)
    part = (place - low)[..., None]
    return np.asarray(_HEAT[low] * (1 - part) + _HEAT[low + 1] * part)


def _enlarged(picture: np.ndarray, step: Sequence[float], scale: float) -> np.ndarray:
    height, width = (
        min(_TILE, max(1, round(side * size * scale)))
        for side, size in zip(picture.shape[:2], step, strict=True)
    )
    return _nearest(picture, height, width)


def _nearest(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture of another size, each pixel the nearest voxel."""
    rows = np.arange(height) * picture.shape[0] // max(1, height)
    columns = np.arange(width) * picture.shape[1] // max(1, width)
    return picture[rows][:, columns]


def _edges(label: np.ndarray) -> np.ndarray:
    """Return the pixels of a label beside a pixel of another value."""
    edge = np.zeros(label.shape, bool)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    return edge


def _frame(picture: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Draw the box into a picture of its surroundings."""
    top, bottom = rows[0], min(rows[1], picture.shape[0]) - 1
    left, right = columns[0], min(columns[1], picture.shape[1]) - 1
    picture[[top, bottom], left : right + 1] = _FRAME
    picture[top : bottom + 1, [left, right]] = _FRAME


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
