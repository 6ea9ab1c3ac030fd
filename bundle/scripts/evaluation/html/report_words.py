"""Words and numbers of the report: units, directions, settings, and which score a case is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from volumen.inference.windows.heads import PROBABILITIES
from volumen.metrics.score_names import direction_of, smaller_is_better
from volumen.metrics.units import metric_unit

if TYPE_CHECKING:
    from volumen.evaluation.cases import Evaluation, ScoredCase


def metric_of(key: str) -> str:
    """Return the score of a key such as "membrane/hd95"."""
    return key if key == "mean_dice" else key.split("/")[1]


def direction(key: str, unit: str = "") -> str:
    """Return which way a metric is better, and its unit where it has one."""
    smaller = direction_of(key)
    word = "" if smaller is None else "smaller" if smaller else "larger"
    return "; ".join(part for part in (word, unit) if part)


def unit_of(key: str, evaluation: Evaluation) -> str:
    """Return the unit of a metric: that of the volumes for lengths, "" for shares."""
    case = next((case for case in evaluation.scored if case.target == key.split("/")[0]), None)
    if case is None:
        return ""
    return metric_unit(metric_of(key), case.kind, case.scale_of_voxels.unit or "voxels")


def number(value: float) -> str:
    """Return a value as tables show it, a dash where it is undefined."""
    return "–" if math.isnan(value) else readable(value)


def readable(value: float) -> str:
    """Return a score with the digits that matter: four places for shares, two for degrees and lengths."""
    places = 4 if abs(value) < 10 else 2
    return f"{value:.{places}f}" if abs(value) < 1000 else f"{value:.5g}"


def settings_in_words(settings: Mapping[str, Any], unit: str) -> dict[str, str]:
    """Return what shaped the scores, for people.

    Args:
        settings: those of an `Evaluation`.
        unit: of the voxel size, "" where it is not known.
    """
    spacing = settings["spacing"]
    foreground, background = settings["connectivity"].split("/")
    size = "not known: lengths count voxels"
    if spacing is not None and unit:
        size = f"{' × '.join(f'{side:g}' for side in spacing)} {unit}"
    border = "a surface, as MONAI takes it" if settings["surface_border"] else "no surface"
    words = {
        "predictions": settings.get("predictions"),
        "labels": settings["labels"],
        "foreground": f"from probability {settings['threshold']:g} on, where probabilities were predicted",
        "voxel size": size,
        "surface Dice": f"within {settings['tolerance']:g} {unit or 'voxels'} of the other surface",
        "cut by the border": f"where the volume's border cuts a structure is {border}",
        "neighbours": f"{foreground} of a foreground voxel, {background} of a background voxel (in an image 8 and 4)"
        if foreground == "26"
        else f"{foreground} of a foreground voxel, {background} of a background voxel (in an image 4 and 8)",
        "intervals": f"95 %, bootstrap over cases, {settings['resamples']} resamples, seed {settings['seed']}",
    }
    return {name: value for name, value in words.items() if value}


def leading_score(case: ScoredCase) -> tuple[str, str]:
    """Return the score by which cases of a kind are ordered, and what it is called."""
    if case.kind in PROBABILITIES:
        return "dice", "Dice"
    if case.kind == "instances":
        return "adapted_rand_error", "adapted Rand error"
    return ("angular_error", "angle") if case.kind in ("vector", "axis") else ("mae", "mean error")


def badness(evaluation: Evaluation, case: ScoredCase) -> float:
    """Return a number by which the worst case comes first, undefined ones last."""
    metric, _ = leading_score(case)
    value = evaluation.cases.get(case.name, {}).get(f"{case.target}/{metric}", math.nan)
    if math.isnan(value):
        return math.inf
    return -value if smaller_is_better(f"{case.target}/{metric}") else value
