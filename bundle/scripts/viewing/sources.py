"""Finds what there is to show: of a volume, a prediction, a run, or the worst case of a report."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Volume
from volumen.data.joining import discover_all
from volumen.data.layout import open_cases
from volumen.evaluation.cases import ScoredCase
from volumen.evaluation.pairing import find_cases
from volumen.evaluation.request import EvaluateRequest
from volumen.inference.output.block_log import STATE_FOLDER, read_provenance
from volumen.inference.windows.heads import PROBABILITIES
from volumen.utils.errors import VolumenError
from volumen.viewing.layers import ErrorVolume, View, ViewLayer, layer_of

logger = logging.getLogger(__name__)

_METRICS, _RECORD, _SPLIT, _CONFIG = "metrics.json", ".volumen.json", "_split.json", "_config.yaml"


def find_view(
    paths: Sequence[str], *, labels: Sequence[str] = (), case: str | None = None, level: int = 0
) -> View:
    """Return what is shown of some paths.

    Args:
        paths: volumes, outputs of `volumen predict`, a folder of a run, or a report of `volumen evaluate`.
        labels: volumes that are shown as label maps; the truth, where a prediction is shown.
        case: name of the image, where a path has several; None: the worst of a report, else the first.
        level: level of images.

    Raises:
        VolumenError: nothing there can be shown; names the path.
    """
    views = [_view_of(path, labels, case, level) for path in paths]
    layers = [layer for view in views for layer in view.layers]
    first = layers[0].levels[0]
    for path in labels:
        volume = open_volume(path, ndim=len(first.shape), labels=True)
        layers.append(layer_of(Path(path).name, volume, "labels", first))
    names: dict[str, int] = {}
    unique = []
    for layer in layers:
        names[layer.name] = names.get(layer.name, 0) + 1
        number = names[layer.name]
        unique.append(
            layer if number == 1 else ViewLayer(**{**layer.__dict__, "name": f"{layer.name} {number}"})
        )
    position = next((view.position for view in views if view.position is not None), None)
    return View(tuple(unique), position, ", ".join(view.title for view in views))


def _view_of(path: str, labels: Sequence[str], case: str | None, level: int) -> View:
    place = Path(path)
    if "://" not in path and not place.exists() and ":/" not in path:
        raise VolumenError(path, "no such file or folder", remedy="check the path")
    if (place / _METRICS).is_file():
        return _of_report(place, case)
    if _is_prediction(place):
        return _of_prediction(path, case)
    if place.is_dir() and (run := next(iter(sorted(place.glob(f"*{_CONFIG}"))), None)) is not None:
        return _of_run(run, case)
    volume = open_volume(path, level=level)
    return View((layer_of(place.name, volume, "image"),), None, path)


def _is_prediction(path: Path) -> bool:
    if path.name.endswith(_RECORD) or read_provenance(path) is not None or (path / STATE_FOLDER).is_dir():
        return True
    if path.is_dir() and any(path.glob(f"*{_RECORD}")):
        return True
    return path.is_dir() and any(
        read_provenance(inner) is not None for inner in path.iterdir() if inner.is_dir()
    )


def _of_prediction(path: str, case: str | None) -> View:
    """Return the image, all outputs, and, of a dataset with labels, the truth and the errors."""
    place = Path(path)
    outputs = _outputs(place)
    names = list(dict.fromkeys(name for name, *_ in outputs))
    chosen = names[0] if case is None else case
    outputs = [entry for entry in outputs if entry[0] == chosen]
    if not outputs:
        raise VolumenError(path, expected=f"an image: {', '.join(names)}", found=chosen)
    recipe = outputs[0][3]
    layers = _image_layers(recipe["input"]["path"], int(recipe["input"].get("level") or 0))
    first = layers[0].levels[0] if layers else open_volume(outputs[0][2])
    for _, target, file, _ in outputs:
        entry = recipe["targets"].get(target, {})
        layers.append(
            layer_of(
                target,
                open_volume(file, ndim=len(first.shape)),
                _kind(target, entry, recipe),
                first,
                visible=entry.get("activation", "none") != "none" or len(outputs) == 1,
            )
        )
    return View((*layers, *_truth_of(place, recipe, chosen, first)), None, f"{chosen} of {path}")


def _outputs(place: Path) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """Return name of the image, target, path and record of every output, also of those without a truth."""
    from volumen.inference.jobs import volume_name
    from volumen.inference.output.ome_zarr import find_target

    recipe = read_provenance(place)
    if recipe is not None:
        name = volume_name(recipe["input"]["path"])
        return [(name, target, str(find_target(place, target)), recipe) for target in recipe["targets"]]
    if place.name.endswith(_RECORD):
        content = json.loads(place.read_text())
        name = place.name.removesuffix(_RECORD)
        files = zip(content["recipe"]["targets"], content["files"], strict=True)
        return [(name, target, str(place.parent / file), content["recipe"]) for target, file in files]
    if (place / STATE_FOLDER).is_dir():
        raise VolumenError(
            place, "the prediction is not finished", remedy="give the same volumen predict command again"
        )
    inside = [*sorted(place.glob(f"*{_RECORD}")), *sorted(p for p in place.iterdir() if p.is_dir())]
    found = [_outputs(p) for p in inside if p.name.endswith(_RECORD) or read_provenance(p) is not None]
    return [entry for entries in found for entry in entries]


def _image_layers(path: str, level: int) -> list[ViewLayer]:
    """Return the layer of a predicted image; none, with a warning, where it lies elsewhere now."""
    try:
        return [layer_of("image", open_volume(path, level=level), "image")]
    except VolumenError as error:
        logger.warning("the predicted image is not shown: %s", error)
        return []


def _kind(target: str, entry: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    kind = str(entry.get("kind", "field"))
    if kind == "instances" or target.endswith("_instances"):
        return "instances"
    is_map = kind in PROBABILITIES and (
        recipe.get("dtype") == "labels" or recipe.get("threshold") is not None
    )
    return "labels" if is_map and entry.get("channels", 1) >= 1 and entry.get("dtype") == "uint8" else kind


def _truth_of(place: Path, recipe: Mapping[str, Any], name: str, first: Volume) -> list[ViewLayer]:
    """Return truth and errors of a prediction of an image in the `images` folder of a dataset."""
    image = Path(str(recipe["input"]["path"]))
    folder = next((parent for parent in image.parents if parent.name == "images"), None)
    if folder is None or not (folder.parent / "labels").is_dir():
        return []
    # A record stands for the files beside it, of which those of this image are chosen below.
    predictions = str(place.parent if place.name.endswith(_RECORD) else place)
    try:
        cases = find_cases(EvaluateRequest(predictions, str(folder.parent), predictions))
    except VolumenError as error:
        logger.info("no truth is shown: %s", error)
        return []
    threshold = recipe.get("threshold") or 0.5
    layers: list[ViewLayer] = []
    for case in (case for case in cases if case.name == name):
        layers += _case_layers(case, first, threshold)
    return layers


def _case_layers(case: ScoredCase, first: Volume, threshold: float) -> list[ViewLayer]:
    if case.truth is not None or case.kind not in (*PROBABILITIES, "instances"):
        return []
    layers = [layer_of(f"{case.target} truth", case.label, "labels", first, visible=False, coarser=())]
    if case.kind != "instances":
        errors = ErrorVolume(case, threshold)
        layers.append(layer_of(f"{case.target} errors", errors, "errors", first, coarser=()))
    return layers


def _of_report(report: Path, name: str | None) -> View:
    """Return a case of a report, by default the one with the lowest score, at its worst place."""
    content = json.loads((report / _METRICS).read_text())
    settings, rows = content["settings"], content["cases"]
    if "predictions" not in settings or not rows:
        raise VolumenError(report, expected="a report of volumen evaluate of one model", found="none")
    key = next(
        (key for key in content["mean"] if key.endswith("/dice")),
        next(iter(content["mean"]), None),
    )
    scores = {case: row.get(key) for case, row in rows.items()}
    chosen = name or min(scores, key=lambda case: (scores[case] is None, scores[case] or 0.0))
    if chosen not in rows:
        raise VolumenError(report, expected=f"a case: {', '.join(rows)}", found=chosen)
    cases = [
        case
        for case in find_cases(EvaluateRequest(settings["predictions"], settings["labels"], str(report)))
        if case.name == chosen
    ]
    if not cases:
        raise VolumenError(settings["predictions"], expected=f"a prediction of {chosen}", found="none")
    layers = _image_layers(cases[0].image, 0) if cases[0].image else []
    first = layers[0].levels[0] if layers else cases[0].prediction
    recipe = {"dtype": "labels" if not cases[0].scale else "", "threshold": settings.get("threshold")}
    for case in cases:
        is_map = not case.scale and case.kind in PROBABILITIES
        kind = "labels" if is_map else case.kind
        layers.append(layer_of(case.target, case.prediction, kind, first, coarser=()))
        layers += _case_layers(case, first, float(recipe["threshold"] or 0.5))
    position = _worst_place(report, chosen)
    if position is not None:
        start = layers[1].start if len(layers) > 1 else (0,) * len(position)
        position = tuple(a + b for a, b in zip(position[-len(start) :], start, strict=True))
    score = scores[chosen]
    shown = "" if score is None else f", {key} {score:.3f}"
    return View(tuple(layers), position, f"{chosen} of {report}{shown}")


def _worst_place(report: Path, case: str) -> tuple[int, ...] | None:
    """Return the voxel of the first error of a case that a table of the report lists."""
    for table in ("topology.csv", "objects.csv"):
        if not (report / table).is_file():
            continue
        with (report / table).open(newline="") as stream:
            for row in csv.DictReader(stream):
                if row["case"] == case and row["place_y"]:
                    return tuple(int(row[f"place_{axis}"] or 0) for axis in "zyx")
    return None


def _of_run(config: Path, name: str | None) -> View:
    """Return an image of a run's data with its labels and masks, by default the first that validates."""
    import yaml

    sections = yaml.safe_load(config.read_text())
    data = sections["dataset_config"]["data_path"]
    layout = discover_all([data] if isinstance(data, str) else data, allow_unlabeled=True)
    split = config.with_name(config.name.removesuffix(_CONFIG) + _SPLIT)
    names = [case.name for case in layout.cases]
    validates = list(json.loads(split.read_text()).get("val", {})) if split.is_file() else []
    chosen = name or next((name for name in validates if name in names), names[0])
    found = [case for case in layout.cases if case.name == chosen]
    if not found:
        raise VolumenError(config, expected=f"an image: {', '.join(names)}", found=chosen)
    (case,) = open_cases(replace(layout, cases=tuple(found)))
    layers = [layer_of("image", case.image, "image")]
    for target, label in case.labels.items():
        layers.append(layer_of(target, label, "labels", case.image, coarser=()))
    for target, mask in case.masks.items():
        layers.append(layer_of(f"{target} mask", mask, "labels", case.image, visible=False, coarser=()))
    return View(tuple(layers), None, f"{chosen} of {config.parent}")
