"""The summary of the simulated annotator counts the same seeds for all strategies."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def rows(seed, scores, rounds=2):
    start = [{"set": "s", "strategy": "start", "seed": seed, "round": "0", "dice": "0.1"}]
    return start + [
        {
            "set": "s",
            "strategy": strategy,
            "seed": seed,
            "round": str(number + 1),
            "dice": str(dice + 0.1 * number),
        }
        for strategy, dice in scores.items()
        for number in range(rounds)
    ]


def test_unfinished_seeds_are_left_out_of_the_means():
    from label_budget import STRATEGIES, finished_seeds, mean_over_rounds

    whole = rows("0", dict(zip(STRATEGIES, (0.5, 0.6, 0.4, 0.55), strict=True)))
    cut = rows("1", dict.fromkeys(STRATEGIES, 0.9))[:-1]
    assert finished_seeds([*whole, *cut]) == whole
    assert mean_over_rounds(whole)[2:] == [
        "| s | random | 0.550 |  |",
        "| s | foreground | 0.650 | +0.100 |",
        "| s | entropy | 0.450 | -0.100 |",
        "| s | power | 0.600 | +0.050 |",
    ]
