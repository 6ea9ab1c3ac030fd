"""Rank correlations between validation scores and the errors of held-out data, from the tables of `ranking.py`.

    python benchmarks/ranking_table.py benchmarks/results/ranking_*.csv [--markdown FILE] [--picture FILE.svg]

1 means that a score puts the networks in the order in which a person who corrects the held-out part would, -1 in the
opposite one, 0 in an unrelated one. Intervals are the middle 95 % of a bootstrap over networks. With ten networks they
are wide; so the difference from Dice, on the same resamples, has an interval of its own.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from volumen.metrics.score_names import direction_of

RESAMPLES, SEED = 2000, 0
OUTCOMES = {
    "heldout/corrections": "corrections",
    "heldout/voi": "VOI",
    "heldout_tuned/corrections": "corrections, tuned",
    "heldout_tuned/voi": "VOI, tuned",
}
"""Columns with held-out errors, and what they are called. Smaller is better."""
REFERENCE = "dice"
CEILING = {"heldout/corrections": "valid_counted/corrections", "heldout/voi": "valid_counted/voi"}
"""The same errors counted on the validation part: what the best possible score could know."""
CEILING_NAME = "the same errors"
SUM = "voi_split + voi_merge"


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of a score with an error.

    Args:
        spearman, kendall: the coefficients, NaN where the score or the error is the same for all networks.
        low, high: interval of Spearman's.
        gain: Spearman's less that of Dice.
        gain_low, gain_high: interval of the difference.
    """

    spearman: float
    kendall: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float

    @property
    def better_than_dice(self) -> bool:
        """Whether the interval of the difference lies above 0."""
        return self.gain_low > 0


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks along the last axis, the mean rank for equal values."""
    less = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    same = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return less + (same + 1) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's coefficient along the last axis, NaN where one side is constant."""
    x, y = (ranks(values) - (values.shape[-1] + 1) / 2 for values in (a, b))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))


def kendall(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Kendall's tau-b along the last axis, NaN where one side is constant."""
    x, y = (np.sign(values[..., :, None] - values[..., None, :]) for values in (a, b))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(axis=(-2, -1)) / np.sqrt((x * x).sum(axis=(-2, -1)) * (y * y).sum(axis=(-2, -1)))


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Return the columns of numbers of a table; an empty cell is NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for name in rows[0]:
        try:
            columns[name] = np.array([float(row[name] or "nan") for row in rows])
        except ValueError:
            continue  # the name of a loss
    for prefix in ("valid/", "valid/instances "):
        if f"{prefix}voi_split" in columns:
            columns[f"{prefix}{SUM}"] = columns[f"{prefix}voi_split"] + columns[f"{prefix}voi_merge"]
    return columns


def oriented_scores(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the validation scores by name, turned so that larger is better; none that is undefined for a network."""
    found = {}
    for key, values in columns.items():
        name = key.removeprefix("valid/")
        if name == key or np.isnan(values).any():
            continue
        score = name.removeprefix("instances ").partition(" ")[0]
        found[name] = -values if direction_of(f"x/{score}") else values
    return found


def correlate(scores: Mapping[str, np.ndarray], errors: np.ndarray) -> dict[str, Correlation]:
    """Return the correlation of each score with errors.

    Args:
        scores: name to the values of the networks, larger is better; `REFERENCE` is among them.
        errors: of the networks.
    """
    draws = np.random.default_rng(SEED).integers(0, len(errors), (RESAMPLES, len(errors)))
    target = -errors
    reference = spearman(scores[REFERENCE], target)
    drawn_reference = spearman(scores[REFERENCE][draws], target[draws])
    found = {}
    for name, values in scores.items():
        drawn = spearman(values[draws], target[draws])
        own = float(spearman(values, target))
        found[name] = Correlation(
            own, float(kendall(values, target)), *_interval(drawn),
            own - float(reference), *_interval(drawn - drawn_reference),
        )  # fmt: skip
    return found


def _interval(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    return (float("nan"),) * 2 if not len(known) else tuple(np.percentile(known, (2.5, 97.5)).tolist())


def correlations(path: Path) -> dict[str, dict[str, Correlation]]:
    """Return held-out error to validation score to correlation."""
    columns = read_table(path)
    scores = oriented_scores(columns)
    found = {}
    for outcome in OUTCOMES:
        ceiling = CEILING.get(outcome.replace("_tuned", ""), "")
        found[outcome] = correlate({**scores, CEILING_NAME: -columns[ceiling]}, columns[outcome])
    return found


def markdown(name: str, found: Mapping[str, Mapping[str, Correlation]], networks: int) -> str:
    """Return a table of one data set, the scores of the largest mean correlation first, equal ones in one row."""
    first = next(iter(found.values()))
    heads = " | ".join(OUTCOMES.values())
    lines = [
        f"{name}, {networks} networks",
        "",
        f"| score | {heads} | Kendall, {OUTCOMES['heldout/corrections']} |",
    ]
    lines.append("| --- |" + " --- |" * (len(OUTCOMES) + 1))
    rows: dict[str, list[str]] = {}
    for score in sorted(first, key=lambda score: -_mean(found, score)):
        cells = [*(_cell(found[outcome][score]) for outcome in OUTCOMES), _number(first[score].kendall)]
        rows.setdefault(" | ".join(cells), []).append(f"`{score}`" if score != CEILING_NAME else score)
    lines += [f"| {', '.join(scores)} | {cells} |" for cells, scores in rows.items()]
    return "\n".join(lines) + "\n"


def _mean(found: Mapping[str, Mapping[str, Correlation]], score: str) -> float:
    values = [row[score].spearman for row in found.values()]
    return -2.0 if np.isnan(values).all() else float(np.nanmean(values))


def _cell(value: Correlation) -> str:
    if np.isnan(value.spearman):
        return "–"
    mark = "**" if value.better_than_dice else ""
    return f"{mark}{value.spearman:.2f}{mark} ({value.low:.2f} to {value.high:.2f})"


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


ROW, LEFT, PANEL, TOP = 17, 190, 190, 46
COLOURS = {"heldout/corrections": "#1b6ca8", "heldout/voi": "#d1603d"}


def picture(sets: Mapping[str, Mapping[str, Mapping[str, Correlation]]], scores: Sequence[str]) -> str:
    """Return an SVG: a panel per data set, a row per score, a dot and its interval per error."""
    width, height = LEFT + PANEL * len(sets) + 20, TOP + ROW * len(scores) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for row, score in enumerate(scores):
        y = TOP + ROW * row + 4
        weight = ' font-weight="bold"' if score == REFERENCE else ""
        parts.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end"{weight}>{escape(score)}</text>')
    for column, (name, found) in enumerate(sets.items()):
        parts += _panel(LEFT + PANEL * column + 10, name, found, scores)
    for number, (outcome, colour) in enumerate(COLOURS.items()):
        x = 12 + 110 * number
        parts.append(f'<circle cx="{x}" cy="{height - 12}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 8}" y="{height - 8}">{OUTCOMES[outcome]}</text>')
    return "".join(parts) + "</svg>\n"


def _panel(
    left: float, name: str, found: Mapping[str, Mapping[str, Correlation]], scores: Sequence[str]
) -> list[str]:
    inner, bottom = PANEL - 20, TOP + ROW * len(scores)

    def place(value: float) -> float:
        return left + inner * (value + 1) / 2

    parts = [
        f'<text x="{left + inner / 2}" y="16" text-anchor="middle" font-weight="bold">{escape(name)}</text>'
    ]
    for tick in (-1, -0.5, 0, 0.5, 1):
        x = place(tick)
        parts.append(f'<path d="M{x:.1f} {TOP - 10}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP - 14}" text-anchor="middle" fill="#555">{tick:g}</text>')
    for number, (outcome, colour) in enumerate(COLOURS.items()):
        for row, score in enumerate(scores):
            value = found[outcome].get(score)
            if value is None or np.isnan(value.spearman):
                continue
            y = TOP + ROW * row + 6 * number - 3
            parts.append(
                f'<path d="M{place(value.low):.1f} {y}H{place(value.high):.1f}" stroke="{colour}" '
                f'stroke-opacity="0.5"/><circle cx="{place(value.spearman):.1f}" cy="{y}" r="3" fill="{colour}"/>'
            )
    return parts


def main() -> None:
    """Print a table per data set, and write them and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", type=Path, nargs="+", help="CSV files of ranking.py")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    parser.add_argument("--picture", type=Path, help="write an SVG to this file")
    options = parser.parse_args()
    sets = {path.stem.removeprefix("ranking_"): correlations(path) for path in options.tables}
    sizes = [len(next(iter(read_table(path).values()))) for path in options.tables]
    text = "\n".join(markdown(name, sets[name], size) for name, size in zip(sets, sizes, strict=True))
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.picture:
        known = [
            score
            for found in sets.values()
            for outcome in COLOURS
            for score, value in found[outcome].items()
            if not np.isnan(value.spearman)
        ]
        scores = list(dict.fromkeys(known))
        options.picture.write_text(picture(sets, scores), encoding="utf-8")


if __name__ == "__main__":
    main()
