"""Draws a patch, its targets and the network's predictions as a titled grid, one frame per slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from volumen.handlers.preview import colours
from volumen.handlers.preview.scale_bar import draw_scale_bar
from volumen.utils.picture_text import drawable
from volumen.utils.picture_text import picture_font as _font

LABELS = ("binary", "multiclass", "multilabel")
MAX_WIDTH, MAX_CELL, MIN_COLUMN = 1600, 224, 120
MAX_COLUMNS = 7
MAX_FRAMES = 24
MARGIN, GAP, ROW_TITLE, HEADER, TITLE = 14, 10, 22, 34, 24
# The colour key below a column has at most two lines.
KEY, KEY_LINE = 38, 14
BACKGROUND, TEXT, FAINT = (18, 20, 24), (232, 234, 237), (140, 146, 156)
INK, WIDTH = (45, 49, 57), 1


@dataclass
class Panel:
    """One column of the grid: truth, prediction and the key of their colours.

    Args:
        title: text above the column.
        rows: two arrays (Z, H, W, 3) of colours, truth and prediction.
        key: what is drawn below: ("bar", low, high), ("ball", axes), ("axes", axes), ("classes", names) or ().
        has_unknown: whether the truth is unknown somewhere, hence striped.
    """

    title: str
    rows: tuple[np.ndarray, np.ndarray]
    key: tuple[Any, ...] = field(default=())
    has_unknown: bool = False


def render_preview(
    image: np.ndarray,
    truths: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    kinds: Mapping[str, str],
    *,
    title: str = "",
    spacing: Sequence[float] | None = None,
    unit: str | None = None,
    max_frames: int = MAX_FRAMES,
    max_width: int = MAX_WIDTH,
) -> list[Image.Image]:
    """Return the frames of a preview: one for a 2D patch, slices along Z for a 3D one.

    The first column shows the image with a scale bar, and below it the image with all predicted classes. Each further
    column shows a target's truth above its prediction. Voxels that are not valid are dark and striped. Predictions are
    the network's raw outputs; this function computes probabilities, classes and unit vectors.

    Args:
        image: (C, *spatial).
        truths: target to (C, *spatial); class indices or values. A target without truth may be absent.
        predictions: target to the network's output (C, *spatial).
        masks: target to bool (1, *spatial), the valid voxels; if absent, all are valid.
        kinds: target to binary, multiclass, multilabel, distance, vector, axis, tensor or field.
        title: text of the headline.
        spacing: voxel size per axis, in `unit`; None: unknown, the scale bar counts voxels.
        unit: unit of the spacing.
        max_frames: maximum number of slices of a 3D patch, evenly spaced.
        max_width: maximum width in pixels.

    Returns:
        Frames of one size, RGB.
    """
    flat = image.ndim == 3
    depth = 1 if flat else image.shape[1]
    count = min(depth, max_frames)
    slices = np.unique(np.linspace(0, depth - 1, count).round().astype(int))

    def sliced(array: np.ndarray) -> np.ndarray:
        volume = np.asarray(array)
        return volume[:, None] if flat else volume[:, slices]

    low, high = np.percentile(np.nan_to_num(image), (0.5, 99.5))
    base = colours.grey((sliced(image) - low) / max(high - low, 1e-6))
    names = [name for name in predictions if name in kinds]
    panels = [_input_panel(base, {name: sliced(predictions[name]) for name in names}, kinds)]
    for name in names:
        truth = sliced(truths[name]) if name in truths else None
        valid = np.ones(base.shape[:3], bool)
        if truth is None:
            valid[:] = False
        elif name in masks:
            valid = sliced(masks[name])[0] > 0
        panels.append(_target_panel(name, kinds[name], base, truth, sliced(predictions[name]), valid))
    captions = [""] if flat else [f"z {z + 1} / {depth}" for z in slices]
    title = drawable(title)
    voxel = (None, None) if spacing is None else (float(spacing[-1]), unit)
    return [_frame(panels, index, title, caption, max_width, voxel) for index, caption in enumerate(captions)]


def probabilities(prediction: np.ndarray, kind: str) -> np.ndarray:
    """Return class probabilities (classes without background, *spatial) of logits (C, *spatial)."""
    logits = np.nan_to_num(prediction.astype(np.float32), posinf=80, neginf=-80)
    if kind == "multiclass":
        shifted = np.exp(logits - logits.max(axis=0))
        return shifted[1:] / shifted.sum(axis=0)
    return 1 / (1 + np.exp(-np.clip(logits, -60, 60)))


def _input_panel(base: np.ndarray, predictions: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> Panel:
    below, names, first = base, [], 0
    for name, prediction in predictions.items():
        if kinds[name] not in LABELS:
            continue
        found = probabilities(prediction, kinds[name])
        below = colours.overlay(below / (0.8 if first else 1), found >= 0.5, first)
        names.append((name, first))
        first += len(found)
    return Panel("input", (base, below), ("classes", tuple(names)) if len(names) > 1 else ())


def _target_panel(
    name: str,
    kind: str,
    base: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray,
    valid: np.ndarray,
) -> Panel:
    """Return the column of one target; arrays are (C, Z, H, W), `valid` (valid voxels) is (Z, H, W)."""
    predicted = _finite(prediction)
    given = predicted if truth is None else _finite(truth)
    key: tuple[Any, ...] = ()
    axes = ("x", "y", "z")[: len(predicted)]
    if kind in LABELS:
        found = probabilities(prediction, kind)
        true = (
            np.stack([given[0] == index + 1 for index in range(len(found))])
            if kind == "multiclass"
            else given > 0
        )
        rows = colours.overlay(base, true.astype(np.float32)), colours.overlay(base, found)
        key = (
            ("classes", tuple((str(index + 1), index) for index in range(len(found))))
            if len(found) > 1
            else ()
        )
        if len(found) == 1:
            key = ("bar", "0", "1", np.stack([np.zeros(3), colours.PALETTE[0]]), "probability")
    elif kind in ("vector", "axis"):
        signed = kind == "vector"
        rows = colours.directions(given, signed=signed), colours.directions(predicted, signed=signed)
        key = ("ball", axes) if signed else ("axes", axes)
    elif kind == "tensor":
        limit = _limit(given, valid)
        rows = colours.tensor_diagonal(given, limit), colours.tensor_diagonal(predicted, limit)
        key = ("axes", ("xx", "yy", "zz")[: 3 if len(predicted) == 6 else 2])
    elif kind == "distance":
        limits = _distance_limits(given[0], valid)
        rows = colours.diverging(given[0], *limits), colours.diverging(predicted[0], *limits)
        key = ("bar", f"-{limits[0]:.2g}", f"+{limits[1]:.2g}", colours.DIVERGING, "in | out, voxels")
    else:
        low, high = np.percentile(given[0][valid] if valid.any() else given[0], (1, 99))
        span = max(high - low, 1e-6)
        above, below = ((part[0] - low) / span for part in (given, predicted))
        rows = colours.through(colours.SEQUENTIAL, above), colours.through(colours.SEQUENTIAL, below)
        key = ("bar", f"{low:.3g}", f"{high:.3g}", colours.SEQUENTIAL, "")
    through = base if kind in LABELS else None
    shown = np.stack(
        [
            colours.dim_invalid(rows[0][z], valid[z], None if through is None else through[z])
            for z in range(len(valid))
        ]
    )
    return Panel(name, (shown, rows[1]), key, has_unknown=not valid.all())


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), posinf=1e6, neginf=-1e6)


def _limit(values: np.ndarray, valid: np.ndarray) -> float:
    """Return the largest magnitude of the valid values; at least a small number, which avoids division by 0."""
    shown = np.abs(values[:, valid])
    return max(float(np.percentile(shown, 99)), 1e-6) if shown.size else 1.0


def _distance_limits(distance: np.ndarray, valid: np.ndarray) -> tuple[float, float]:
    """Return the depths inside and outside at which colours saturate, separately, so that thin sheets are visible."""
    sides = (-distance[valid], distance[valid])
    inside, outside = (
        float(np.percentile(side[side > 0], 99)) if (side > 0).any() else 0.0 for side in sides
    )
    return inside or outside or 1.0, outside or inside or 1.0


def _frame(
    panels: Sequence[Panel],
    index: int,
    title: str,
    caption: str,
    max_width: int,
    voxel: tuple[float | None, str | None],
) -> Image.Image:
    bands = [panels[start : start + MAX_COLUMNS] for start in range(0, len(panels), MAX_COLUMNS)]
    height, width = panels[0].rows[0].shape[1:3]
    columns = max(len(band) for band in bands)
    room = (max_width - 2 * MARGIN - ROW_TITLE - GAP * (columns - 1)) / columns
    scale = min(room, MAX_CELL if width <= MAX_CELL else width) / width
    if scale >= 1:
        scale = float(int(scale))
    cell = max(1, int(width * scale)), max(1, int(height * scale))
    column = max(cell[0], MIN_COLUMN)
    band_height = TITLE + 2 * cell[1] + GAP + KEY
    size = (
        2 * MARGIN + ROW_TITLE + columns * column + GAP * (columns - 1),
        HEADER + MARGIN + len(bands) * band_height + GAP * (len(bands) - 1),
    )
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, HEADER / 2), title, fill=TEXT, font=_font(15), anchor="lm")
    draw.text((size[0] - MARGIN, HEADER / 2), caption, fill=FAINT, font=_font(13), anchor="rm")
    if any(panel.has_unknown for panel in panels):
        # Beside the longest caption, so that it stays in its place from slice to slice.
        right = size[0] - MARGIN - (round(_font(13).getlength("z 000 / 000")) + 16 if caption else 0)
        _draw_unknown(canvas, draw, right, MARGIN + _font(15).getlength(title) + GAP)
    for row, band in enumerate(bands):
        top = HEADER + row * (band_height + GAP)
        for line, text in enumerate(("truth", "prediction")):
            _write_upwards(canvas, text, MARGIN, top + TITLE + line * (cell[1] + GAP) + cell[1] // 2)
        for place, panel in enumerate(band):
            left = MARGIN + ROW_TITLE + place * (column + GAP)
            _draw_panel(canvas, draw, panel, index, (left, top), cell, column)
            if panel is panels[0]:
                _draw_scale(canvas, draw, panel.title, (left, top), cell, cell[0] / width, voxel)
    return canvas


def _draw_scale(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    title: str,
    corner: tuple[int, int],
    cell: tuple[int, int],
    pixels_per_voxel: float,
    voxel: tuple[float | None, str | None],
) -> None:
    """Draw a scale bar into the upper cell of a panel, and the directions of its axes behind the title."""
    left, top = corner
    box = (left, top + TITLE, left + cell[0], top + TITLE + cell[1])
    picture = canvas.crop(box)
    if draw_scale_bar(picture, pixels_per_voxel, *voxel):
        canvas.paste(picture, box[:2])
    words, small = "x right, y down", _font(11)
    if left + _font(13).getlength(title) + GAP + small.getlength(words) <= box[2]:
        draw.text((box[2], top + TITLE / 2), words, fill=FAINT, font=small, anchor="rm")


def _draw_unknown(canvas: Image.Image, draw: ImageDraw.ImageDraw, right: float, least: float) -> None:
    """Explain the stripes: a swatch and words that end at `right` and begin after `least`, where there is room."""
    swatch = 14
    for text in ("truth unknown (not labelled)", "unknown"):
        left = right - _font(12).getlength(text) - swatch - 6
        if left >= least:
            break
    else:
        return
    stripes = colours.dim_invalid(np.zeros((swatch, swatch, 3)), np.zeros((swatch, swatch), bool))
    corner = round(left), round(HEADER / 2 - swatch / 2)
    canvas.paste(Image.fromarray(stripes.astype(np.uint8)), corner)
    draw.rectangle((*corner, corner[0] + swatch, corner[1] + swatch), outline=FAINT, width=WIDTH)
    draw.text((corner[0] + swatch + 6, HEADER / 2), text, fill=FAINT, font=_font(12), anchor="lm")


def _draw_panel(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    index: int,
    corner: tuple[int, int],
    cell: tuple[int, int],
    column: int,
) -> None:
    left, top = corner
    draw.text(
        (left, top + TITLE / 2), _shortened(panel.title, column), fill=TEXT, font=_font(13), anchor="lm"
    )
    for line, row in enumerate(panel.rows):
        picture = Image.fromarray(np.clip(row[index], 0, 255).astype(np.uint8))
        smaller = cell[0] < picture.width
        picture = picture.resize(cell, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
        y = top + TITLE + line * (cell[1] + GAP)
        canvas.paste(picture, (left, y))
        draw.rectangle((left - 1, y - 1, left + cell[0], y + cell[1]), outline=INK, width=WIDTH)
    if panel.key:
        _draw_key(canvas, draw, panel.key, (left, top + TITLE + 2 * cell[1] + GAP + 8), column)


def _draw_key(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    key: tuple[Any, ...],
    corner: tuple[int, int],
    column: int,
) -> None:
    left, top = corner
    small = _font(11)
    if key[0] == "bar":
        _, low, high, anchors, words = key
        ramp = colours.through(np.asarray(anchors, np.float32), np.linspace(0, 1, column)[None])
        canvas.paste(Image.fromarray(ramp.astype(np.uint8)).resize((column, 8)), (left, top))
        draw.text((left, top + 11), low, fill=FAINT, font=small)
        draw.text((left + column / 2, top + 11), words, fill=FAINT, font=small, anchor="ma")
        draw.text((left + column, top + 11), high, fill=FAINT, font=small, anchor="ra")
    elif key[0] == "ball":
        canvas.paste(_ball(24, len(key[1])), (left, top))
        text = "x right  y down" if len(key[1]) == 2 else "x right  y down  z away"
        draw.text(
            (left + 30, top + 12), _shortened(text, column - 30, 11), fill=FAINT, font=small, anchor="lm"
        )
    elif key[0] == "axes":
        for number, (name, colour) in enumerate(zip(key[1], colours.AXES)):
            x = left + number * 38
            draw.rectangle((x, top + 1, x + 9, top + 10), fill=colour)
            draw.text((x + 14, top + 6), name, fill=FAINT, font=small, anchor="lm")
    else:
        x = left
        bottom = top + KEY - 8 - KEY_LINE
        for name, number in key[1]:
            text = _shortened(name, column - 16, 11)
            end = x + 22 + small.getlength(text)
            if end > left + column + GAP and x > left:
                if top + KEY_LINE > bottom:
                    break
                x, end, top = left, left + 22 + small.getlength(text), top + KEY_LINE
            red, green, blue = (int(part) for part in colours.PALETTE[number % len(colours.PALETTE)])
            draw.rectangle((x, top + 1, x + 9, top + 10), fill=(red, green, blue))
            draw.text((x + 14, top + 6), text, fill=FAINT, font=small, anchor="lm")
            x = end


def _ball(size: int, axes: int) -> Image.Image:
    """Return a ball (a disc for 2D) that shows the colour of each direction, seen along z."""
    y, x = (np.indices((4 * size, 4 * size)) + 0.5) / (2 * size) - 1
    radius = np.hypot(x, y)
    parts = [x, y] if axes == 2 else [x, y, -np.sqrt(np.clip(1 - radius**2, 0, 1))]
    shown = np.where(radius[..., None] <= 1, colours.directions(np.stack(parts), signed=True), BACKGROUND)
    return Image.fromarray(shown.astype(np.uint8)).resize((size, size), Image.Resampling.LANCZOS)


def _write_upwards(canvas: Image.Image, text: str, left: int, middle: int) -> None:
    font = _font(12)
    length = int(font.getlength(text)) + 2
    label = Image.new("RGB", (length, 16), BACKGROUND)
    ImageDraw.Draw(label).text((0, 8), text, fill=FAINT, font=font, anchor="lm")
    canvas.paste(label.rotate(90, expand=True), (left - 2, middle - length // 2))


def _shortened(text: str, width: int, size: int = 13) -> str:
    text, font = drawable(text), _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
