"""The benchmark that asks whether a validation score ranks networks: its statistics and its counts of errors."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("ties", [False, True])
def test_coefficients_equal_those_of_scipy(ties):
    from ranking_table import kendall, spearman

    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.normal(size=(2, 9))
        if ties:
            a, b = a.round(), b.round()
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
        assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    assert np.isnan(spearman(np.ones(5), np.arange(5)))


def test_a_score_that_counts_errors_ranks_and_its_opposite_does_not(tmp_path):
    from ranking_table import correlations

    errors = np.arange(10.0)
    dice = np.array([3, 1, 2, 5, 4, 0, 9, 7, 8, 6.0]) / 10
    columns = {"steps": errors, "loss": np.full(10, "Dice"), "valid/dice": dice, "valid/b1_error": errors**2}
    columns |= {"valid/ap": errors, "valid/pq": np.ones(10)}
    for key in ("corrections", "voi"):
        columns[f"valid_counted/{key}"] = errors
        columns |= {f"{part}/{key}": errors for part in ("heldout", "heldout_tuned")}
    path = tmp_path / "ranking_toy.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([columns, *zip(*columns.values(), strict=True)])
    found = correlations(path)["heldout/corrections"]
    assert found["b1_error"].spearman == pytest.approx(1)  # smaller is better
    assert found["ap"].spearman == pytest.approx(-1)
    assert np.isnan(found["pq"].spearman)
    expected = stats.spearmanr(dice, -errors).statistic
    assert found["b1_error"].gain == pytest.approx(1 - expected)
    assert found["b1_error"].better_than_dice
    assert not found["ap"].better_than_dice
    assert found["dice"].low <= expected <= found["dice"].high


def test_corrections_count_each_cut_and_join():
    """Three true objects in one predicted one, one in three pieces, one missed and one added: 2 + 2 + 1 + 1."""
    from ranking_sets import counted_errors

    from volumen.metrics.objects.contingency import overlaps

    truth, pred = np.zeros((2, 4, 80), np.int32)
    truth[:, 0:30] = np.repeat([1, 2, 3], 10)
    pred[:, 0:30] = 1
    truth[:, 30:60] = 4
    pred[:, 30:60] = np.repeat([2, 3, 4], 10)
    truth[:, 60:65] = 5
    pred[:, 70:75] = 5
    found = counted_errors([overlaps(pred, truth)])
    assert [found[name] for name in ("broken", "merged", "missed", "added")] == [1, 1, 1, 1]
    assert (found["errors"], found["corrections"]) == (4, 6)
    twice = counted_errors([overlaps(pred, truth)] * 2)
    assert twice["corrections"] == 12
    assert twice["voi"] == pytest.approx(found["voi"])


def test_windows_cover_a_volume_once():
    from ranking_sets import windows

    seen = np.zeros((5, 7), int)
    for window in windows(seen.shape, 3):
        seen[window] += 1
    assert (seen == 1).all()
