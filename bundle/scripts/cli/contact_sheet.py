"""Draws every volume with its labels, so that a wrong axis, spacing or label is visible at a glance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.layout import OpenCase
from volumen.data.validity import known_voxels, without_ignored
from volumen.utils.errors import VolumenError
from volumen.utils.picture_text import drawable, picture_font

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager
    from volumen.config.targets import Target

# Distinguishable in the common kinds of colour blindness (Okabe and Ito 2008).
_COLOURS = np.array(
    [
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (213, 94, 0),
        (204, 121, 167),
        (0, 114, 178),
    ]
)
_BACKGROUND, _TEXT = (24, 24, 27), (228, 228, 231)
_GAP, _CAPTION, _LETTERS = 10, 22, 14
# Of a wider plane only the part with labels is shown, since decoding all of its chunks would take minutes.
_WINDOW = 1024
# Of a plane longer than this multiple of its width only a part is shown: a few thin slices would be a line.
_LONGEST = 4
_UNKNOWN_DIMMED = 0.4
# Up to this number of volumes, each is also shown without its labels.
_MAX_SHOWN_TWICE = 6


@dataclass(frozen=True)
class View:
    """A plane of a volume.

    Args:
        region: slices of the volume, one of them a single voxel thick for 3D volumes.
        caption: description of the plane.
        step: voxel size along its rows and columns.
        cut: the axis that is one voxel thick, None in 2D.
    """

    region: tuple[slice, ...]
    caption: str
    step: tuple[float, float]
    cut: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of rows and columns, in voxels."""
        return tuple(part.stop - part.start for axis, part in enumerate(self.region) if axis != self.cut)


def write_sheet(config: ConfigManager, path: Path, *, most: int = 24, tile: int = 320) -> Path:
    """Write a contact sheet: planes of each volume with the labels over the image, and a legend.

    Of a 3D volume the XY and the XZ plane with most labels are shown, in the proportions of the spacing. Voxels outside
    every mask, and ignored ones, are dimmed. If there are few volumes, each image is also shown without labels.

    Args:
        config: the experiment.
        path: a PNG to write.
        most: largest number of volumes.
        tile: largest width and height of a picture in pixels.

    Returns:
        The path.

    Raises:
        VolumenError: the file exists and is not a PNG, or cannot be written.
    """
    if path.exists() and path.suffix.lower() != ".png":
        raise VolumenError("--sheet", expected="a .png file", found=str(path))
    targets = config.primary_targets
    colours = target_colours(targets)
    twice = len(config.cases) <= _MAX_SHOWN_TWICE
    tiles = [
        (f"{case.name}  {view.caption}", draw_view(case, view, shown, colours, tile))
        for case in config.cases[:most]
        for view in views(case, config.labelled_profiles.get(case.name, {}))
        for shown in (({}, targets) if twice else (targets,))
    ]
    legend = _legend(targets, colours)
    if len(config.cases) > most:
        legend.append((f"the first {most} of {len(config.cases)} volumes", np.array(_BACKGROUND)))
    per_row = 4 if twice else 6 if config.spatial_dims == 3 else 5
    sheet = _arrange(tiles, legend, tile, per_row)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise VolumenError(path, f"cannot be written ({error})", remedy="choose another --sheet") from None
    return path


def views(case: OpenCase, profiles: Mapping[str, Sequence[np.ndarray]]) -> list[View]:
    """Choose the views of a volume: the planes with most labels, at most `_WINDOW` voxels wide.

    Args:
        case: the volume.
        profiles: labelled voxels per slice and axis, by target.
    """
    shape = case.image.shape
    counts = [
        sum((np.asarray(axes[axis], float) for axes in profiles.values()), np.zeros(size))
        for axis, size in enumerate(shape)
    ]
    windows = [_densest(count, min(_WINDOW, size)) for count, size in zip(counts, shape)]
    if len(shape) == 2:
        return [View(tuple(windows), "", (case.spacing[0], case.spacing[1]))]
    chosen = []
    for axis, name in ((0, "z"), (1, "y")):
        # Without labels, the middle.
        at = int(np.argmax(counts[axis])) if counts[axis].any() else shape[axis] // 2
        region = [slice(at, at + 1) if other == axis else window for other, window in enumerate(windows)]
        rows, columns = (other for other in range(3) if other != axis)
        for long, short in ((rows, columns), (columns, rows)):
            size = region[short].stop - region[short].start
            most = math.ceil(_LONGEST * size * case.spacing[short] / case.spacing[long])
            if most < region[long].stop - region[long].start:
                region[long] = _densest(counts[long], most)
        planes = {0: "xy", 1: "xz"}[axis]
        parts = [
            f"{'zyx'[other]} {region[other].start}-{region[other].stop - 1}"
            for other in (rows, columns)
            if region[other] != slice(0, shape[other])
        ]
        step = (case.spacing[rows], case.spacing[columns])
        chosen.append(View(tuple(region), ", ".join([f"{planes} at {name} {at}", *parts]), step, axis))
    # With only a few slices, the second plane would show nothing.
    return chosen if shape[0] > 4 else chosen[:1]


def _densest(count: np.ndarray, width: int) -> slice:
    """Return the window of a width with the largest count; the middle one if several are equal."""
    sums = np.convolve(count, np.ones(width), mode="valid")
    best = np.flatnonzero(sums >= sums.max() - 1e-9)
    start = int(best[len(best) // 2])
    return slice(start, start + width)


def draw_view(
    case: OpenCase,
    view: View,
    targets: Mapping[str, Target],
    colours: Mapping[str, np.ndarray],
    size: int,
) -> np.ndarray:
    """Draw a plane with its labels.

    Returns:
        uint8 (height, width, 3), neither side longer than `size`, in the proportions of the spacing.
    """
    height, width = _fitting(view.shape, view.step, size)
    # An enlarged picture repeats its pixels first, so that the borders of labels are thin lines.
    rows, columns = _repeated(view.shape[0], height), _repeated(view.shape[1], width)
    plane = (len(rows), len(columns))

    def read(volume: Any) -> np.ndarray:
        values = volume.read(view.region).reshape(volume.channels, *view.shape)
        return values[:, rows][:, :, columns]

    picture = _grey(read(case.image))
    known = np.zeros(plane, bool)
    any_label = False
    for name, target in targets.items():
        if name not in case.labels:
            continue
        any_label = True
        label = read(case.labels[name])
        mask = read(case.masks[name]) if name in case.masks else None
        sure = known_voxels(label, mask, target.ignore_label)
        known |= True if sure is None else sure
        _overlay(picture, without_ignored(label, target.ignore_label), target, colours[name])
    if any_label:
        picture[~known] *= _UNKNOWN_DIMMED
    return _resized(picture, height, width)


def _grey(image: np.ndarray) -> np.ndarray:
    """Scale an image (C, Y, X) to float32 (Y, X, 3) from 0 to 255; three channels become muted colours."""
    channels = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    values = np.nan_to_num(channels.astype(np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, (0.5, 99.5))
    picture = np.clip((values - low) / max(high - low, 1e-6), 0, 1).transpose(1, 2, 0) * np.float32(255)
    # Full colours would hide the colours of the labels.
    return 0.3 * picture + 0.7 * picture.mean(axis=2, keepdims=True)


def _overlay(picture: np.ndarray, label: np.ndarray, target: Target, colours: np.ndarray) -> None:
    """Draw labels (C, Y, X) into a picture: borders in full colour, the inside as a tint."""
    if target.instances is not None:
        _tint(picture, label[0], _scattered(label[0]) % len(colours), colours)
    elif target.kind == "multiclass":
        _tint(picture, label[0], np.maximum(label[0].astype(np.int64) - 1, 0) % len(colours), colours)
    else:
        for number, plane in enumerate(label):
            mask = (plane != 0).astype(np.uint8)
            _tint(picture, mask, np.full(mask.shape, number % len(colours)), colours)


def _tint(picture: np.ndarray, numbers: np.ndarray, picks: np.ndarray, colours: np.ndarray) -> None:
    edge = _edges(numbers) & (numbers != 0)
    inside = (numbers != 0) & ~edge
    picture[inside] = 0.7 * picture[inside] + 0.3 * colours[picks[inside]]
    picture[edge] = colours[picks[edge]]


def _scattered(numbers: np.ndarray) -> np.ndarray:
    """Hash instance numbers, so that neighbours, which often have consecutive numbers, get different colours."""
    return (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64)


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Return the pixels beside a pixel with another number."""
    edge = np.zeros(numbers.shape, bool)
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _fitting(shape: Sequence[int], step: Sequence[float], size: int) -> tuple[int, int]:
    """Return height and width of a plane in pixels, the longer one `size`, in the proportions of the spacing."""
    extent = [length * width for length, width in zip(shape, step)]
    height, width = (max(1, round(side * size / max(extent))) for side in extent)
    return height, width


def _repeated(length: int, pixels: int) -> np.ndarray:
    """Return the voxel of each pixel along an axis that is enlarged; every voxel if the axis is reduced."""
    pixels = max(pixels, length)
    return np.arange(pixels) * length // pixels


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(picture.astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(image)


def target_colours(targets: Mapping[str, Target]) -> dict[str, np.ndarray]:
    """Return the colours of each target, (n, 3): one, or one per class, or seven to distinguish instances."""
    colours, used = {}, 0
    for name, target in targets.items():
        classes = target.out_channels - (target.kind == "multiclass")
        count = len(_COLOURS) if target.instances is not None else max(1, classes)
        start = 0 if target.instances is not None else used
        colours[name] = _COLOURS[[(start + number) % len(_COLOURS) for number in range(count)]]
        used += count if target.instances is None else 0
    return colours


def _legend(targets: Mapping[str, Target], colours: Mapping[str, np.ndarray]) -> list[tuple[str, Any]]:
    entries = []
    for name, target in targets.items():
        if target.instances is not None:
            entries.append((f"{name}: instances", colours[name][0]))
        elif target.kind == "multiclass":
            names = _class_names(target)
            entries += [(f"{name}: {label}", colour) for label, colour in zip(names, colours[name])]
        elif target.kind == "multilabel":
            names = target.classes or tuple(f"channel {number}" for number in range(target.out_channels))
            entries += [(f"{name}: {label}", colour) for label, colour in zip(names, colours[name])]
        else:
            entries.append((name, colours[name][0]))
    return entries


def _class_names(target: Target) -> Sequence[str]:
    given = target.classes or ()
    if len(given) == target.out_channels:
        return given[1:]
    return given or tuple(str(number) for number in range(1, target.out_channels))


def _arrange(
    tiles: Sequence[tuple[str, np.ndarray]], legend: Sequence[tuple[str, Any]], tile: int, per_row: int
) -> Any:
    """Arrange the pictures in rows, each as high as its highest picture, with the legend below."""
    from PIL import Image, ImageDraw

    rows = [tiles[start : start + per_row] for start in range(0, len(tiles), per_row)]
    heights = [max(picture.shape[0] for _, picture in row) + _CAPTION + _GAP for row in rows]
    width = min(per_row, len(tiles)) * (tile + _GAP) + _GAP
    tiles = [(drawable(caption), picture) for caption, picture in tiles]
    legend = [(drawable(text), colour) for text, colour in legend]
    font = picture_font(_LETTERS)
    lines = _legend_lines(legend, width, font)
    sheet = Image.new("RGB", (width, sum(heights) + _GAP + _CAPTION * len(lines) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for row, height in zip(rows, heights):
        for column, (caption, picture) in enumerate(row):
            left = _GAP + column * (tile + _GAP)
            draw.text((left, top), _shorten(caption, tile, font), fill=_TEXT, font=font)
            sheet.paste(Image.fromarray(picture), (left, top + _CAPTION))
        top += height
    for line in lines:
        left = _GAP
        for text, colour in line:
            draw.rectangle((left, top + 3, left + 10, top + 13), fill=tuple(int(value) for value in colour))
            draw.text((left + _GAP + 6, top), text, fill=_TEXT, font=font)
            left += _legend_width(text, font)
        top += _CAPTION
    return sheet


def _legend_width(text: str, font: Any) -> int:
    return _GAP + 6 + math.ceil(font.getlength(text)) + 2 * _GAP


def _legend_lines(legend: Sequence[tuple[str, Any]], width: int, font: Any) -> list[list[tuple[str, Any]]]:
    lines: list[list[tuple[str, Any]]] = [[]]
    left = _GAP
    for text, colour in legend:
        needed = _legend_width(text, font)
        if left + needed > width and lines[-1]:
            lines.append([])
            left = _GAP
        lines[-1].append((text, colour))
        left += needed
    return lines


def _shorten(text: str, width: int, font: Any) -> str:
    """Omit the middle of a caption that is too wide, since the start of the name and the plane identify the view."""
    if font.getlength(text) <= width:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while head and font.getlength(f"{head}...{tail}") > width:
        head, tail = (head[:-1], tail) if len(head) >= len(tail) else (head, tail[1:])
    return f"{head}...{tail}"
