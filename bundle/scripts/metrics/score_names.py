"""Every score by name: of which targets it is, its unit, direction and range."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

LABELS, INSTANCES, DIRECTIONS, VALUES = "labels", "instances", "directions", "values"
"""Families of targets: classes of voxels; numbered objects; vectors and axes; all other regressions."""

RENAMED = {"vi_split": "voi_split", "vi_merge": "voi_merge"}
"""Earlier names, which are still understood."""


@dataclass(frozen=True)
class Score:
    """A score.

    Args:
        name: as in metrics.json; where it has a parameter, what stands before it, with the "@".
        families: of the targets that it makes sense for.
        unit: of its values, "" for none.
        smaller: whether smaller is better; None: neither is.
        top: the largest value that it can have; the smallest is 0.
        pieces: whether its counts add up over any pieces of a volume without a look at neighbouring voxels.
        default: whether `volumen evaluate` measures it unasked.
        parameter: what the number behind "@" is, "" where there is none.
        low, high: range of the parameter.
        asked: parameters that are measured unasked.
    """

    name: str
    families: tuple[str, ...]
    unit: str = ""
    smaller: bool | None = False
    top: float = 1.0
    pieces: bool = False
    default: bool = True
    parameter: str = ""
    low: float = 0.0
    high: float = math.inf
    asked: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which it is measured unasked."""
        return tuple(f"{self.name}{value:g}" for value in self.asked) if self.parameter else (self.name,)


_BOTH = (LABELS, INSTANCES)
LENGTH = "unit of the spacing"
"""Unit of scores that are lengths."""


def _length(name: str) -> Score:
    return Score(name, (LABELS,), LENGTH, smaller=True, top=math.inf)


def _count(name: str, families: tuple[str, ...], unit: str, smaller: bool | None = True) -> Score:
    return Score(name, families, unit, smaller, math.inf)


def _window(name: str, unit: str) -> Score:
    return Score(
        name, (LABELS,), unit, True, math.inf, parameter="voxels of a window's side", low=2, asked=(64,)
    )  # fmt: skip


def _match(name: str, default: bool = True) -> Score:
    return Score(
        name, _BOTH, default=default, parameter="least intersection over union of a match", low=0.5, high=1,
        asked=(0.5,),
    )  # fmt: skip


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("dice", (LABELS,), pieces=True),
        Score("iou", (LABELS,), pieces=True),
        Score("surface_dice", (LABELS,)),
        Score("surface_dice@", (LABELS,), parameter="tolerance in voxels of the smallest side", asked=(1, 2)),
        _length("hd95"),
        _length("mean_surface_distance"),
        _length("mean_distance_to_truth"),
        _length("mean_distance_to_prediction"),
        Score("cldice", (LABELS,)),
        _count("b0_error", (LABELS,), "components"),
        _count("b1_error", (LABELS,), "tunnels"),
        _count("b2_error", (LABELS,), "cavities"),
        _window("b0_error@", "components"),
        _window("b1_error@", "tunnels"),
        _window("b2_error@", "cavities"),
        Score("adapted_rand_error", _BOTH, smaller=True),
        Score("voi_split", _BOTH, "bits", smaller=True, top=math.inf),
        Score("voi_merge", _BOTH, "bits", smaller=True, top=math.inf),
        _count("objects_true", _BOTH, "objects", None),
        _count("objects_predicted", _BOTH, "objects", None),
        _count("objects_broken", _BOTH, "objects"),
        _count("objects_merged", _BOTH, "objects"),
        _count("objects_missed", _BOTH, "objects"),
        _count("objects_added", _BOTH, "objects"),
        _match("precision@"),
        _match("recall@"),
        _match("f1@"),
        _match("ap@", default=False),
        Score("ap", _BOTH),
        Score("pq", _BOTH),
        Score("expected_run_length", (LABELS,), LENGTH, top=math.inf),
        Score("ece", (LABELS,), smaller=True, pieces=True),
        Score("average_precision", (LABELS,), pieces=True),
        Score("best_threshold", (LABELS,), smaller=None, pieces=True),
        Score("surface_challenge", (LABELS,), default=False),
        Score("angular_error", (DIRECTIONS,), "degrees", smaller=True, top=180.0, pieces=True),
        Score("mae", (VALUES,), "unit of the target", smaller=True, top=math.inf, pieces=True),
    )
}


VALIDATION_SCORES = tuple(
    f"{name}X" if score.parameter else name
    for name, score in SCORES.items()
    if LABELS in score.families and (not score.pieces or name in ("dice", "iou"))
)
"""Scores of labels that training can measure at a validation, with X in place of a parameter."""
VALIDATION_PATTERN = (
    "^(" + "|".join(name.replace("@X", r"@[0-9]+(\.[0-9]+)?") for name in VALIDATION_SCORES) + ")$"
)
"""What each of their names matches."""


def family_of(kind: str) -> str:
    """Return the family of a kind of target: overlap is never measured on a regression."""
    if kind in ("binary", "multiclass", "multilabel"):
        return LABELS
    if kind == "instances":
        return INSTANCES
    return DIRECTIONS if kind in ("vector", "axis") else VALUES


def split_name(name: str) -> tuple[str, float | None]:
    """Return the part of a score's name that `SCORES` knows, and its parameter: "f1@0.5" is "f1@" and 0.5."""
    base, at, number = name.partition("@")
    if not at:
        return name, None
    try:
        return base + at, float(number)
    except ValueError:
        return name, None


def is_score(name: str) -> bool:
    """Whether a name is that of a score, its parameter within range."""
    base, value = split_name(RENAMED.get(name, name))
    score = SCORES.get(base)
    if score is None:
        return False
    return value is None if not score.parameter else value is not None and score.low <= value <= score.high


def is_validation_score(name: str) -> bool:
    """Whether training can measure a score of labels of this name, its parameter within range, at a validation."""
    return is_score(name) and re.match(VALIDATION_PATTERN, name) is not None


def score_of(name: str) -> Score | None:
    """Return what is known of a score by its name, None for an unknown one."""
    return SCORES[split_name(RENAMED.get(name, name))[0]] if is_score(name) else None


def readable_names() -> list[str]:
    """Return all names, with a letter in place of a parameter."""
    return [f"{name}X" if score.parameter else name for name, score in SCORES.items()]


def checked_names(names: Sequence[str], key: str = "metrics") -> tuple[str, ...]:
    """Return names of scores by which they are known now, each once.

    Args:
        names: as a user gave them.
        key: where they were given, for the message.

    Raises:
        VolumenError: a name that is none.
    """
    for name in names:
        if not is_score(name):
            base, at, _ = name.partition("@")
            score = SCORES.get(f"{base}@")
            if at and score is not None:
                span = f"from {score.low:g}" + (f" to {score.high:g}" if score.high < math.inf else " on")
                raise VolumenError(key, expected=f"{base}@X, X the {score.parameter} {span}", found=name)
            known = readable_names()
            raise VolumenError(
                key, expected=f"some of {', '.join(known)}", found=name, remedy=closest(name, known)
            )
    return tuple(dict.fromkeys(RENAMED.get(name, name) for name in names))


def names_of(family: str, *, default: bool = True, pieces: bool | None = None) -> tuple[str, ...]:
    """Return the names that are measured unasked of a family of targets.

    Args:
        family: of `LABELS`, `INSTANCES`, `DIRECTIONS` and `VALUES`.
        default: False: those that must be asked for as well.
        pieces: only those whose `pieces` is this; None for both.
    """
    return tuple(
        name
        for score in SCORES.values()
        if family in score.families
        and (score.default or not default)
        and (pieces is None or score.pieces is pieces)
        for name in score.names
    )


def measures(name: str, family: str) -> bool:
    """Whether a score makes sense for a family of targets."""
    score = score_of(name)
    return score is not None and family in score.families


def smaller_is_better(key: str) -> bool:
    """Return which way is better for a key such as "membrane/hd95" or "val/cells/voi_split/2".

    Raises:
        VolumenError: a score of which neither way is better, such as a number of objects.
    """
    score = _of_key(key)
    if score is not None and score.smaller is None:
        raise VolumenError(key, "is no score by which a model can be chosen: neither way is better")
    return score is not None and bool(score.smaller)


def direction_of(key: str) -> bool | None:
    """Return True where smaller is better, False where larger is, None where neither is."""
    score = _of_key(key)
    return False if score is None else score.smaller


def _of_key(key: str) -> Score | None:
    parts = key.removeprefix("val/").split("/")
    return score_of(parts[1]) if len(parts) > 1 else None
