"""Differences of models scored on the same cases, with bootstrap intervals over the cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from volumen.evaluation.cases import Evaluation
from volumen.evaluation.score import bootstrap
from volumen.metrics.score_names import direction_of

FEWEST = 6
"""Fewest cases for a verdict: five equal signs occur by chance with probability 1/16, six with 1/32."""


@dataclass(frozen=True)
class Difference:
    """A score of two models on the same cases.

    Args:
        first, other: mean of each model over these cases.
        mean: mean of the differences, other minus first.
        interval: 95 % bootstrap interval of the mean over cases; None for fewer than two cases.
        cases: difference by case, for cases in which both scores are defined.
    """

    first: float
    other: float
    mean: float
    interval: tuple[float, float] | None
    cases: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Scores of several models.

    Args:
        evaluations: scores by model; the other models are compared with the first.
        folders: folder of the model's report by model, below the folder of the comparison.
        differences: difference by model (except the first) and key of a score.
        left_out: by model, the cases that only it or only the first model has, as `<case>/<target>`.
    """

    evaluations: dict[str, Evaluation] = field(repr=False)
    folders: dict[str, str]
    differences: dict[str, dict[str, Difference]] = field(repr=False)
    left_out: dict[str, tuple[str, ...]]

    @property
    def first(self) -> str:
        """The model with which the others are compared."""
        return next(iter(self.evaluations))

    def verdict(self, model: str, key: str) -> str:
        """Return whether a model is "better" or "worse" than the first by a score.

        A verdict requires enough cases and an interval that excludes 0; otherwise the result is "few cases" or
        "not shown". It is "" for a score without a better direction.
        """
        found, smaller = self.differences[model][key], direction_of(key)
        if smaller is None:
            return ""
        if len(found.cases) < FEWEST or found.interval is None:
            return "few cases"
        low, high = found.interval
        if low <= 0 <= high:
            return "not shown"
        return "better" if (high < 0) == smaller else "worse"


def differences(first: Evaluation, other: Evaluation, seed: int = 0) -> dict[str, Difference]:
    """Return the differences of the scores that both models have.

    Args:
        first: scores of one model.
        other: scores of the model that is compared with it.
        seed: seed of the bootstrap.
    """
    found = {}
    for key in first.mean:
        if key == "mean_dice" or key not in other.mean:
            continue
        pairs = _defined_in_both(key, first.cases, other.cases)
        paired = {name: b - a for name, (a, b) in pairs.items()}
        means = [_mean([pair[side] for pair in pairs.values()]) for side in (0, 1)]
        values = list(paired.values())
        found[key] = Difference(means[0], means[1], _mean(values), bootstrap(values, seed), paired)
    return found


def _defined_in_both(
    key: str, first: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[float, float]]:
    pairs = {
        name: (row.get(key, math.nan), other[name].get(key, math.nan))
        for name, row in first.items()
        if name in other
    }
    return {name: pair for name, pair in pairs.items() if not any(map(math.isnan, pair))}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
