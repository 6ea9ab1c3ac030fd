"""A comparison of models as JSON, CSV and an HTML page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from volumen.evaluation.curves import paired_figures
from volumen.evaluation.differences import FEWEST, Comparison, Difference
from volumen.evaluation.html.compared_diagnostics import compared_sections, strokes_of
from volumen.evaluation.html.pages import render_page
from volumen.evaluation.html.report import MOST_COLUMNS, column_words
from volumen.evaluation.html.report_drawing import in_columns
from volumen.evaluation.html.report_words import direction, number, settings_in_words, unit_of
from volumen.evaluation.results import cell, finite
from volumen.metrics.score_names import direction_of, score_of
from volumen.version import __version__


def comparison_json(comparison: Comparison) -> str:
    """Return the differences as JSON; an undefined value is null."""
    content = {
        "first": comparison.first,
        "models": {
            name: {
                "report": f"{comparison.folders[name]}/report.html",
                "settings": evaluation.settings,
                "mean": {key: finite(value) for key, value in evaluation.mean.items()},
                "interval_95": {key: bounds and list(bounds) for key, bounds in evaluation.interval.items()},
                "cases": {
                    case: {key: finite(value) for key, value in row.items()}
                    for case, row in evaluation.cases.items()
                },
            }
            for name, evaluation in comparison.evaluations.items()
        },
        "differences": {
            name: {
                key: {
                    "first": finite(found.first),
                    "other": finite(found.other),
                    "mean": finite(found.mean),
                    "interval_95": found.interval and list(found.interval),
                    "verdict": comparison.verdict(name, key),
                    "cases": found.cases,
                }
                for key, found in by_key.items()
            }
            for name, by_key in comparison.differences.items()
        },
        "left_out": {name: list(cases) for name, cases in comparison.left_out.items()},
    }
    return json.dumps(content, indent=1)


def comparison_csv(comparison: Comparison) -> str:
    """Return the differences as CSV: for each model and score a row per case, then one of the means."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", "score", "case", "first", "other", "difference", "low_95", "high_95"])
    before = comparison.evaluations[comparison.first].cases
    for name, by_key in comparison.differences.items():
        after = comparison.evaluations[name].cases
        for key, found in by_key.items():
            for case, value in found.cases.items():
                values = (before[case][key], after[case][key], value)
                table.writerow([name, key, case, *map(cell, values), "", ""])
            means = (found.first, found.other, found.mean, *(found.interval or (None, None)))
            table.writerow([name, key, "mean", *map(cell, means)])
    return text.getvalue()


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as one HTML page, which links to the report of each model."""
    return render_page(
        "comparison.html",
        title=f"Comparison of {', '.join(comparison.evaluations)}",
        facts=_facts(comparison),
        models=_models(comparison),
        missing=_missing(comparison),
        first=comparison.first,
        curves=paired_figures(
            {name: evaluation.histograms for name, evaluation in comparison.evaluations.items()},
            comparison.evaluations[comparison.first].settings["threshold"],
        ),
        diagnostics=compared_sections(
            {name: evaluation.diagnosis for name, evaluation in comparison.evaluations.items()}
        ),
        strokes=strokes_of(list(comparison.evaluations)),
        comparisons=[_compared(comparison, name) for name in comparison.differences],
        fewest=FEWEST,
    )


def _facts(comparison: Comparison) -> dict[str, Any]:
    shared = dict(comparison.evaluations[comparison.first].settings)
    del shared["predictions"]
    unit = comparison.evaluations[comparison.first].scored[0].scale_of_voxels.unit
    return {
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **settings_in_words(shared, unit),
        "volumen": __version__,
    }


def _models(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "link": quote(f"{comparison.folders[name]}/report.html"),
            "predictions": evaluation.settings["predictions"],
            "model": ", ".join(sorted({case.model for case in evaluation.scored if case.model})) or "–",
            "scored": evaluation.coverage,
        }
        for name, evaluation in comparison.evaluations.items()
    ]


def _missing(comparison: Comparison) -> list[tuple[str, tuple[str, ...]]]:
    """Name what enters no difference."""
    return [
        (f"Not compared, as {comparison.first} or {name} lacks it", cases)
        for name, cases in comparison.left_out.items()
        if cases
    ]


def _compared(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return the tables of one model against the first."""
    first, found = comparison.evaluations[comparison.first], comparison.differences[name]
    # One length for all shares, so that their bars compare; other units have no common one.
    shares = [difference for key, difference in found.items() if _is_share(key)]
    most = max((abs(value) for share in shares for value in _ends(share)), default=0.0)
    keys = [key for key, difference in found.items() if difference.cases]
    return {
        "name": name,
        "most": number(most),
        "rows": [
            {
                "key": key,
                "first": number(difference.first),
                "other": number(difference.other),
                "difference": _signed(difference.mean),
                "interval": " to ".join(map(_signed, difference.interval)) if difference.interval else "–",
                "bar": _bar(difference, most) if _is_share(key) else None,
                "cases": len(difference.cases),
                "better": direction(key, unit_of(key, first)),
                "verdict": comparison.verdict(name, key),
            }
            for key, difference in found.items()
        ],
        "case_tables": {
            target: [
                _cases_by(target, columns, found)
                for columns in in_columns([key for key in keys if key.split("/")[0] == target], MOST_COLUMNS)
            ]
            for target in dict.fromkeys(key.split("/")[0] for key in keys)
        },
    }


def _is_share(key: str) -> bool:
    score = score_of(key.split("/")[1])
    return score is not None and score.top == 1


def _ends(difference: Difference) -> tuple[float, ...]:
    return tuple(value for value in (difference.mean, *(difference.interval or ())) if not math.isnan(value))


def _bar(difference: Difference, most: float) -> dict[str, str] | None:
    """Return the places of a bar from -most to most, in percent; None where there is nothing to draw."""
    if not most or math.isnan(difference.mean):
        return None
    low, high = difference.interval or (difference.mean, difference.mean)
    return {
        "left": f"{50 + 50 * low / most:.1f}",
        "width": f"{50 * (high - low) / most:.1f}",
        "mean": f"{min(50 + 50 * difference.mean / most, 99):.1f}",
    }


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _cases_by(target: str, keys: list[str], found: Mapping[str, Difference]) -> dict[str, Any]:
    """Return one table: a row per case, a column per score of a target."""
    cases = sorted({case for key in keys for case in found[key].cases})
    return {
        "columns": [column_words(key, target) for key in keys],
        "rows": [
            {"name": case, "cells": [_case_cell(key, found[key].cases.get(case, math.nan)) for key in keys]}
            for case in cases
        ],
    }


def _case_cell(key: str, value: float) -> dict[str, str]:
    """Return a difference of a case, and whether it is a gain or a loss."""
    smaller = direction_of(key)
    kind = (
        ""
        if smaller is None or not value or math.isnan(value)
        else "gain"
        if (value < 0) == smaller
        else "loss"
    )
    return {"value": _signed(value), "kind": kind}
