"""Errors by geometry of several models as figures and tables of their comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from volumen.evaluation.curves import STROKES
from volumen.evaluation.diagnostics.files import unit_of_quantity
from volumen.evaluation.html.diagnostic_figures import RateLine, percent, rate_figure, title_of
from volumen.metrics.geometry.counts import Bin
from volumen.metrics.geometry.tally import ALL

if TYPE_CHECKING:
    from volumen.evaluation.diagnosis import Diagnosis

_RATES = (("missed", "miss_rate"), ("false", "false_rate"))


def strokes_of(names: list[str]) -> dict[str, tuple[str, str]]:
    """Return colour and dashes by model, those of its curves."""
    return {name: STROKES[place % len(STROKES)] for place, name in enumerate(names)}


def compared_sections(models: Mapping[str, Diagnosis | None]) -> list[dict[str, Any]]:
    """Return the figures of each target and class that was counted on the same true voxels for every model.

    Args:
        models: what was found by name of the model; None where nothing was counted.

    Returns:
        A section per target and class; [] where a model has no counts. Without equal true voxels, as when a model lacks
        cases, rates do not compare, and the target has no section.
    """
    found = {name: diagnosis for name, diagnosis in models.items() if diagnosis is not None}
    if len(found) < len(models):
        return []
    first = next(iter(found.values()))
    sections = []
    for target, classes in first.tallies.items():
        for label in classes:
            tables = {
                name: diagnosis.tallies[target][label].tables()
                for name, diagnosis in found.items()
                if label in diagnosis.tallies.get(target, {})
            }
            if len(tables) == len(found) and _same_truth([bins.get(ALL, []) for bins in tables.values()]):
                title = f"{target}, {label}" if label else target
                sections.append({"title": title, **_section(tables, first.units[target])})
    return sections


def _same_truth(tables: list[list[Bin]]) -> bool:
    """Return whether tables have the same bins with the same true voxels, and any."""
    # A bin without true voxels is in a table only where the model predicted some.
    truths = [{_key(row): row.truth_voxels for row in bins if row.truth_voxels} for bins in tables]
    return bool(truths[0]) and all(truth == truths[0] for truth in truths)


def _section(tables: Mapping[str, Mapping[str, list[Bin]]], unit: str) -> dict[str, Any]:
    shared = [
        quantity
        for quantity in next(iter(tables.values()))
        if quantity != ALL
        and not math.isnan(next(iter(tables.values()))[quantity][0].low)
        and _same_truth([bins.get(quantity, []) for bins in tables.values()])
    ]
    return {
        "totals": [
            {"name": name, **{word: percent(getattr(bins[ALL][0], rate)) for word, rate in _RATES}}
            for name, bins in tables.items()
        ],
        "figures": [
            _figure(word, rate, quantity, unit_of_quantity(quantity, unit), tables)
            for quantity in shared
            for word, rate in _RATES
        ],
    }


def _figure(
    word: str, rate: str, quantity: str, unit: str, tables: Mapping[str, Mapping[str, list[Bin]]]
) -> dict[str, Any]:
    """Return the figure of one kind of error, a line per model."""
    strokes = strokes_of(list(tables))
    by_model = {name: {_key(row): row for row in bins[quantity]} for name, bins in tables.items()}
    every = {key: row for rows in by_model.values() for key, row in rows.items()}
    bins = [every[key] for key in sorted(every, key=lambda key: key or (math.inf, math.inf))]
    rates = {
        name: [getattr(rows[_key(row)], rate) if _key(row) in rows else math.nan for row in bins]
        for name, rows in by_model.items()
    }
    measured = [i for i, row in enumerate(bins) if not math.isnan(row.low)]
    return rate_figure(
        f"{word} by {title_of(quantity, unit)}",
        unit,
        bins,
        [RateLine(name, [rates[name][i] for i in measured], *strokes[name]) for name in tables],
        [", ".join(f"{name} {percent(rates[name][i])}" for name in tables) for i in measured],
        ("true", *tables),
        [
            [f"{row.truth_voxels:,}", *(percent(rates[name][i]) for name in tables)]
            for i, row in enumerate(bins)
        ],
    )


def _key(row: Bin) -> tuple[float, float] | None:
    """Return what identifies a bin; None for that of voxels which were not measured."""
    return None if math.isnan(row.low) else (row.low, row.high)
