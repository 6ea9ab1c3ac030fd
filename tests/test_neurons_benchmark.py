"""The benchmark of neurons by affinities: tuned on one half means measured on the other."""

from __future__ import annotations

from pathlib import Path

import pytest

BOX = ((0, 4), (10, 30), (0, 8))
HALVES = (((0, 4), (10, 20), (0, 8)), ((0, 4), (20, 30), (0, 8)))


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_columns_are_default_tuned_and_crossed():
    from neurons_affinities import CHOICES, Scores, Settings, best, cell, columns

    low, high, default = Settings(0.3, 0.5, 0), Settings(0.5, 0.7, 100), Settings()
    found = {
        BOX: {default: Scores(0.3, 1, 1), low: Scores(0.2, 1, 0.5), high: Scores(0.1, 2, 0.5)},
        HALVES[0]: {default: Scores(0.5, 2, 2), low: Scores(0.4, 1, 1), high: Scores(0.6, 3, 3)},
        HALVES[1]: {default: Scores(0.7, 4, 4), low: Scores(0.9, 5, 5), high: Scores(0.2, 0.5, 0.25)},
    }

    class Network:
        box = BOX

        def scores(self, method, part):
            return found[part]

    split, rand = CHOICES.values()
    by_voi, by_rand = columns(Network(), "affs", split), columns(Network(), "affs", rand)
    assert by_voi["default"] == [found[BOX][default]]
    assert by_voi["tuned"] == [found[BOX][low]]
    assert by_rand["tuned"] == [found[BOX][high]]
    assert by_voi["default, halves"] == [found[half][default] for half in HALVES]
    assert by_voi["crossed"] == [found[HALVES[0]][high], found[HALVES[1]][low]]
    assert cell(by_voi["crossed"]) == "4.000 + 4.000 = 8.000; 0.7500"
    equal = {high: Scores(0.1, 1, 1), low: Scores(0.1, 1, 1), default: Scores(0.1, 1, 1)}
    assert best(equal, split) == default


def test_the_default_settings_are_tried():
    from neurons_affinities import Settings, grid

    tried = list(grid())
    assert Settings() in tried
    assert len(set(tried)) == len(tried)
    assert [settings.threshold for settings in tried] == sorted(settings.threshold for settings in tried)
