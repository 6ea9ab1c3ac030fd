"""Draws a plane of every layer of a view into one picture, for a report or a machine without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumen.handlers.preview.colours import (
    PALETTE,
    directions,
    diverging,
    grey,
    overlay,
    tensor_diagonal,
)
from volumen.utils.errors import VolumenError
from volumen.utils.picture_text import drawable, picture_font
from volumen.viewing.layers import ADDED, CONFUSED, MISSED, View, ViewLayer

SUFFIXES = (".png", ".jpg", ".webp")
_TILE, _GAP, _CAPTION, _LETTERS, _PER_ROW = 300, 8, 22, 14, 4
_LARGEST = 2048
"""Voxels per axis of a plane that is read; of a larger one the part around the position."""
_BACKGROUND, _TEXT = (24, 24, 27), (228, 228, 231)
_PROBABILITIES = ("binary", "multiclass", "multilabel")
_ERRORS = {MISSED: (255, 176, 0), ADDED: (86, 180, 233), CONFUSED: (240, 100, 160)}
_INSIDE = 0.45
"""Share of a label's colour over the image, inside the object; its outline has the full colour."""


def write_picture(view: View, path: Path, position: Sequence[int] | None = None) -> Path:
    """Write the plane across Z, through a position, of every layer, in the proportions of the voxels.

    Images are grey from the 0.5th to the 99.5th percentile or RGB. Over the first image are drawn: probabilities as
    tints, labels and instances as colours with outlines, errors in orange (missed), blue (added) and pink (confused).
    Distances are blue inside, white at 0 and red outside; vectors and diagonals of tensors have x, y, z as red, green,
    blue. Of other values the first channel is grey.

    Args:
        view: the layers; those that are hidden in a viewer at first are drawn, too.
        path: a .png, .jpg or .webp file.
        position: voxel of the first layer, (Z, Y, X) or (Y, X); None: that of the view, else the middle.

    Returns:
        The path.

    Raises:
        VolumenError: another suffix, or a position outside the first layer.
    """
    from PIL import Image, ImageDraw

    if path.suffix.lower() not in SUFFIXES:
        raise VolumenError(
            "--picture", expected=f"a file that ends with {', '.join(SUFFIXES)}", found=str(path)
        )
    shape = view.layers[0].levels[0].shape
    at = tuple(position or view.position or (n // 2 for n in shape))
    if len(at) != len(shape) or any(not 0 <= place < n for place, n in zip(at, shape)):
        raise VolumenError("--at", expected=f"a voxel of a volume of {tuple(shape)}", found=at)
    region = tuple(_window(place, n, axis < len(shape) - 2) for axis, (place, n) in enumerate(zip(at, shape)))
    base = _base(view, region)
    tiles = [(_caption(layer), draw_layer(layer, region, base)) for layer in view.layers]
    height, width = _fitting(base.shape[:2], view.spacing[-2:])
    columns = min(_PER_ROW, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + _CAPTION + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), picture_font(_LETTERS)
    for number, (caption, tile) in enumerate(tiles):
        left = _GAP + number % columns * (width + _GAP)
        top = _GAP + number // columns * (height + _CAPTION + _GAP)
        draw.text((left, top), _shortened(drawable(caption), width), fill=_TEXT, font=font)
        picture = Image.fromarray(np.clip(tile, 0, 255).astype(np.uint8))
        enlarged = height >= tile.shape[0]
        how = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
        sheet.paste(picture.resize((width, height), how), (left, top + _CAPTION))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        sheet.save(path)
    except OSError as error:
        raise VolumenError(path, f"cannot be written ({error})", remedy="choose another --picture") from None
    return path


def draw_layer(layer: ViewLayer, region: tuple[slice, ...], base: np.ndarray) -> np.ndarray:
    """Return the colours of a plane of a layer, float32 (Y, X, 3) from 0 to 255.

    Args:
        layer: the layer.
        region: of the first layer's voxels, one of them along Z.
        base: colours of the image in this region.
    """
    values, there = _read(layer, region)
    kind = layer.content.kind
    if kind == "errors":
        return _painted(base, values[0], {value: np.array(colour) for value, colour in _ERRORS.items()})
    if layer.is_labels:
        return _painted(base, values[0])
    if kind == "image":
        return _stretched(values)
    if kind in _PROBABILITIES:
        shares = values / layer.content.largest
        # The first channel of exclusive classes is the background.
        return overlay(base, shares[1:] if kind == "multiclass" and len(shares) > 1 else shares)
    if kind == "distance":
        reach = float(np.abs(values).max(initial=0)) or 1.0
        colours = diverging(values[0], reach, reach)
    elif kind in ("vector", "axis") and len(values) in (2, 3):
        colours = directions(values, signed=kind == "vector")
        there = there & (np.abs(values).max(axis=0) > 0)
    elif kind == "tensor" and len(values) in (3, 6):
        colours = tensor_diagonal(values, float(np.percentile(values, 99.5)) or 1.0)
    else:
        colours = _stretched(values[:1])
    return np.where(there[..., None], colours, np.float32(24))


def _window(place: int, size: int, across: bool) -> slice:
    if across:
        return slice(place, place + 1)
    start = min(max(place - _LARGEST // 2, 0), max(size - _LARGEST, 0))
    return slice(start, min(start + _LARGEST, size))


def _base(view: View, region: tuple[slice, ...]) -> np.ndarray:
    """Return the colours of the first image; black, if there is none."""
    image = next((layer for layer in view.layers if layer.content.kind == "image"), None)
    if image is None:
        return np.zeros((*(part.stop - part.start for part in region[-2:]), 3), np.float32)
    return _stretched(_read(image, region)[0])


def _read(layer: ViewLayer, region: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a plane (C, Y, X), 0 where the layer has none, and where it has some, bool (Y, X)."""
    volume = layer.levels[0]
    extent = [part.stop - part.start for part in region]
    inside, target = [], []
    for part, first, size in zip(region, layer.start, volume.shape, strict=True):
        low, high = max(part.start, first), min(part.stop, first + size)
        inside.append(slice(low - first, max(low, high) - first))
        target.append(slice(low - part.start, max(low, high) - part.start))
    kept = volume.dtype if layer.is_labels else np.dtype(np.float32)
    values = np.zeros((volume.channels, *extent), kept)
    there = np.zeros(extent, bool)
    if all(part.stop > part.start for part in inside):
        values[(slice(None), *target)] = volume.read(tuple(inside))
        there[tuple(target)] = True
    plane = extent[-2:]
    return values.reshape(volume.channels, *plane), there.reshape(plane)


def _stretched(values: np.ndarray) -> np.ndarray:
    shown = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
    low, high = np.percentile(shown, (0.5, 99.5))
    return grey((shown - low) / max(float(high - low), 1e-6))


def _painted(
    base: np.ndarray, numbers: np.ndarray, colours: dict[int, np.ndarray] | None = None
) -> np.ndarray:
    """Draw label values over colours: a tint inside, and outlines between values."""
    picture = base * np.float32(0.8)
    picks = PALETTE[_scattered(numbers) % len(PALETTE)]
    if colours is not None:
        picks = np.zeros((*numbers.shape, 3), np.float32)
        for value, colour in colours.items():
            picks[numbers == value] = colour
    edge = np.zeros(numbers.shape, bool)
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    edge[:, 1:] |= across
    edge[1:] |= down
    share = np.where(edge, 0.9, _INSIDE if colours is None else 0.9)[..., None]
    return np.where((numbers != 0)[..., None], picture * (1 - share) + picks * share, picture)


def _scattered(numbers: np.ndarray) -> np.ndarray:
    """Return classes as they are, counted from 0, and hashes of instance numbers, so that neighbours differ."""
    values = numbers.astype(np.uint64)
    if int(values.max(initial=0)) <= len(PALETTE):
        return np.maximum(values.astype(np.int64) - 1, 0)
    return (values * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64)


def _caption(layer: ViewLayer) -> str:
    return f"{layer.name}: missed, added, confused" if layer.content.kind == "errors" else layer.name


def _fitting(shape: Sequence[int], step: Sequence[float]) -> tuple[int, int]:
    """Return height and width of a plane in pixels, in the proportions of the voxels, the longer one `_TILE`."""
    extent = [n * size for n, size in zip(shape, step, strict=True)]
    height, width = (max(1, round(side * _TILE / max(extent))) for side in extent)
    return height, width


def _shortened(text: str, width: int) -> str:
    font = picture_font(_LETTERS)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
