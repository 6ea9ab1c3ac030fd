"""Errors by geometry and suspect labels as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.evaluation.diagnostics.suspect_files import NAME
from volumen.metrics.geometry.tally import BENDING, LENGTH, UNITS
from volumen.utils.files.atomic import write_atomically

if TYPE_CHECKING:
    from volumen.evaluation.diagnosis import Diagnosis, Listed
    from volumen.metrics.geometry.counts import Bin

COLUMNS = (
    "target", "class", "quantity", "unit", "bin_low", "bin_high",
    "truth_voxels", "missed", "miss_rate", "predicted_voxels", "false", "false_rate",
)  # fmt: skip


def write_files(diagnosis: Diagnosis, output: Path) -> None:
    """Write `diagnostics.csv`, `suspects.csv` and `diagnostics.json` into a folder."""
    write_atomically(output / "diagnostics.csv", diagnostics_csv(diagnosis).encode())
    write_atomically(output / NAME, suspects_csv(diagnosis).encode())
    write_atomically(output / "diagnostics.json", json.dumps(as_json(diagnosis), indent=1).encode())


def unit_of_quantity(quantity: str, length: str) -> str:
    """Return the unit of a quantity, "" where it has none.

    Args:
        quantity: of `UNITS`.
        length: the unit of length, "voxels" where none is known.
    """
    if UNITS[quantity] == BENDING:
        return "1/voxel" if length == "voxels" else f"1/{length}"
    return length if UNITS[quantity] == LENGTH else ""


def rows_of(diagnosis: Diagnosis) -> Iterator[tuple[str, str, str, str, Bin]]:
    """Yield target, class, quantity, unit and bin."""
    for target, classes in diagnosis.tallies.items():
        for label, tally in classes.items():
            for quantity, bins in tally.tables().items():
                unit = unit_of_quantity(quantity, diagnosis.units[target])
                for row in bins:
                    yield target, label, quantity, unit, row


def diagnostics_csv(diagnosis: Diagnosis) -> str:
    """Return the errors by quantity: a row per bin, over all cases.

    The ends of a bin are empty where the quantity was not measured, and for all voxels together.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for target, label, quantity, unit, row in rows_of(diagnosis):
        table.writerow([target, label, quantity, unit, *_cells(row)])
    return text.getvalue()


def _cells(row: Bin) -> list[str]:
    counts = (
        row.truth_voxels,
        row.missed,
        _text(row.miss_rate),
        row.predicted_voxels,
        row.false,
        _text(row.false_rate),
    )
    return [_text(row.low), _text(row.high), *map(str, counts)]


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def suspects_csv(diagnosis: Diagnosis) -> str:
    """Return the suspect labels: a row each, boxes in voxels of the label's volume and in space."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    ends = [f"{end}_{axis}" for end in ("low", "high") for axis in "zyx"]
    table.writerow(
        ["case", "target", "class", "number", "kind", "reason", "score", "voxels", "size", "unit",
         *(f"place_{axis}" for axis in "zyx"), *ends, *(f"physical_{end}" for end in ends)]
    )  # fmt: skip
    for row in diagnosis.suspects:
        found = row.suspect
        space = [[f"{value:.6g}" for value in end] for end in (row.physical_low, row.physical_high)]
        places = [cell for end in (row.place, row.low, row.high, *space) for cell in _three(end)]
        table.writerow(
            [row.case, row.target, row.label, row.number, found.kind, found.reason, f"{found.score:.4f}",
             found.voxels, f"{row.size:.6g}", row.unit, *places]
        )  # fmt: skip
    return text.getvalue()


def _three(values: Any) -> list[Any]:
    """Return three cells; an image has none along z."""
    return [""] * (3 - len(values)) + list(values)


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the tables and suspects as JSON has them; an open end or undefined rate is null."""
    tables: dict[str, Any] = {}
    for target, label, quantity, unit, row in rows_of(diagnosis):
        place = (
            tables.setdefault(target, {})
            .setdefault(label, {})
            .setdefault(quantity, {"unit": unit, "bins": []})
        )
        place["bins"].append(
            {
                "low": _finite(row.low),
                "high": _finite(row.high),
                "measured": not math.isnan(row.low),
                "truth_voxels": row.truth_voxels,
                "missed": row.missed,
                "miss_rate": _finite(row.miss_rate),
                "predicted_voxels": row.predicted_voxels,
                "false": row.false,
                "false_rate": _finite(row.false_rate),
            }
        )
    return {"tables": tables, "suspects": [_suspect(row) for row in diagnosis.suspects]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _suspect(row: Listed) -> dict[str, Any]:
    found = row.suspect
    return {
        "case": row.case,
        "target": row.target,
        "class": row.label,
        "number": row.number,
        "kind": found.kind,
        "reason": found.reason,
        "score": round(found.score, 6),
        "voxels": found.voxels,
        "size": row.size,
        "unit": row.unit,
        "place": list(row.place),
        "low": list(row.low),
        "high": list(row.high),
        "physical_low": list(row.physical_low),
        "physical_high": list(row.physical_high),
    }
