"""The record of suggestions: `suggestions.json` for programs, `suggestions.csv` for people and viewers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from volumen.utils.boxes import Box, box_extent
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

RECORD, TABLE, OVERVIEW = "suggestions.json", "suggestions.csv", "overview.png"
BOXES, PREDICTIONS, TABLES = "boxes", "predictions", "tables"
IMAGE, UNCERTAINTY, DONE = "image", "uncertainty", "done"
"""Names in the folder of a box: the image, the entropy, and the empty file that marks it as painted."""
VERSION = 1


@dataclass(frozen=True)
class SuggestedBox:
    """A suggested box.

    Args:
        rank: from 1.
        volume: name of the image.
        target: target for which it was drawn.
        box: in voxels of the stored image.
        reason: why, in words.
        entropy: mean entropy over the targets, 0 to 1.
        shares: predicted share of the box by target and class, such as {"ink": {"ink": 0.1}}.
        folder: name of its folder in `boxes/`.
    """

    rank: int
    volume: str
    target: str
    box: Box
    reason: str
    entropy: float
    shares: Mapping[str, Mapping[str, float]]
    folder: str

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> SuggestedBox:
        """Return the box of a record."""
        box = tuple((int(start), int(stop)) for start, stop in values["box"])
        return cls(**{**values, "box": box})


@dataclass(frozen=True)
class Suggestions:
    """The content of `suggestions.json`.

    Args:
        asked: the request, without what does not change the result.
        boxes: in the order of their ranks.
        targets: by name, the fields of its `LabelForm`, and `classes` and `kind`.
        how: how the images are opened: `axes`, `level`, `labelled_only`.
        shapes: shape of each image by name.
        geometry: plain geometry of each image by name; see `Geometry.plain`.
    """

    asked: Mapping[str, Any]
    boxes: tuple[SuggestedBox, ...]
    targets: Mapping[str, Mapping[str, Any]]
    how: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    geometry: Mapping[str, Mapping[str, Any]]


def write_record(folder: Path, found: Suggestions) -> None:
    """Write `suggestions.csv`, and `suggestions.json` last: with it, the suggestions are complete."""
    write_atomically(folder / TABLE, _csv_of(found).encode())
    content = {"volumen_suggestions": VERSION, **asdict(found)}
    write_atomically(folder / RECORD, json.dumps(content, indent=1).encode())


def read_record(folder: Path) -> Suggestions:
    """Read `suggestions.json`.

    Raises:
        VolumenError: the folder has none, or it is unreadable.
    """
    path = folder / RECORD
    if not path.is_file():
        raise VolumenError(
            folder, expected=f"a folder of volumen suggest, with {RECORD}", found="none",
            remedy="give the -o of a finished volumen suggest",
        )  # fmt: skip
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("volumen_suggestions") != VERSION:
            raise ValueError("another version")
        boxes = tuple(SuggestedBox.from_plain(box) for box in content.pop("boxes"))
        return Suggestions(boxes=boxes, **content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolumenError(
            path, f"cannot be read ({error})", remedy="suggest again with another -o"
        ) from None


def _csv_of(found: Suggestions) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    first = next(iter(found.shapes.values()), ())
    axes = "zyx"[-len(first) :] if first else ""
    places = [f"{kind}_{axis}" for kind in ("first", "last", "place", "extent") for axis in axes]
    classes = [(target, name) for target, entry in found.targets.items() for name in entry["classes"]]
    table.writerow(
        ["rank", "volume", "target", *places, "unit", "entropy"]
        + [f"share {target}" if target == name else f"share {target} {name}" for target, name in classes]
        + ["reason", "folder"]
    )
    for box in found.boxes:
        geometry = found.geometry[box.volume]
        spacing = geometry["spacing"] or [1.0] * len(box.box)
        origin = (
            geometry["origin"] if geometry["frame"] == "grid" and geometry["origin"] else [0.0] * len(box.box)
        )
        place = [o + start * step for o, (start, _), step in zip(origin, box.box, spacing, strict=True)]
        extent = [side * step for side, step in zip(box_extent(box.box), spacing, strict=True)]
        table.writerow(
            [box.rank, box.volume, box.target]
            + [start for start, _ in box.box]
            + [stop - 1 for _, stop in box.box]
            + [f"{value:.10g}" for value in (*place, *extent)]
            + [geometry["unit"] or "", f"{box.entropy:.4f}"]
            + [f"{box.shares[target][name]:.4f}" for target, name in classes]
            + [box.reason, f"{BOXES}/{box.folder}"]
        )
    return text.getvalue()
