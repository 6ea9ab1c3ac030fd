"""The scores of objects by name, from the table of their overlaps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from volumen.metrics.objects.errors import ObjectErrors, object_errors
from volumen.metrics.objects.matching import ObjectMatching, match_objects
from volumen.metrics.objects.partition import adapted_rand_error, voi_merge, voi_split
from volumen.metrics.score_names import split_name

_OF_TABLE: dict[str, Callable[[np.ndarray], float]] = {
    "adapted_rand_error": adapted_rand_error,
    "voi_split": voi_split,
    "voi_merge": voi_merge,
    "ap": lambda table: match_objects(table).mean_ap(),
    "pq": lambda table: match_objects(table).panoptic_quality(),
}
_OF_ERRORS: dict[str, Callable[[ObjectErrors], float]] = {
    "objects_true": lambda errors: float(errors.true),
    "objects_predicted": lambda errors: float(errors.predicted),
    "objects_broken": lambda errors: float(len(errors.broken)),
    "objects_merged": lambda errors: float(len(errors.merged)),
    "objects_missed": lambda errors: float(len(errors.missed)),
    "objects_added": lambda errors: float(len(errors.added)),
}
_OF_MATCHING: dict[str, Callable[[ObjectMatching, float], float]] = {
    "precision@": ObjectMatching.precision,
    "recall@": ObjectMatching.recall,
    "f1@": ObjectMatching.f1,
    "ap@": ObjectMatching.ap,
}


def object_score(name: str, table: np.ndarray, errors: ObjectErrors | None = None) -> float:
    """Return a score of objects, NaN where it is undefined.

    Args:
        name: of the score.
        table: as of `overlaps`.
        errors: wrong objects of the table, where they are known already.

    Raises:
        KeyError: the score is none of objects.
    """
    base, parameter = split_name(name)
    if base in _OF_ERRORS:
        return _OF_ERRORS[base](errors or object_errors(table))
    if base in _OF_MATCHING:
        return _OF_MATCHING[base](match_objects(table), float(parameter or 0))
    return _OF_TABLE[base](table)
