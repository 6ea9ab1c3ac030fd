"""The scores of an evaluation as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from typing import TYPE_CHECKING

from volumen.evaluation.cases import Evaluation
from volumen.evaluation.curves import curve_tables

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


def json_text(evaluation: Evaluation) -> str:
    """Return the scores as JSON; an undefined value is null."""
    content = {
        "settings": evaluation.settings,
        "mean": {key: finite(value) for key, value in evaluation.mean.items()},
        "interval_95": {key: bounds and list(bounds) for key, bounds in evaluation.interval.items()},
        "cases": {name: {k: finite(v) for k, v in row.items()} for name, row in evaluation.cases.items()},
        "scored": evaluation.coverage,
        "labels_without_prediction": list(evaluation.unpredicted),
        "predictions_without_label": list(evaluation.unlabelled),
        "details": evaluation.details,
        "curves": curve_tables(evaluation.histograms),
    }
    return json.dumps(content, indent=1)


def csv_text(evaluation: Evaluation) -> str:
    """Return the scores as CSV: a row per case, then their mean and the interval's ends."""
    keys = [key for key in evaluation.mean if key != "mean_dice"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", *keys])
    for name, row in evaluation.cases.items():
        table.writerow([name, *(cell(row.get(key)) for key in keys)])
    table.writerow(["mean", *(cell(evaluation.mean[key]) for key in keys)])
    for place, name in enumerate(("low_95", "high_95")):
        bounds = [evaluation.interval[key] for key in keys]
        table.writerow([name, *(cell(b[place]) if b else "" for b in bounds)])
    return text.getvalue()


def finite(value: float | None) -> float | None:
    """Return a value as JSON has it, None where it is undefined."""
    return None if value is None or math.isnan(value) else value


def cell(value: float | None) -> str:
    """Return a value as CSV has it, empty where it is undefined."""
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
