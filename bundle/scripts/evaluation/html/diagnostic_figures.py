"""Errors by geometry as figures and tables of the report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
                    "all": tables[ALL][0],
                    "missed": _percent(tables[ALL][0].miss_rate),
                    "false": _percent(tables[ALL][0].false_rate),
                    "figures": [
                        _figure(quantity, unit_of_quantity(quantity, diagnosis.units[target]), bins)
                        for quantity, bins in tables.items()
                        if quantity != ALL and not math.isnan(bins[0].low)
                    ],
                }
            )
    return sections


def _figure(quantity: str, unit: str, bins: list[Bin]) -> dict[str, Any]:
    """Return the points, bars and ticks of a figure, one slot a bin, and the rows of its table."""
    measured = [row for row in bins if not math.isnan(row.low)]
    rates = [rate for row in measured for rate in (row.miss_rate, row.false_rate) if not math.isnan(rate)]
    top = next(value for value in _TOPS if value >= min(max(rates, default=0), 1))
    most = max(max(row.truth_voxels, row.predicted_voxels) for row in measured)
    slot = WIDTH / len(measured)
    slots = [
        {
            "x": f"{i * slot:.1f}",
            "width": f"{max(slot - 2, 1):.1f}",
            "height": f"{HEIGHT * row.truth_voxels / most:.1f}",
            "y": f"{HEIGHT - HEIGHT * row.truth_voxels / most:.1f}",
            "words": f"{_range(row)} {unit}".strip(),
            **_row(row),
        }
        for i, row in enumerate(measured)
    ]
    lines = {
        name: [
            {"x": f"{(i + 0.5) * slot:.1f}", "y": f"{HEIGHT * (1 - rate / top):.1f}"}
            for i, rate in enumerate(rates_of)
            if not math.isnan(rate)
        ]
        for name, rates_of in (
            ("missed", [row.miss_rate for row in measured]),
            ("false", [row.false_rate for row in measured]),
        )
    }
    return {
        "title": f"{WORDS[quantity]}, {unit}" if unit else WORDS[quantity],
        "width": WIDTH,
        "height": HEIGHT,
        "top": _percent(top),
        "slots": slots,
        "lines": lines,
        "ticks": _ticks(measured, slot),
        "rows": [{"range": _range(row), **_row(row)} for row in bins],
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


def _row(row: Bin) -> dict[str, str]:
    return {
        "truth": f"{row.truth_voxels:,}",
        "missed": f"{row.missed:,}",
        "miss_rate": _percent(row.miss_rate),
        "predicted": f"{row.predicted_voxels:,}",
        "false": f"{row.false:,}",
        "false_rate": _percent(row.false_rate),
    }


def _percent(share: float) -> str:
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
