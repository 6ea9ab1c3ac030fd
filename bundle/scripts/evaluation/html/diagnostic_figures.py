"""Errors by geometry as figures and tables of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from volumen.evaluation.curves import STROKES
from volumen.evaluation.diagnostics.files import unit_of_quantity
from volumen.metrics.geometry.counts import Bin
from volumen.metrics.geometry.tally import ALL, BORDER, CONTRAST, CURVATURE, EDGE, GAP, THICKNESS

if TYPE_CHECKING:
    from volumen.evaluation.diagnosis import Diagnosis, Listed

WIDTH, HEIGHT = 260, 130
MOST_TICKS = 6
SHOWN = 10
"""Suspects of each kind in the report's table."""
WORDS = {
    ALL: "all voxels",
    CURVATURE: "mean curvature",
    THICKNESS: "thickness",
    GAP: "gap beside the surface",
    BORDER: "distance to the volume's border",
    EDGE: "distance to the label's edge",
    CONTRAST: "contrast at the surface",
}
_TOPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_KINDS = {"missing_label": "label may be missing", "wrong_label": "label may be wrong"}
_REASONS = {
    "continues": {
        "missing_label": "continues a labelled structure",
        "wrong_label": "part of a found structure",
    },
    "alone": {"missing_label": "stands alone", "wrong_label": "nothing found beside it"},
}


def diagnostic_sections(diagnosis: Diagnosis | None) -> list[dict[str, Any]]:
    """Return the figures of each target and class; [] without diagnosis or without a counted voxel."""
    if diagnosis is None:
        return []
    sections = []
    for target, classes in diagnosis.tallies.items():
        for label, tally in classes.items():
            tables = tally.tables()
            if ALL not in tables:
                continue
            sections.append(
                {
                    "title": f"{target}, {label}" if label else target,
                    "missed": percent(tables[ALL][0].miss_rate),
                    "false": percent(tables[ALL][0].false_rate),
                    "figures": [
                        _figure(quantity, unit_of_quantity(quantity, diagnosis.units[target]), bins)
                        for quantity, bins in tables.items()
                        if quantity != ALL and not math.isnan(bins[0].low)
                    ],
                }
            )
    return sections


@dataclass(frozen=True)
class RateLine:
    """A line of a figure.

    Args:
        name: what the line shows.
        rates: a share per bin, NaN where there is none.
        colour, dashes: how it is drawn.
    """

    name: str
    rates: Sequence[float]
    colour: str
    dashes: str = ""


def _figure(quantity: str, unit: str, bins: list[Bin]) -> dict[str, Any]:
    """Return the figure of both kinds of errors of one model."""
    measured = [row for row in bins if not math.isnan(row.low)]
    return rate_figure(
        title_of(quantity, unit),
        unit,
        bins,
        [
            RateLine("missed", [row.miss_rate for row in measured], STROKES[0][0]),
            RateLine("false", [row.false_rate for row in measured], STROKES[1][0]),
        ],
        [
            f"missed {row.missed:,} of {row.truth_voxels:,} true voxels ({percent(row.miss_rate)}), "
            f"false {row.false:,} of {row.predicted_voxels:,} predicted ones ({percent(row.false_rate)})"
            for row in measured
        ],
        ("true", "missed", "predicted", "false"),
        [
            [
                f"{row.truth_voxels:,}",
                percent(row.miss_rate),
                f"{row.predicted_voxels:,}",
                percent(row.false_rate),
            ]
            for row in bins
        ],
    )


def title_of(quantity: str, unit: str) -> str:
    """Return the title of the figure of a quantity."""
    return f"{WORDS[quantity]}, {unit}" if unit else WORDS[quantity]


def rate_figure(
    title: str,
    unit: str,
    bins: Sequence[Bin],
    lines: Sequence[RateLine],
    words: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Return the points, bars and ticks of a figure, one slot a bin, and the rows of its table.

    Args:
        title: title of the figure.
        unit: unit of the quantity, "" for none.
        bins: bins of the quantity; those that were not measured are in the table only.
        lines: what is drawn, a share per measured bin.
        words: what pointing at a measured bin shows.
        columns, cells: heads of the table's columns, and a row of text per bin.
    """
    measured = [row for row in bins if not math.isnan(row.low)]
    shares = [rate for line in lines for rate in line.rates if not math.isnan(rate)]
    top = next(value for value in _TOPS if value >= min(max(shares, default=0), 1))
    most = max(max(row.truth_voxels for row in measured), 1)
    slot = WIDTH / len(measured)
    return {
        "title": title,
        "width": WIDTH,
        "height": HEIGHT,
        "top": percent(top),
        "slots": [
            {
                "x": f"{i * slot:.1f}",
                "width": f"{max(slot - 2, 1):.1f}",
                "height": f"{HEIGHT * row.truth_voxels / most:.1f}",
                "y": f"{HEIGHT - HEIGHT * row.truth_voxels / most:.1f}",
                "words": f"{_range(row)} {unit}".strip() + f": {words[i]}",
            }
            for i, row in enumerate(measured)
        ],
        "lines": [
            {
                "colour": line.colour,
                "dashes": line.dashes,
                "points": [
                    {"x": f"{(i + 0.5) * slot:.1f}", "y": f"{HEIGHT * (1 - rate / top):.1f}"}
                    for i, rate in enumerate(line.rates)
                    if not math.isnan(rate)
                ],
            }
            for line in lines
        ],
        "ticks": _ticks(measured, slot),
        "columns": columns,
        "rows": [{"range": _range(row), "cells": texts} for row, texts in zip(bins, cells, strict=True)],
    }


def _ticks(bins: list[Bin], slot: float) -> list[dict[str, str]]:
    """Return the edges between slots that there is room to name."""
    inner = [(i + 1, row.high) for i, row in enumerate(bins[:-1])]
    every = math.ceil(len(inner) / MOST_TICKS) or 1
    return [{"x": f"{place * slot:.1f}", "text": f"{edge:g}"} for place, edge in inner[::every]]


def _range(row: Bin) -> str:
    if math.isnan(row.low):
        return "not measured"
    if math.isinf(row.low):
        return f"below {row.high:g}" if math.isfinite(row.high) else "any"
    return f"{row.low:g} to {row.high:g}" if math.isfinite(row.high) else f"{row.low:g} or more"


def percent(share: float) -> str:
    """Return a share in percent, a dash where there is none."""
    return "–" if math.isnan(share) else f"{100 * share:.3g} %"


def suspect_rows(diagnosis: Diagnosis | None) -> list[dict[str, Any]]:
    """Return the rows of the report's table of suspects, the most voxels first of each kind."""
    if diagnosis is None:
        return []
    rows = []
    for kind in _KINDS:
        found = [row for row in diagnosis.suspects if row.suspect.kind == kind]
        found.sort(key=lambda row: -row.suspect.score * row.suspect.voxels)
        rows += [_suspect_row(row) for row in found[:SHOWN]]
    return rows


def _suspect_row(row: Listed) -> dict[str, Any]:
    found = row.suspect
    return {
        "case": row.case,
        "target": f"{row.target}, {row.label}" if row.label else row.target,
        "kind": _KINDS[found.kind],
        "reason": _REASONS[found.reason][found.kind],
        "score": f"{found.score:.2f}",
        "voxels": f"{found.voxels:,}",
        "first": ", ".join(map(str, row.low)),
        "last": ", ".join(str(stop - 1) for stop in row.high),
    }
