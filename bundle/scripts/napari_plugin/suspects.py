"""Opens the suspect labels of an evaluation: napari --plugin volumen REPORT/suspects.csv."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from volumen.evaluation.diagnostics.suspect_files import MARK, NAME, suspect_volumes

LayerData = tuple[Any, dict[str, Any], str]
_COLOURS = {"missing_label": "#d55e00", "wrong_label": "#0072b2"}
_POINT_VOXELS = 8


def suspects_reader(path: str | Sequence[str]) -> Callable[[Any], list[LayerData]] | None:
    """Return what reads a `suspects.csv` that `volumen evaluate` wrote, None for any other path.

    Args:
        path: a file, or several, as napari gives them.
    """
    given = Path(path if isinstance(path, str) else path[0])
    ours = given.name == NAME and (isinstance(path, str) or len(path) == 1)
    return (lambda _: suspect_layers(given)) if ours and given.is_file() else None


def suspect_layers(path: Path) -> list[LayerData]:
    """Return the suspects as layer tuples: per case, target and class numbered labels, and a point in each.

    The layers lie where the label lies: their scale and translation are those of its file. A report without suspects
    has no layers.

    Args:
        path: the `suspects.csv` of a report; the volumes lie in `suspects/` beside it.
    """
    layers: list[LayerData] = []
    for folder, group in suspect_volumes(path.parent / "suspects"):
        named = group.attrs[MARK]
        name = " ".join(part for part in (named["case"], named["target"], named["class"]) if part)
        placed = _placed(group)
        layers.append((group["0"], {"name": f"{name} suspects", "opacity": 0.5, **placed}, "labels"))
        layers.append(_points(folder.with_suffix(".csv"), f"{name} suspect points", placed))
    return layers


def _placed(group: Any) -> dict[str, Any]:
    """Return scale, translation and units of a volume as napari takes them."""
    multiscale = group.attrs["ome"]["multiscales"][0]
    steps = multiscale["datasets"][0]["coordinateTransformations"]
    by_type = {step["type"]: step[step["type"]] for step in steps}
    units = [axis.get("unit") for axis in multiscale["axes"]]
    placed = {"scale": by_type["scale"]}
    if "translation" in by_type:
        placed["translate"] = by_type["translation"]
    return {**placed, "units": units} if all(units) else placed


def _points(path: Path, name: str, placed: dict[str, Any]) -> LayerData:
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    axes = [key for key in rows[0] if key.startswith("axis-")]
    kinds = [row["kind"] for row in rows]
    features = {
        "number": [int(row["number"]) for row in rows],
        "kind": kinds,
        "reason": [row["reason"] for row in rows],
        "score": [float(row["score"]) for row in rows],
        "voxels": [int(row["voxels"]) for row in rows],
    }
    options = {
        "name": name,
        "features": features,
        "face_color": [_COLOURS[kind] for kind in kinds],
        "text": "number",
        "size": _POINT_VOXELS,
        "out_of_slice_display": True,
        **placed,
    }
    return [[float(row[axis]) for axis in axes] for row in rows], options, "points"
