"""A picture of every volume with its labels over it, so that a wrong axis, spacing or label shows at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.data.layout import OpenCase
from scripts.errors import VolumenError

if TYPE_CHECKING:
    from scripts.config import ConfigManager
    from scripts.targets import Target

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
_GAP, _CAPTION = 10, 18
# A wider plane is shown in part, where the labels are: its chunks would take minutes to decode.
_WINDOW = 1024
_UNKNOWN_DIMMED = 0.4


@dataclass(frozen=True)
class View:
    """A plane of a volume.

    Args:
        region: slices of the volume, one of them a single voxel thick for 3D volumes.
        caption: what it shows.
        step: voxel size along its rows and columns.
        cut: the axis that is one voxel thick, None in 2D.
    """

    region: tuple[slice, ...]
    caption: str
    step: tuple[float, float]
    cut: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns in voxels."""
        return tuple(part.stop - part.start for axis, part in enumerate(self.region) if axis != self.cut)


def write_sheet(config: ConfigManager, path: Path, *, most: int = 24, tile: int = 320) -> Path:
    """Write a contact sheet: planes of each volume with the labels over the image, and a legend.

    Of a 3D volume the XY and the XZ plane with most labels are shown, in the proportions of the spacing. What is
    outside every mask, or ignored, is dimmed.

    Args:
        config: the experiment.
        path: a PNG to write.
        most: volumes shown.
        tile: width and height of a picture in pixels, at most.

    Returns:
        The path.

    Raises:
        VolumenError: the file exists and is not a PNG, or cannot be written.
    """
    if path.exists() and path.suffix.lower() != ".png":
        raise VolumenError("--sheet", expected="a .png file", found=str(path))
    targets = config.primary_targets
    colours = target_colours(targets)
    tiles = [
        (f"{case.name}  {view.caption}", draw_view(case, view, targets, colours, tile))
        for case in config.cases[:most]
        for view in views(case, config.labelled_profiles.get(case.name, {}))
    ]
    sheet = _arrange(tiles, _legend(targets, colours), tile, per_row=6 if config.spatial_dims == 3 else 5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise VolumenError(path, f"cannot be written ({error})", remedy="choose another --sheet") from None
    return path


def views(case: OpenCase, profiles: Mapping[str, Sequence[np.ndarray]]) -> list[View]:
    """Choose what is shown of a volume: the planes with most labels, at most `_WINDOW` voxels wide.

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
        planes = {0: "xy", 1: "xz"}[axis]
        step = (case.spacing[rows], case.spacing[columns])
        chosen.append(View(tuple(region), f"{planes} at {name} {at}", step, axis))
    # The second plane of a few slices shows nothing.
    return chosen if shape[0] > 4 else chosen[:1]


def _densest(count: np.ndarray, width: int) -> slice:
    """The window of a width that holds most; the middle one of equals."""
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
    plane = view.shape
    picture = _grey(case.image.read(view.region).reshape(case.image.channels, *plane))
    known = np.zeros(plane, bool)
    any_label = False
    for name, target in targets.items():
        if name not in case.labels:
            continue
        any_label = True
        label = case.labels[name].read(view.region).reshape(-1, *plane)
        sure = np.ones(plane, bool)
        if name in case.masks:
            sure = case.masks[name].read(view.region).reshape(plane) > 0
        if target.ignore_label is not None:
            ignored = (label == target.ignore_label).any(axis=0)
            sure, label = sure & ~ignored, np.where(ignored, 0, label)
        known |= sure
        _overlay(picture, label, target, colours[name])
    if any_label:
        picture[~known] *= _UNKNOWN_DIMMED
    return _fit(picture, view.step, size)


def _grey(image: np.ndarray) -> np.ndarray:
    """Stretch an image (C, Y, X) to float32 (Y, X, 3) from 0 to 255: of three channels a hint of their colours."""
    channels = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    values = np.nan_to_num(channels.astype(np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, (0.5, 99.5))
    picture = np.clip((values - low) / max(high - low, 1e-6), 0, 1).transpose(1, 2, 0) * np.float32(255)
    # Full colours would hide those of the labels.
    return 0.3 * picture + 0.7 * picture.mean(axis=2, keepdims=True)


def _overlay(picture: np.ndarray, label: np.ndarray, target: Target, colours: np.ndarray) -> None:
    """Draw labels (C, Y, X) into a picture: their borders in full colour, their inside as a tint."""
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
    """Hash instance numbers, so that those of neighbours, which are often next to each other, get far apart."""
    return (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64)


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Pixels beside one of another number."""
    edge = np.zeros(numbers.shape, bool)
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _fit(picture: np.ndarray, step: tuple[float, float], size: int) -> np.ndarray:
    from PIL import Image

    extent = [length * width for length, width in zip(picture.shape[:2], step)]
    scale = size / max(extent)
    height, width = (max(1, round(side * scale)) for side in extent)
    grows = height >= picture.shape[0] and width >= picture.shape[1]
    resized = Image.fromarray(picture.astype(np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST if grows else Image.Resampling.BOX
    )
    return np.asarray(resized)


def target_colours(targets: Mapping[str, Target]) -> dict[str, np.ndarray]:
    """Return the colours of each target, (n, 3): one, or one for each class, or seven to tell instances apart."""
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
    """Put the pictures into rows, each row as high as its highest picture, and the legend below."""
    from PIL import Image, ImageDraw

    rows = [tiles[start : start + per_row] for start in range(0, len(tiles), per_row)]
    heights = [max(picture.shape[0] for _, picture in row) + _CAPTION + _GAP for row in rows]
    width = min(per_row, len(tiles)) * (tile + _GAP) + _GAP
    lines = _legend_lines(legend, width)
    sheet = Image.new("RGB", (width, sum(heights) + _GAP + _CAPTION * len(lines) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for row, height in zip(rows, heights):
        for column, (caption, picture) in enumerate(row):
            left = _GAP + column * (tile + _GAP)
            draw.text((left, top), _shorten(draw, caption, tile), fill=_TEXT)
            sheet.paste(Image.fromarray(picture), (left, top + _CAPTION))
        top += height
    for line in lines:
        left = _GAP
        for text, colour in line:
            draw.rectangle((left, top + 2, left + 10, top + 12), fill=tuple(int(value) for value in colour))
            draw.text((left + 16, top), text, fill=_TEXT)
            left += 16 + 7 * len(text) + 14
        top += _CAPTION
    return sheet


def _legend_lines(legend: Sequence[tuple[str, Any]], width: int) -> list[list[tuple[str, Any]]]:
    lines: list[list[tuple[str, Any]]] = [[]]
    left = _GAP
    for text, colour in legend:
        needed = 16 + 7 * len(text) + 14
        if left + needed > width and lines[-1]:
            lines.append([])
            left = _GAP
        lines[-1].append((text, colour))
        left += needed
    return lines


def _shorten(draw: Any, text: str, width: int) -> str:
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
