"""Where errors are as CSV: wrong objects, and windows with errors of topology, with boxes in voxels and in length."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from volumen.evaluation.cases import Details, Scale

Behind = Mapping[str, Mapping[str, Mapping[str, Details]]]
"""Case to target to class to details."""
_ENDS = [f"{end}_{axis}" for end in ("low", "high", "place") for axis in "zyx"]


def objects_csv(details: Behind, scales: Mapping[str, Scale]) -> str:
    """Return the wrong objects of all cases as CSV, a row each.

    Args:
        details: case to target to class to details.
        scales: case to what turns its voxels into lengths.
    """
    head = ["error", "number", "voxels", "wrong", *_heads(), "parts"]
    rows = []
    for where, found in _classes(details):
        for row in found["objects"]:
            values = [row[key] for key in ("error", "number", "voxels", "wrong")]
            parts = " ".join(map(str, row["parts"]))
            rows.append([*where, *values, *_box(row, scales.get(where[0], Scale())), parts])
    return _csv(["case", "target", "class", *head], rows)


def topology_csv(details: Behind, scales: Mapping[str, Scale]) -> str:
    """Return the windows with errors of topology of all cases as CSV, the worst of each class first.

    Errors are prediction minus truth: an error of b0 below 0 is a bridge, above 0 a gap or an object of its own.

    Args:
        details: case to target to class to details.
        scales: case to what turns its voxels into lengths.
    """
    counts = [f"b{k}_{side}" for side in ("error", "prediction", "truth") for k in range(3)]
    rows = []
    for where, found in _classes(details):
        for side, windows in found.get("windows", {}).items():
            for row in windows:
                errors = betti_errors(row)
                scale = scales.get(where[0], Scale())
                rows.append([*where, side, *errors, *row["prediction"], *row["truth"], *_box(row, scale)])
    return _csv(["case", "target", "class", "window", *counts, *_heads()], rows)


def betti_errors(window: Details) -> list[int]:
    """Return the errors of b0, b1 and b2 of a window, prediction minus truth."""
    return [a - b for a, b in zip(window["prediction"], window["truth"], strict=True)]


def _classes(details: Behind) -> Iterator[tuple[tuple[str, str, str], Details]]:
    for name, targets in details.items():
        for target, classes in targets.items():
            for label, found in classes.items():
                yield (name, target, label), found


def _heads() -> list[str]:
    """Return the names of the columns of a box: voxels, then lengths and their unit."""
    return [*_ENDS, *(f"{end}_length" for end in _ENDS), "unit"]


def _box(row: Details, scale: Scale) -> list[str]:
    ends = [row["low"], row["high"], row["place"]]
    voxels: list[str] = []
    for end in ends:
        values = ["", "", ""] if end is None else list(map(str, end))
        voxels += [""] * (3 - len(values)) + values
    lengths = [value for end in ends for value in scale.lengths(end)]
    return [*voxels, *lengths, scale.unit if scale.spacing else ""]


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(head)
    table.writerows(rows)
    return text.getvalue()
