"""Reliability and precision-recall curves of an evaluation, as numbers for files and as points for drawings."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.metrics.probabilities import (
    average_precision,
    expected_calibration_error,
    precision_recall,
    reliability,
)

Histograms = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
"""Counts of `probability_counts` by target, class and case."""

# Colours of Okabe and Ito, as in the pictures; each line also has a different dash pattern.
STROKES = (
    ("#0072b2", ""),
    ("#d55e00", "7 3"),
    ("#009e73", "2 2"),
    ("#cc79a7", "9 3 2 3"),
    ("#5b6673", "1 3"),
)
MOST_THIN = 30
"""Largest number of cases that are drawn as thin lines."""
SIDE = 260
"""Length of an axis in the drawing's units."""
DRAWN_STEP, FILED_STEP = 1 / 400, 1 / 100
"""Smallest distance of two points of a curve in precision or recall, in drawings and in files."""


@dataclass(frozen=True)
class Line:
    """The counts of one line of a drawing.

    Args:
        name: name of the case, the cases or the model.
        counts: result of `probability_counts`.
        thin: whether the line is thin, in the background.
    """

    name: str
    counts: np.ndarray
    thin: bool = False


def pooled(cases: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> np.ndarray | None:
    """Return the sum of the counts of all cases, or of the named cases; None if there are none."""
    chosen = [counts for name, counts in cases.items() if names is None or name in names]
    return np.sum(chosen, axis=0) if chosen else None


def thinned(curve: np.ndarray, step: float) -> np.ndarray:
    """Return the points of a precision-recall curve (n, 3) that are at least a step from the previous one."""
    if len(curve) < 3:
        return curve
    rows = [0]
    for place in range(1, len(curve) - 1):
        if np.abs(curve[place, 1:] - curve[rows[-1], 1:]).max() >= step:
            rows.append(place)
    return curve[[*rows, len(curve) - 1]]


def curve_tables(histograms: Histograms) -> dict[str, dict[str, dict[str, list[list[float]]]]]:
    """Return the curves over the voxels of all cases, for JSON: target to class ("" for one) to curve to rows."""
    return {
        target: {
            label: {
                "reliability": reliability(counts).tolist(),
                "precision_recall": thinned(precision_recall(counts), FILED_STEP).tolist(),
            }
            for label, cases in classes.items()
            if (counts := pooled(cases)) is not None
        }
        for target, classes in histograms.items()
    }


def curves_csv(histograms: Histograms) -> str:
    """Return the same curves as CSV, a row per point."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = {
        "reliability": ("mean_probability", "share_of_class", "voxels"),
        "precision_recall": ("threshold", "precision", "recall"),
    }
    table.writerow(["target", "class", "curve", *(name for names in columns.values() for name in names)])
    for target, classes in curve_tables(histograms).items():
        for label, curves in classes.items():
            for rows, before, after in ((curves["reliability"], 0, 3), (curves["precision_recall"], 3, 0)):
                curve = "precision_recall" if before else "reliability"
                for row in rows:
                    values = [f"{value:.8g}" for value in row]
                    table.writerow([target, label, curve, *[""] * before, *values, *[""] * after])
    return text.getvalue()


def single_figures(histograms: Histograms, threshold: float) -> list[dict[str, Any]]:
    """Return the drawings of one model: all cases together, and a thin line per case.

    Args:
        histograms: the counts.
        threshold: threshold to mark on the lines of all cases.
    """
    figures = []
    for target, classes in histograms.items():
        for label, cases in classes.items():
            everything = pooled(cases)
            if everything is None:
                continue
            thin = [Line(name, counts, thin=True) for name, counts in cases.items()] if len(cases) > 1 else []
            lines = [*thin[:MOST_THIN], Line("all cases" if thin else next(iter(cases)), everything)]
            figures.append(figure(_title(target, label), lines, threshold))
    return figures


def paired_figures(models: Mapping[str, Histograms], threshold: float) -> list[dict[str, Any]]:
    """Return the drawings of several models over the cases that all models have.

    Args:
        models: counts by name of the model.
        threshold: threshold to mark on the lines.
    """
    figures = []
    first = next(iter(models.values()))
    for target, classes in first.items():
        for label in classes:
            found = {name: counts.get(target, {}).get(label, {}) for name, counts in models.items()}
            shared = sorted(set.intersection(*(set(cases) for cases in found.values())))
            if shared:
                sums = {name: pooled(cases, shared) for name, cases in found.items()}
                lines = [Line(name, counts) for name, counts in sums.items() if counts is not None]
                figures.append(figure(_title(target, label), lines, threshold))
    return figures


def _title(target: str, label: str) -> str:
    return f"{target}, class {label}" if label else target


def figure(title: str, lines: Sequence[Line], threshold: float) -> dict[str, Any]:
    """Return the content of the drawing of a target or class; coordinates in its units, from the lower left corner."""
    strong = [line for line in lines if not line.thin]
    strokes = {line.name: STROKES[place % len(STROKES)] for place, line in enumerate(strong)}
    drawn = [
        {
            "name": line.name,
            "thin": line.thin,
            "colour": strokes[line.name][0] if not line.thin else "",
            "dashes": strokes[line.name][1] if not line.thin else "",
            "reliability": _places(reliability(line.counts)[:, :2]),
            "dots": [] if line.thin else _dots(line.counts),
            "precision_recall": _places(_steps(thinned(precision_recall(line.counts), DRAWN_STEP))),
            "marks": [] if line.thin else _mark(line.counts, threshold),
            "ece": f"{expected_calibration_error(line.counts):.4f}",
            "average_precision": _share(average_precision(line.counts)),
        }
        for line in lines
    ]
    counts = strong[0].counts
    return {
        "title": title,
        "lines": drawn,
        "chance": SIDE * float(counts[1].sum() / max(counts[0].sum(), 1)),
        "side": SIDE,
        "ticks": [(f"{share:g}", SIDE * share) for share in (0, 0.25, 0.5, 0.75, 1)],
    }


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _places(points: np.ndarray) -> str:
    """Return points (n, 2) in [0, 1], y upwards, as the coordinates of an SVG polyline."""
    return " ".join(f"{SIDE * x:.1f},{SIDE * (1 - y):.1f}" for x, y in points)


def _steps(curve: np.ndarray) -> np.ndarray:
    """Return (recall, precision) as the steps whose area is the average precision, float (2 n, 2)."""
    if not len(curve):
        return np.zeros((0, 2))
    left = np.column_stack([np.concatenate([[0.0], curve[:-1, 2]]), curve[:, 1]])
    return np.stack([left, curve[:, [2, 1]]], axis=1).reshape(-1, 2)


def _dots(counts: np.ndarray) -> list[dict[str, str]]:
    """Return a dot per bin of the reliability curve; its area is proportional to the share of voxels."""
    curve = reliability(counts)
    total = curve[:, 2].sum()
    return [
        {
            "x": f"{SIDE * x:.1f}",
            "y": f"{SIDE * (1 - y):.1f}",
            "radius": f"{2 + 6 * math.sqrt(voxels / total):.1f}",
            "words": f"probability {x:.3f}: {y:.3f} are of the class ({voxels:,.0f} voxels)",
        }
        for x, y, voxels in curve
    ]


def _mark(counts: np.ndarray, threshold: float) -> list[dict[str, str]]:
    """Return the point of a threshold on the precision-recall curve; [] if no probability reaches it."""
    curve = precision_recall(counts)
    above = curve[curve[:, 0] >= threshold]
    if not len(above):
        return []
    _, precision, recall = above[-1]
    return [
        {
            "x": f"{SIDE * recall:.1f}",
            "y": f"{SIDE * (1 - precision):.1f}",
            "words": f"threshold {threshold:g}: precision {precision:.3f}, recall {recall:.3f}",
        }
    ]
