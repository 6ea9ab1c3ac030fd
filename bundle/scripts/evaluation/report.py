"""The HTML report of an evaluation: one file, no network, tables and pictures of the worst cases."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from volumen.evaluation.curves import MOST_THIN, single_figures
from volumen.evaluation.pages import render_page
from volumen.evaluation.report_drawing import (
    COLOURS,
    RAMP,
    ColourBar,
    draw_scale_bar,
    in_columns,
    ramp_colours,
)
from volumen.inference.windows.heads import PROBABILITIES
from volumen.metrics.score_names import direction_of, score_of, smaller_is_better
from volumen.metrics.units import length_unit, metric_unit, short_unit
from volumen.utils.errors import VolumenError
from volumen.version import __version__

if TYPE_CHECKING:
    from volumen.evaluation.cases import Evaluation, ScoredCase

logger = logging.getLogger(__name__)

PICTURE_SIDE = 480
LISTED = 5
"""Wrong objects of each kind in the table of a case, target and class."""
MOST_ANGLE = 90.0
"""Angular error in degrees at the upper end of the colour bar."""
_LEGEND = {
    "label": "; darker where nothing is known.",
    "instances": "Left the truth, right the prediction; an instance has one colour in each.",
    "value": "Left the image, right the error; black where nothing is known.",
}
_OVERLAP_COLOURS = (("both", "found"), ("missed", "missed"), ("false", "predicted, not there"))
MOST_COLUMNS = 7


def render_report(evaluation: Evaluation, *, worst: int = 3) -> str:
    """Return the report as one HTML page.

    Args:
        evaluation: the scores.
        worst: cases with a picture per target, the worst first.
    """
    return render_page(
        "report.html",
        title=f"Evaluation of {', '.join(_models(evaluation)) or 'predictions'}",
        facts=_facts(evaluation),
        missing=_missing(evaluation),
        means=_means(evaluation),
        cost=_cost(evaluation),
        curves=single_figures(evaluation.histograms, evaluation.settings["threshold"]),
        most_thin=MOST_THIN,
        case_tables=_case_tables(evaluation),
        several_cases=len(evaluation.cases) > 1,
        objects=_wrong_objects(evaluation),
        listed=LISTED,
        pictures=_pictures(evaluation, worst),
        ramp=", ".join(f"rgb{colour}" for colour in RAMP),
    )


def _missing(evaluation: Evaluation) -> list[tuple[str, Sequence[str]]]:
    """Name what entered no mean."""
    return [
        (what, names)
        for what, names in (
            ("Labels without a prediction, which are not scored", evaluation.unpredicted),
            ("Predictions without a label, which are not scored", evaluation.unlabelled),
        )
        if names
    ]


def _models(evaluation: Evaluation) -> list[str]:
    """Return which models made the predictions, as their records say."""
    return sorted({case.model for case in evaluation.scored if case.model})


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    """Return what was scored, by what, and when."""
    facts = {
        "model": ", ".join(_models(evaluation)) or "not recorded with the predictions",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "scored": evaluation.coverage,
        **evaluation.settings,
        "volumen": __version__,
    }
    return {name: value for name, value in facts.items() if value not in (None, [], ())}


def _means(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a row for the mean of each metric over the cases."""
    rows = []
    for key, value in evaluation.mean.items():
        bounds = evaluation.interval[key]
        count = sum(not math.isnan(row.get(key, math.nan)) for row in evaluation.cases.values())
        rows.append(
            {
                "key": key,
                "value": number(value),
                "interval": f"{number(bounds[0])} to {number(bounds[1])}" if bounds else "–",
                "bar": _bar(key, value, bounds),
                "cases": "" if key == "mean_dice" else str(count),
                "better": direction(key, unit_of(key, evaluation)),
            }
        )
    return rows


def _cost(evaluation: Evaluation) -> str:
    """Return what the scores took."""
    if not evaluation.seconds:
        return ""
    parts = sorted(evaluation.seconds.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{part} {cost:.1f}" for part, cost in parts)
    return f"Scoring took {sum(evaluation.seconds.values()):.1f} CPU seconds: {listed}."


def _metric(key: str) -> str:
    return key if key == "mean_dice" else key.split("/")[1]


def direction(key: str, unit: str = "") -> str:
    """Return which way a metric is better, and its unit where it has one."""
    smaller = direction_of(key)
    word = "" if smaller is None else "smaller" if smaller else "larger"
    return "; ".join(part for part in (word, unit) if part)


def unit_of(key: str, evaluation: Evaluation) -> str:
    """Return the unit of a metric: that of the volumes for lengths, "" for shares."""
    case = next((case for case in evaluation.scored if case.target == key.split("/")[0]), None)
    if case is None:
        return ""
    return metric_unit(
        _metric(key), case.kind, short_unit(_length_unit(case, evaluation.settings.get("spacing")))
    )


def _length_unit(case: ScoredCase, spacing: Sequence[float] | None) -> str | None:
    """Return the unit of lengths of a case; None where they count voxels."""
    return length_unit(case.prediction.unit or case.label.unit, spacing)


def _bar(key: str, value: float, bounds: tuple[float, float] | None) -> dict[str, str] | None:
    """Return the places of a bar from 0 to 1, in percent, for metrics that have this range; None for others."""
    score = score_of(_metric(key))
    if (score is not None and score.top != 1) or math.isnan(value):
        return None
    low, high = bounds or (value, value)
    return {
        "left": f"{100 * low:.1f}",
        "width": f"{100 * (high - low):.1f}",
        "mean": f"{min(100 * value, 99):.1f}",
    }


def _case_tables(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """Return tables of the cases for every target, each narrow enough for a page of 1,000 pixels."""
    keys = [key for key in evaluation.mean if key != "mean_dice"]
    tables = {}
    for target in dict.fromkeys(key.split("/")[0] for key in keys):
        of_target = [key for key in keys if key.split("/")[0] == target]
        tables[target] = [
            _cases_by(evaluation, target, columns) for columns in in_columns(of_target, MOST_COLUMNS)
        ]
    return tables


def column_words(key: str, target: str) -> list[str]:
    """Return the lines of a column's head: the score, its parameter and its class."""
    return key.removeprefix(f"{target}/").replace("_", " ").replace("@", "/@").split("/")


def _cases_by(evaluation: Evaluation, target: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return one table: a row per case, a column per metric of a target."""
    worst = {key: _worst_of(evaluation, key) for key in keys}
    return {
        "columns": [
            {
                "words": column_words(key, target),
                "unit": unit_of(key, evaluation),
            }
            for key in keys
        ],
        "rows": [
            {
                "name": name,
                "cells": [
                    {"value": number(row.get(key, math.nan)), "worst": worst[key] == name} for key in keys
                ],
            }
            for name, row in evaluation.cases.items()
        ],
    }


def _wrong_objects(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the largest wrong objects of each case, target and class."""
    rows = []
    for case, targets in evaluation.details.items():
        for target, classes in targets.items():
            for label, found in classes.items():
                name = f"{target}, class {label}" if label else target
                for kind in ("merged", "broken", "missed", "added"):
                    errors = [row for row in found["objects"] if row["error"] == kind][:LISTED]
                    rows += [_object_row(case, name, row) for row in errors]
    return rows


def _object_row(case: str, target: str, row: dict[str, Any]) -> dict[str, Any]:
    first, last = (", ".join(map(str, place)) for place in (row["low"], [stop - 1 for stop in row["high"]]))
    return {
        "case": case,
        "target": target,
        "error": row["error"],
        "voxels": row["voxels"],
        "first": first,
        "last": last,
        "parts": len(row["parts"]) or "–",
    }


def _worst_of(evaluation: Evaluation, key: str) -> str | None:
    """Return the case with the worst value, None below two different values."""
    values = {
        name: row[key] for name, row in evaluation.cases.items() if not math.isnan(row.get(key, math.nan))
    }
    if len(set(values.values())) < 2 or direction_of(key) is None:
        return None
    return (max if smaller_is_better(key) else min)(values, key=lambda name: values[name])


def number(value: float) -> str:
    """Return a value as tables show it, a dash where it is undefined."""
    return "–" if math.isnan(value) else readable(value)


def readable(value: float) -> str:
    """Return a score with the digits that matter: four places for shares, two for degrees and lengths."""
    places = 4 if abs(value) < 10 else 2
    return f"{value:.{places}f}" if abs(value) < 1000 else f"{value:.5g}"


def _family(case: ScoredCase) -> str:
    return "label" if case.kind in PROBABILITIES else "instances" if case.kind == "instances" else "value"


def _leading(case: ScoredCase) -> tuple[str, str]:
    """Return the metric by which cases of a kind are ordered, and what it is called."""
    if case.kind in PROBABILITIES:
        return "dice", "Dice"
    if case.kind == "instances":
        return "adapted_rand_error", "adapted Rand error"
    return ("angular_error", "angle") if case.kind in ("vector", "axis") else ("mae", "mean error")


def _pictures(evaluation: Evaluation, worst: int) -> list[dict[str, Any]] | None:
    """Return the pictures of each target, the worst case first; None where no picture is required."""
    if worst < 1:
        return None
    groups = []
    for target in sorted({case.target for case in evaluation.scored}):
        cases = [case for case in evaluation.scored if case.target == target]
        cases.sort(key=lambda case: _badness(evaluation, case))
        family = _family(cases[0])
        named = _OVERLAP_COLOURS if family == "label" else ()
        groups.append(
            {
                "target": target,
                "colours": [(COLOURS[key], name) for key, name in named],
                "legend": _LEGEND[family],
                "pictures": [_labelled_picture(evaluation, case) for case in cases[:worst]],
            }
        )
    return groups


def _labelled_picture(evaluation: Evaluation, case: ScoredCase) -> dict[str, Any]:
    metric, called = _leading(case)
    value = evaluation.cases.get(case.name, {}).get(f"{case.target}/{metric}", math.nan)
    drawn = case_picture(case, evaluation.settings["threshold"])
    score = f"{number(value)} {metric_unit(metric, case.kind)}".strip()
    return {
        "label": f"{case.name}, {case.target}: {called} {score}; {drawn.place}",
        "png": base64.b64encode(drawn.png).decode(),
        "bar": drawn.bar,
    }


def _badness(evaluation: Evaluation, case: ScoredCase) -> float:
    """Return a number by which the worst case comes first, undefined ones last."""
    metric, _ = _leading(case)
    value = evaluation.cases.get(case.name, {}).get(f"{case.target}/{metric}", math.nan)
    if math.isnan(value):
        return math.inf
    return -value if smaller_is_better(f"{case.target}/{metric}") else value


@dataclass(frozen=True)
class Drawn:
    """A picture of a case.

    Args:
        png: the picture.
        place: which plane it shows, in which direction, and the length of its scale bar.
        bar: what its colour bar says, or None.
    """

    png: bytes
    place: str
    bar: ColourBar | None = None


def case_picture(case: ScoredCase, threshold: float) -> Drawn:
    """Return the plane of a case with the largest error, over or beside the image."""
    box, plane = _worst_plane(case, threshold)
    values, truth, known = (
        part.reshape(*part.shape[: part.ndim - len(box)], *_plane_shape(box)) for part in case.read(box)
    )
    colour_bar = None
    if case.kind == "instances":
        canvas = _side_by_side(_coloured(truth[0] * known), _coloured(values[0] * known))
    elif case.kind in PROBABILITIES:
        canvas = _grey(case, box)
        canvas[~known] *= 0.4
        _paint_overlap(canvas, _foreground(values, case, threshold), _wanted(truth), known)
    else:
        error = _voxel_errors(values, truth, case) * known
        most = _upper_end(error, case)
        canvas = _side_by_side(_grey(case, box), ramp_colours(error / most) * known[..., None])
        colour_bar = ColourBar(
            "0", f"{most:.3g}{'' if case.kind in ('vector', 'axis') else ' or more'}", _error_words(case)
        )
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    factor = PICTURE_SIDE / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    drawn = picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
    spacing = case.prediction.spacing or case.label.spacing
    unit = _length_unit(case, spacing)
    length = draw_scale_bar(
        drawn, drawn.width / picture.width, spacing[-1] if spacing and unit else None, unit
    )
    stream = io.BytesIO()
    drawn.save(stream, "PNG")
    scale = f", bar {length}" if length else ""
    return Drawn(stream.getvalue(), f"{plane}x to the right, y down{scale}", colour_bar)


def _side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    gap = np.full((left.shape[0], 2, 3), 255, np.float32)
    return np.concatenate([left, gap, right], axis=1)


def _grey(case: ScoredCase, box: tuple[slice, ...]) -> np.ndarray:
    return np.repeat(_image_slice(case, box)[..., None], 3, axis=-1).astype(np.float32)


def _error_words(case: ScoredCase) -> str:
    if case.kind in ("vector", "axis"):
        return "angular error, degrees"
    unit = metric_unit("mae", case.kind)
    return "absolute error" + (f", {unit}" if unit else "")


def _plane_shape(box: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)[-2:]


def _worst_plane(case: ScoredCase, threshold: float) -> tuple[tuple[slice, ...], str]:
    """Return the box of the plane along the first axis with the largest error, and what to call it."""
    shape = case.prediction.shape
    whole = tuple(slice(0, n) for n in shape)
    if len(shape) == 2:
        return whole, ""
    errors = np.zeros(shape[0])
    for box in case.pieces():
        values, truth, known = case.read(box)
        if case.kind == "instances":
            wrong = (_edges(values[0]) != _edges(truth[0])) & known & (truth[0] > 0)
        elif case.kind in PROBABILITIES:
            wrong = (_foreground(values, case, threshold) ^ _wanted(truth)) & known
        else:
            wrong = _voxel_errors(values, truth, case) * known
        errors[box[0]] += wrong.sum(axis=(1, 2))
    worst = int(errors.argmax())
    return (slice(worst, worst + 1), *whole[1:]), f"plane z = {worst} of 0 to {shape[0] - 1}, "


def _wanted(truth: np.ndarray) -> np.ndarray:
    return np.asarray((truth > 0).any(axis=0))


def _edges(labels: np.ndarray) -> np.ndarray:
    """Return where a voxel differs from the next one in its plane."""
    found = np.zeros(labels.shape, bool)
    for axis in (-1, -2):
        moved, out = np.moveaxis(labels, axis, 0), np.moveaxis(found, axis, 0)
        out[:-1] |= moved[1:] != moved[:-1]
    return found


def _voxel_errors(values: np.ndarray, truth: np.ndarray, case: ScoredCase) -> np.ndarray:
    """Return the error of every voxel: an angle in degrees, or the mean absolute error over channels."""
    from volumen.metrics.regression import angles

    truth = np.where(np.isfinite(truth), truth, 0)
    if case.kind in ("vector", "axis"):
        size = len(case.prediction.shape)
        parts = [slice(i, i + size) for i in range(0, len(values), size)]
        return np.mean([angles(values[p], truth[p], signed=case.kind == "vector") for p in parts], axis=0)
    return np.abs(values.astype(np.float32) - truth).mean(axis=0)


def _upper_end(error: np.ndarray, case: ScoredCase) -> float:
    if case.kind in ("vector", "axis"):
        return MOST_ANGLE
    return max(float(np.percentile(error, 99)) if error.size else 0.0, 1e-6)


def _paint_overlap(canvas: np.ndarray, found: np.ndarray, truth: np.ndarray, known: np.ndarray) -> None:
    for name, where in (("both", found & truth), ("missed", ~found & truth), ("false", found & ~truth)):
        where = where & known
        canvas[where] = 0.4 * canvas[where] + 0.6 * np.array(COLOURS[name], np.float32)


def _coloured(labels: np.ndarray) -> np.ndarray:
    """Return a colour for every number, the same every time, black for 0: float32 (*plane, 3)."""
    numbers = labels.astype(np.uint64)[..., None]
    mixed = (numbers * np.array([2654435761, 2246822519, 3266489917], np.uint64)) >> np.uint64(9)
    colours = 70 + (mixed & np.uint64(127)).astype(np.float32) * 1.4
    return np.where(numbers == 0, 0, colours).astype(np.float32)


def _foreground(values: np.ndarray, case: ScoredCase, threshold: float) -> np.ndarray:
    """Return the voxels of any class but the background."""
    if case.kind == "multiclass":
        return np.asarray((values[0] if len(values) == 1 else values.argmax(axis=0)) > 0)
    return np.asarray((values >= threshold if case.scale else values > 0).any(axis=0))


def _image_slice(case: ScoredCase, box: tuple[slice, ...]) -> np.ndarray:
    """Return the image's slice as grey values 0 to 255, or a plain grey where the image is gone."""
    from volumen.data.formats.opening import open_volume

    plane = _plane_shape(box)
    if case.image is None:
        return np.full(plane, 128, np.float32)
    there = tuple(slice(b.start + r.start, b.stop + r.start) for b, r in zip(box, case.region, strict=True))
    try:
        values = open_volume(case.image, ndim=len(there)).read(there).astype(np.float32).mean(axis=0)
    except (VolumenError, OSError) as error:
        logger.warning("%s: no image in the report (%s)", case.image, error)
        return np.full(plane, 128, np.float32)
    low, high = np.percentile(values, [1, 99])
    return ((values.reshape(plane) - low) / max(high - low, 1e-6) * 255).clip(0, 255)
