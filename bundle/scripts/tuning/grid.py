"""The settings that are tried, and which of them is chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Settings = dict[str, float]
"""Value of each setting by its name in `inference_config`, or in `inference_config.instances`."""
Grid = dict[str, tuple[float, ...]]
"""Ascending values of each setting; the default is one of them."""

SAME = 1e-9
"""Scores that differ by no more, relative to their size, count as equal."""


@dataclass(frozen=True)
class Trial:
    """One try.

    Args:
        checkpoint: path of the checkpoint.
        settings: value of each setting.
        value: the score; NaN where it is undefined.
    """

    checkpoint: str
    settings: Settings
    value: float


def make_grid(values: Mapping[str, Sequence[float]], default: Mapping[str, float]) -> Grid:
    """Return the values of each setting in ascending order, each once, the default among them.

    Args:
        values: setting to the values to try.
        default: setting to its default.
    """
    return {name: tuple(sorted({*values[name], default[name]})) for name in default}


def candidates(grid: Grid) -> list[Settings]:
    """Return all combinations of a grid; the values of the last setting change fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def choose(trials: Sequence[Trial], default: Trial, grid: Grid, *, smaller: bool) -> Trial:
    """Return the trial with the best score.

    Of equal scores that of the default's checkpoint wins, then that with the fewest changed settings, then that with
    the fewest steps of the grid between its settings and the default, then the first one. Undefined scores never win
    against defined ones.

    Args:
        trials: all trials, the default among them.
        default: the trial with the default settings.
        grid: the values that were tried.
        smaller: whether smaller scores are better.
    """
    known = [trial for trial in trials if not math.isnan(trial.value)]
    if not known:
        return default
    values = [trial.value for trial in known]
    top = min(values) if smaller else max(values)
    tied = [trial for trial in known if math.isclose(trial.value, top, rel_tol=SAME, abs_tol=1e-12)]

    def distance(trial: Trial) -> tuple[bool, int, int]:
        steps = [
            abs(axis.index(trial.settings[name]) - axis.index(default.settings[name]))
            for name, axis in grid.items()
        ]
        return trial.checkpoint != default.checkpoint, sum(step > 0 for step in steps), sum(steps)

    return min(tied, key=distance)
