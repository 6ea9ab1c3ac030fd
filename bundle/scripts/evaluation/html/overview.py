"""The head of the report: a few scores, what is worst and where, understood at a glance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from volumen.evaluation.html.pictures.views import object_words
from volumen.evaluation.html.report_words import leading_score, metric_of, number, unit_of
from volumen.evaluation.place_tables import betti_errors
from volumen.metrics.score_names import direction_of, score_of
from volumen.utils.terminal.text import counted

if TYPE_CHECKING:
    from volumen.evaluation.cases import Details, Evaluation

_KEY_SCORES = {
    "dice": "overlap of prediction and truth",
    "surface_dice@1": "share of the surfaces within one voxel of the other",
    "hd95": "distance within which 95 % of the surfaces lie",
    "b0_error@64": "components too many or too few, in windows of 64 voxels",
    "b1_error@64": "tunnels too many or too few, in windows of 64 voxels",
    "voi_split": "how far true objects were cut up",
    "voi_merge": "how far true objects were joined",
    "adapted_rand_error": "pairs of voxels that are together in one only",
    "f1@0.5": "objects found, of half overlap or more",
    "pq": "panoptic quality: objects found, and how well",
    "angular_error": "angle between prediction and truth",
    "mae": "mean absolute error",
}
"""Scores of the overview, in this order, and what they are."""
MOST_CARDS = 8
STRIP = 200
"""Length of the line on which the cases of a score lie, in units of the drawing."""


def overview(evaluation: Evaluation, pictures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the page's head shows of each target.

    Args:
        evaluation: the scores.
        pictures: those of the worst cases, which the head links to.
    """
    groups = {group["target"]: group["cases"] for group in pictures}
    return [
        {
            "target": target,
            "cards": _cards(evaluation, target),
            "worst": _worst_case(evaluation, target),
            "counts": _counts(evaluation, target),
            "errors": _worst_errors(evaluation, target),
            "picture": _picture(groups.get(target, [])),
        }
        for target in dict.fromkeys(case.target for case in evaluation.scored)
    ]


def _cards(evaluation: Evaluation, target: str) -> list[dict[str, Any]]:
    """Return the key scores of a target: the mean over classes where it has several."""
    found = []
    for score, words in _KEY_SCORES.items():
        key = f"{target}/{score}"
        if key not in evaluation.mean:
            continue
        bounds = evaluation.interval[key]
        found.append(
            {
                "name": score,
                "words": words,
                "value": number(evaluation.mean[key]),
                "unit": unit_of(key, evaluation),
                "interval": f"{number(bounds[0])} to {number(bounds[1])}" if bounds else "",
                "better": _best(key),
                "strip": _strip(evaluation, key),
            }
        )
    return found[:MOST_CARDS]


def _best(key: str) -> str:
    """Return which way is better, and the best value."""
    score = score_of(metric_of(key))
    if score is None or direction_of(key) is None:
        return ""
    return "smaller is better, best 0" if direction_of(key) else f"larger is better, best {score.top:g}"


def _strip(evaluation: Evaluation, key: str) -> list[dict[str, Any]]:
    """Return a dot for each case, the better the further right; [] below two cases."""
    values = {
        name: row[key] for name, row in evaluation.cases.items() if not math.isnan(row.get(key, math.nan))
    }
    if len(values) < 2:
        return []
    score = score_of(metric_of(key))
    top = score.top if score is not None and score.top < math.inf else max(values.values()) or 1.0
    unit = unit_of(key, evaluation)
    dots = []
    for name, value in values.items():
        share = min(max(value / top, 0.0), 1.0)
        place = STRIP * (1 - share if direction_of(key) else share)
        dots.append({"x": f"{place:.1f}", "words": f"{name}: {number(value)} {unit}".strip()})
    return dots


def _worst_case(evaluation: Evaluation, target: str) -> str:
    """Return the worst case by the leading score of a target, "" with a single one."""
    case = next(case for case in evaluation.scored if case.target == target)
    metric, called = leading_score(case)
    key = f"{target}/{metric}"
    values = {
        name: row[key] for name, row in evaluation.cases.items() if not math.isnan(row.get(key, math.nan))
    }
    if len(values) < 2:
        return ""
    name = (max if direction_of(key) else min)(values, key=lambda name: values[name])
    return f"{name} ({called} {number(values[name])})"


def _counts(evaluation: Evaluation, target: str) -> str:
    """Return how many objects are wrong in all cases together."""
    words = []
    for error in ("merged", "broken", "missed", "added"):
        total = _total(evaluation, f"{target}/objects_{error}")
        if total is not None:
            words.append(f"{total} {error}")
    true = _total(evaluation, f"{target}/objects_true")
    if not words:
        return ""
    return f"{', '.join(words)}" + (f", of {counted(true, 'true object')}" if true is not None else "")


def _total(evaluation: Evaluation, key: str) -> int | None:
    """Return the sum of a count over all cases and classes; None where it was not measured."""
    found = []
    for row in evaluation.cases.values():
        by_class = [value for name, value in row.items() if name.startswith(f"{key}/")]
        found += by_class or ([row[key]] if key in row else [])
    known = [value for value in found if not math.isnan(value)]
    return int(sum(known)) if known else None


def _worst_errors(evaluation: Evaluation, target: str) -> list[str]:
    """Return the largest wrong object and the window with the largest error of topology, and where they are."""
    objects, windows = [], []
    for case, targets in evaluation.details.items():
        for label, details in targets.get(target, {}).items():
            of_class = f", class {label}" if label else ""
            objects += [(row["wrong"], case + of_class, row) for row in details["objects"]]
            for side, rows in details.get("windows", {}).items():
                windows += [(sum(map(abs, betti_errors(row))), case + of_class, (side, row)) for row in rows]
    found = []
    if objects:
        _, case, row = max(objects, key=lambda item: item[0])
        found.append(f"{object_words(row)}, in {case}{_at(row)}")
    if windows:
        _, case, (side, row) = max(windows, key=lambda item: item[0])
        errors = ", ".join(f"b{k} {error:+d}" for k, error in enumerate(betti_errors(row)) if error)
        found.append(
            f"Topology: {errors.replace('-', '−')} in a window of {side} voxels, in {case}{_at(row)}"
        )
    return found


def _at(row: Details) -> str:
    return f" at voxel ({', '.join(map(str, row['place']))})" if row["place"] is not None else ""


def _picture(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first plane of the worst case, None without pictures."""
    if not cases:
        return None
    case = cases[0]
    view = case["views"][0]
    return {"anchor": case["anchor"], "label": case["label"], "view": view, "drawn": view.planes[0]}
