"""Scores several models on the same labels; refuses models whose scores are not comparable."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from volumen.evaluation.cases import ScoredCase
from volumen.evaluation.comparison_report import comparison_csv, comparison_json, render_comparison
from volumen.evaluation.differences import Comparison, differences
from volumen.evaluation.pairing import Pairs, agreed, find_pairs
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import check_request, score_pairs
from volumen.metrics.score_names import family_of
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

logger = logging.getLogger(__name__)

_NOT_PLAIN = re.compile(r"[^-.\w]+")


def compare(predictions: Sequence[str], request: EvaluateRequest) -> Comparison:
    """Score the predictions of several models, and write the report.

    The report consists of `metrics.json`, `metrics.csv` and `report.html`, and a subfolder per model with its report.

    Args:
        predictions: path of each model's predictions; the other models are compared with the first.
        request: what to score, and how; its own `predictions` is not used.

    Raises:
        VolumenError: as `evaluate`; or models would be scored on different voxels or by different rules.
    """
    check_request(request)
    names = model_names(predictions)
    folders = {name: f"{place}_{_NOT_PLAIN.sub('_', name)}" for place, name in enumerate(names, 1)}
    requests = {
        name: replace(request, predictions=path, output=str(Path(request.output) / folders[name]))
        for name, path in zip(names, predictions, strict=True)
    }
    pairs = {name: find_pairs(requests[name]) for name in names}
    first, *others = names
    for name in others:
        pairs[name] = replace(pairs[name], cases=_named_alike(pairs[first].cases, pairs[name].cases))
    pairs = _with_equal_classes(pairs)
    for name in others:
        _refuse_incomparable(pairs[first].cases, pairs[name].cases, request)
    evaluations = {name: score_pairs(pairs[name], requests[name]) for name in names}
    comparison = Comparison(
        evaluations,
        folders,
        {name: differences(evaluations[first], evaluations[name], request.seed) for name in others},
        {name: _unshared(pairs[first], pairs[name]) for name in others},
    )
    for name, cases in comparison.left_out.items():
        if cases:
            logger.warning(
                "%s: not compared with %s, as one of them lacks it: %s", name, first, ", ".join(cases)
            )
    if distributed.is_main():
        output = Path(request.output)
        write_atomically(output / "metrics.json", comparison_json(comparison).encode())
        write_atomically(output / "metrics.csv", comparison_csv(comparison).encode())
        write_atomically(output / "report.html", render_comparison(comparison).encode())
    return comparison


def model_names(predictions: Sequence[str]) -> list[str]:
    """Return a short name for each path: the fewest last parts that distinguish it, without a common end.

    Raises:
        VolumenError: the same path twice.
    """
    parts = [Path(path).resolve().parts for path in predictions]
    if len(set(parts)) < len(parts):
        twice = next(path for place, path in enumerate(predictions) if parts[place] in parts[:place])
        raise VolumenError("-p", expected="predictions of different models", found=f"{twice} twice")
    # For base/predictions and tuned/predictions, the names are base and tuned.
    while len({part[-1] for part in parts}) == 1 and all(len(part) > 2 for part in parts):
        parts = [part[:-1] for part in parts]
    count = 1
    while len({part[-count:] for part in parts}) < len(parts):
        count += 1
    return ["/".join(part[-count:]).strip("/") for part in parts]


def _named_alike(first: Sequence[ScoredCase], other: Sequence[ScoredCase]) -> list[ScoredCase]:
    """Return cases with the names that the first model has for the same labels.

    A single prediction of a single label may have any name, so that two models may have different names for it.
    """
    taken = {case.name for case in first}
    names = {case.label.path: case.name for case in first}
    return [
        case if case.name in taken else replace(case, name=names.get(case.label.path, case.name))
        for case in other
    ]


def _with_equal_classes(pairs: Mapping[str, Pairs]) -> dict[str, Pairs]:
    """Give the label maps of all models the same classes: a model without a class is scored for it too."""
    maps = [
        case
        for found in pairs.values()
        for case in found.cases
        if case.kind in ("binary", "multiclass") and not case.scale and case.truth is None
    ]
    read_alike = dict(zip(map(id, maps), agreed(maps), strict=True))
    return {
        name: replace(found, cases=[read_alike.get(id(case), case) for case in found.cases])
        for name, found in pairs.items()
    }


def _unshared(first: Pairs, other: Pairs) -> tuple[str, ...]:
    sets = [{f"{case.name}/{case.target}" for case in pairs.cases} for pairs in (first, other)]
    return tuple(sorted(sets[0] ^ sets[1]))


def _refuse_incomparable(
    first: Sequence[ScoredCase], other: Sequence[ScoredCase], request: EvaluateRequest
) -> None:
    """Refuse models that would be scored on different voxels, or by different rules.

    Raises:
        VolumenError: no case in common, or the first difference.
    """
    by_key = {(case.name, case.target): case for case in first}
    shared = [(by_key[case.name, case.target], case) for case in other if (case.name, case.target) in by_key]
    if not shared:
        raise VolumenError(
            other[0].prediction.path,
            expected=f"cases and targets of the first -p: {', '.join(sorted('/'.join(key) for key in by_key)[:3])}",
            found=", ".join(sorted(f"{case.name}/{case.target}" for case in other)[:3]),
        )
    for one, two in shared:
        for what, values, remedy in _rules(one, two, request):
            if len(set(values)) > 1:
                raise VolumenError(
                    two.prediction.path,
                    expected=f"{what} as in {one.prediction.path}: {values[0]}",
                    found=str(values[-1]),
                    remedy=remedy,
                )
        if not _same_truth(one, two):
            raise VolumenError(
                two.prediction.path,
                f"the models derive {two.target} differently, so its scores do not compare",
                remedy="name the targets to compare as --targets",
            )


def _rules(
    one: ScoredCase, two: ScoredCase, request: EvaluateRequest
) -> list[tuple[str, tuple[object, ...], str]]:
    """Return the properties that must be equal: name, values of both models, and a remedy."""
    spacings = () if request.spacing else tuple(_voxel_size(case) for case in (one, two))
    return [
        ("label", (one.label.path, two.label.path), "give predictions of the same volumes"),
        (
            "region of the label",
            tuple(_box(case) for case in (one, two)),
            "predict the same region with both",
        ),
        (
            "kind of scores",
            tuple(family_of(case.kind) for case in (one, two)),
            "give --instances or --targets",
        ),
        ("number of classes", tuple(_classes(case) for case in (one, two)), "name the targets as --targets"),
        ("ignore label", (one.ignore, two.ignore), "give --ignore-label"),
        ("scored on labelled voxels alone", (one.labelled_only, two.labelled_only), "name other --targets"),
        ("voxel size", spacings, "give --spacing"),
    ]


def _same_truth(one: ScoredCase, two: ScoredCase) -> bool:
    if one.truth is None or two.truth is None:
        return one.truth is two.truth
    return one.truth.derives_like(two.truth)


def _classes(case: ScoredCase) -> int | None:
    """Return the number of channels of a case's classes; None if it does not affect the scores."""
    return case.channels if case.kind in ("multiclass", "multilabel") else None


def _voxel_size(case: ScoredCase) -> str:
    if case.spacing is None:
        return "none"
    return f"{' x '.join(f'{side:g}' for side in case.spacing)} {case.unit or 'without a unit'}"


def _box(case: ScoredCase) -> str:
    return ", ".join(f"{part.start}:{part.stop}" for part in case.region)
