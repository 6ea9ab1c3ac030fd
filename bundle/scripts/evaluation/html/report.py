"""The HTML report of an evaluation: one file, no network, tables and pictures of the worst cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from volumen.evaluation.curves import MOST_THIN, single_figures
from volumen.evaluation.html.diagnostic_figures import SHOWN, diagnostic_sections, suspect_rows
from volumen.evaluation.html.overview import overview
from volumen.evaluation.html.pages import render_page
from volumen.evaluation.html.pictures.views import views_of
from volumen.evaluation.html.report_drawing import COLOURS, PARTS, RAMP, in_columns
from volumen.evaluation.html.report_words import (
    badness,
    direction,
    leading_score,
    metric_of,
    number,
    settings_in_words,
    unit_of,
)
from volumen.evaluation.place_tables import betti_errors
from volumen.metrics.score_names import direction_of, score_of, smaller_is_better
from volumen.metrics.units import metric_unit
from volumen.version import __version__

if TYPE_CHECKING:
    from volumen.evaluation.cases import Details, Evaluation, ScoredCase

LISTED = 10
"""Wrong objects of each kind, and windows, in the tables of a target and class."""
MOST_COLUMNS = 7


def render_report(evaluation: Evaluation, *, worst: int = 3) -> str:
    """Return the report as one HTML page.

    Args:
        evaluation: the scores.
        worst: cases with pictures per target, the worst first.
    """
    pictures = _pictures(evaluation, worst)
    return render_page(
        "report.html",
        title=f"Evaluation of {', '.join(_models(evaluation)) or 'predictions'}",
        overview=overview(evaluation, pictures or []),
        facts=_facts(evaluation),
        missing=_missing(evaluation),
        means=_means(evaluation),
        cost=_cost(evaluation),
        curves=single_figures(evaluation.histograms, evaluation.settings["threshold"]),
        most_thin=MOST_THIN,
        case_tables=_case_tables(evaluation),
        several_cases=len(evaluation.cases) > 1,
        objects=_wrong_objects(evaluation),
        windows=_wrong_windows(evaluation),
        listed=LISTED,
        diagnostics=diagnostic_sections(evaluation.diagnosis),
        suspects=suspect_rows(evaluation.diagnosis),
        suspects_shown=SHOWN,
        pictures=pictures,
        colours=COLOURS,
        parts=PARTS,
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
    return {
        "model": ", ".join(_models(evaluation)) or "not recorded with the predictions",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "scored": evaluation.coverage,
        **settings_in_words(evaluation.settings, evaluation.scored[0].scale_of_voxels.unit),
        "volumen": __version__,
    }


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


def _bar(key: str, value: float, bounds: tuple[float, float] | None) -> dict[str, str] | None:
    """Return the places of a bar from 0 to 1, in percent, for metrics that have this range; None for others."""
    score = score_of(metric_of(key))
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


def _worst_of(evaluation: Evaluation, key: str) -> str | None:
    """Return the case with the worst value, None below two different values."""
    values = {
        name: row[key] for name, row in evaluation.cases.items() if not math.isnan(row.get(key, math.nan))
    }
    if len(set(values.values())) < 2 or direction_of(key) is None:
        return None
    return (max if smaller_is_better(key) else min)(values, key=lambda name: values[name])


def _listed(evaluation: Evaluation) -> dict[str, list[tuple[str, Details]]]:
    """Return the details of every target and class by its name: (case, details)."""
    found: dict[str, list[tuple[str, Details]]] = {}
    for case, targets in evaluation.details.items():
        for target, by_class in targets.items():
            for label, details in by_class.items():
                name = f"{target}, class {label}" if label else target
                found.setdefault(name, []).append((case, details))
    return found


def _wrong_objects(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the worst objects of each kind, target and class, over all cases."""
    rows = []
    for target, cases in _listed(evaluation).items():
        for kind in ("merged", "broken", "missed", "added"):
            errors = [
                (case, row) for case, details in cases for row in details["objects"] if row["error"] == kind
            ]
            errors.sort(key=lambda found: -found[1]["wrong"])
            rows += [
                {
                    "case": case,
                    "target": target,
                    "error": kind,
                    "voxels": row["voxels"],
                    "parts": len(row["parts"]) or "–",
                    **_box(row),
                }
                for case, row in errors[:LISTED]
            ]
    return rows


def _wrong_windows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the windows with the largest errors of topology of each target and class, over all cases."""
    rows = []
    for target, cases in _listed(evaluation).items():
        windows = [
            (case, side, row)
            for case, details in cases
            for side, found in details.get("windows", {}).items()
            for row in found
        ]
        windows.sort(key=lambda found: -sum(map(abs, betti_errors(found[2]))))
        rows += [
            {"case": case, "target": target, "side": side, "errors": _signed(betti_errors(row)), **_box(row)}
            for case, side, row in windows[:LISTED]
        ]
    return rows


def _signed(errors: Sequence[int]) -> list[str]:
    return [f"{error:+d}".replace("-", "−") if error else "0" for error in errors]


def _box(row: Details) -> dict[str, str]:
    """Return a box and the place of an error in it as text."""
    ends = {"first": row["low"], "last": [stop - 1 for stop in row["high"]], "place": row["place"]}
    return {name: "–" if end is None else ", ".join(map(str, end)) for name, end in ends.items()}


def _pictures(evaluation: Evaluation, worst: int) -> list[dict[str, Any]] | None:
    """Return the pictures of each target, the worst case first; None where no picture is required."""
    if worst < 1:
        return None
    groups = []
    for place, target in enumerate(sorted({case.target for case in evaluation.scored}), 1):
        cases = [case for case in evaluation.scored if case.target == target]
        cases.sort(key=lambda case: badness(evaluation, case))
        groups.append(
            {
                "target": target,
                "cases": [
                    _case_pictures(evaluation, case, f"picture-{place}-{rank}")
                    for rank, case in enumerate(cases[:worst], 1)
                ],
            }
        )
    return groups


def _case_pictures(evaluation: Evaluation, case: ScoredCase, anchor: str) -> dict[str, Any]:
    metric, called = leading_score(case)
    value = evaluation.cases.get(case.name, {}).get(f"{case.target}/{metric}", math.nan)
    views = views_of(
        case,
        evaluation.settings["threshold"],
        evaluation.details.get(case.name, {}).get(case.target, {}),
        evaluation.numbers.get(case.name, {}).get(case.target, {}),
    )
    score = f"{called} {number(value)} {metric_unit(metric, case.kind)}".strip()
    return {
        "anchor": anchor,
        "name": case.name,
        "score": score,
        "label": f"{case.name}, {case.target}: {score}",
        "several": case.kind in ("multiclass",),
        "views": views,
    }
