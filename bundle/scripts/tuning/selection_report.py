"""A selection as an HTML page: the candidates with intervals, what was chosen, and why."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from volumen.evaluation.html.pages import render_page
from volumen.evaluation.html.report_words import number
from volumen.tuning.selection import Entry, Selection
from volumen.version import __version__


def render_selection(found: Selection) -> str:
    """Return the page of a selection."""
    key = found.subject.key
    low, high = _ends(found)
    regions = sorted({name for entry in found.entries for name in entry.evaluation.cases})
    return render_page(
        "selection.html",
        title=f"Selection: {found.entries[0].candidate.name}",
        chosen={"name": found.entries[0].candidate.name},
        reason=found.reason(),
        remarks=_remarks(found),
        facts={
            "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "score": f"{key} ({'smaller' if found.subject.smaller else 'larger'} is better)",
            "regions": str(found.regions),
            "predict with": f"volumen predict -m {found.file.parent}",
            "volumen": __version__,
        },
        key=key,
        better=f"{'smaller' if found.subject.smaller else 'larger'} is better",
        low=number(low),
        high=number(high),
        regions=regions,
        rows=[_row(found, entry, regions, low, high) for entry in found.entries],
    )


def _remarks(found: Selection) -> list[str]:
    """Return what a reader must know of the candidates besides their scores."""
    lines = []
    if found.as_long:
        names = ", ".join(run.name for run in found.as_long)
        lines.append(f"One network trained as long as the folds together: {names}.")
    elif found.several:
        lines.append(
            "No candidate is one network trained as long as the folds together; where time is short, such a network is"
            " often better."
        )
    if any(len(run.members) > 1 for run in found.entries[0].candidate.runs):
        lines.append(
            "Each region was predicted by the folds that had not seen it; a new image gets the mean of all of them."
        )
    return lines


def _row(found: Selection, entry: Entry, regions: list[str], low: float, high: float) -> dict[str, Any]:
    key, mean = found.subject.key, found.value(entry)
    bounds, difference = entry.evaluation.interval.get(key), entry.difference
    changed = [
        f"{name} {value:g}" for name, value in entry.settings.items() if value != found.subject.default[name]
    ]
    return {
        "name": entry.candidate.name,
        "mean": number(mean),
        "interval": _interval(bounds),
        "bar": _bar(mean, bounds, low, high),
        "difference": "–" if difference is None else f"{difference.mean:+.4f}",
        "difference_interval": _interval(None if difference is None else difference.interval),
        "networks": len(entry.candidate.members),
        "passes": entry.passes,
        "patches": entry.patches,
        "settings": ", ".join(changed) or "default",
        "cases": [number(entry.evaluation.cases.get(name, {}).get(key, math.nan)) for name in regions],
    }


def _interval(bounds: tuple[float, float] | None) -> str:
    return "–" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def _ends(found: Selection) -> tuple[float, float]:
    """Return the smallest and the largest value that any bar reaches."""
    values = [
        value
        for entry in found.entries
        for value in (found.value(entry), *(entry.evaluation.interval.get(found.subject.key) or ()))
        if not math.isnan(value)
    ]
    return min(values, default=0.0), max(values, default=1.0)


def _bar(mean: float, bounds: tuple[float, float] | None, low: float, high: float) -> dict[str, str] | None:
    if math.isnan(mean) or high <= low:
        return None
    first, last = bounds or (mean, mean)
    share = 100 / (high - low)
    return {
        "left": f"{(first - low) * share:.1f}",
        "width": f"{(last - first) * share:.1f}",
        "mean": f"{min((mean - low) * share, 99):.1f}",
    }
