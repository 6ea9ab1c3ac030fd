"""Names of scores: parameters, families, settings of training, and the page that defines them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from volumen.metrics.score_names import (
    SCORES,
    VALIDATION_PATTERN,
    checked_names,
    family_of,
    is_score,
    names_of,
    split_name,
)
from volumen.utils.errors import VolumenError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "name", ["dice", "f1@0.5", "f1@1", "b0_error", "b0_error@64", "surface_dice@0", "vi_split"]
)
def test_names_are_known(name):
    assert is_score(name)


@pytest.mark.parametrize(
    "name", ["f1", "f1@", "f1@x", "f1@0.4", "dice@1", "b0_error@1", "surface_dice@-1", "blur"]
)
def test_names_are_refused(name):
    assert not is_score(name)
    with pytest.raises(VolumenError):
        checked_names([name])


def test_earlier_names_become_those_of_now_once():
    assert checked_names(["vi_split", "voi_split", "vi_merge"]) == ("voi_split", "voi_merge")
    assert split_name("f1@0.75") == ("f1@", 0.75)


def test_every_family_has_scores_of_its_own_kind():
    for kind in ("binary", "instances", "vector", "distance"):
        found = names_of(family_of(kind))
        assert found
        assert all(is_score(name) for name in found)
    assert "dice" not in names_of("instances")
    assert {"b0_error", "voi_split", "objects_merged", "ap"} <= set(names_of("labels"))


def test_training_takes_scores_of_decided_labels():
    for name in ("dice", "hd95", "f1@0.75", "b1_error@32", "surface_challenge"):
        assert re.match(VALIDATION_PATTERN, name)
    for name in ("ece", "f1", "f1@", "angular_error", "dice2", "hd95,dice"):
        assert not re.match(VALIDATION_PATTERN, name)


def test_the_page_defines_every_score():
    page = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    prose = page.split("<!-- end of table -->")[1]
    for name, score in SCORES.items():
        assert f"`{name}{'X' if score.parameter else ''}`" in prose, name
