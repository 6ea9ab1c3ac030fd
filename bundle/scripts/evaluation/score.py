"""Scores of predictions against labels: per case, target and class, with bootstrap confidence intervals."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volumen.evaluation.cases import Evaluation, ScoredCase
from volumen.evaluation.pairing import Pairs, find_pairs
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.results import csv_text, json_text
from volumen.inference.windows.heads import PROBABILITIES
from volumen.metrics.score_names import checked_names, family_of, measures, names_of
from volumen.metrics.topology.counts import CONNECTIVITIES
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

if TYPE_CHECKING:
    from volumen.evaluation.cases import Details
    from volumen.evaluation.diagnosis import Diagnosis
    from volumen.metrics.objects.numbering import ObjectNumbers

logger = logging.getLogger(__name__)

RESAMPLES = 2000


MOST_NAMED = 10
"""So many names of what is missing are told; all are in `metrics.json`."""


ALL = "all"
"""Stands for every score, with the parameters that are usual."""


def evaluate(request: EvaluateRequest) -> Evaluation:
    """Score predictions and write the report (of several processes, the first).

    It is `metrics.json`, `metrics.csv`, `objects.csv`, `topology.csv`, `curves.csv` and `report.html`.

    Raises:
        VolumenError: nothing to score, shapes that differ, or an unknown metric.
    """
    check_request(request)
    return score_pairs(find_pairs(request), request)


def score_pairs(pairs: Pairs, request: EvaluateRequest) -> Evaluation:
    """Score pairs that were found, and write the report, see `evaluate`."""
    from volumen.evaluation.curves import curves_csv
    from volumen.evaluation.diagnostics.diagnose import empty_diagnosis
    from volumen.evaluation.diagnostics.files import write_files
    from volumen.evaluation.html.report import render_report
    from volumen.evaluation.nothing_to_score import refuse_nothing, warn_of_nothing
    from volumen.evaluation.place_tables import objects_csv, topology_csv
    from volumen.utils import distributed

    scored = pairs.cases
    ndim = len(scored[0].prediction.shape)
    if request.spacing is not None and len(request.spacing) != ndim:
        raise VolumenError(
            "--spacing", expected=f"{ndim} sizes, one per axis", found=", ".join(map(str, request.spacing))
        )
    diagnosis = empty_diagnosis(scored, request) if request.diagnostics else None
    evaluation = score(scored, request, diagnosis)
    refuse_nothing(scored[0].label.path, evaluation.seen)
    evaluation = replace(evaluation, unpredicted=pairs.unpredicted, unlabelled=pairs.unlabelled)
    _warn_of_missing(evaluation, request)
    if not distributed.is_main():
        return evaluation
    warn_of_nothing(evaluation.seen)
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    if diagnosis is not None:
        write_files(diagnosis, output)
    write_atomically(output / "metrics.json", json_text(evaluation).encode())
    write_atomically(output / "metrics.csv", csv_text(evaluation).encode())
    scales = {case.name: case.scale_of_voxels for case in scored}
    write_atomically(output / "objects.csv", objects_csv(evaluation.details, scales).encode())
    write_atomically(output / "topology.csv", topology_csv(evaluation.details, scales).encode())
    write_atomically(output / "curves.csv", curves_csv(evaluation.histograms).encode())
    write_atomically(output / "report.html", render_report(evaluation, worst=request.worst).encode())
    return evaluation


def check_request(request: EvaluateRequest) -> None:
    """Refuse numbers out of range, before anything is read.

    Raises:
        VolumenError: the number and its range, or a file in place of the report's folder.
    """
    if not 0 < request.threshold <= 1:
        raise VolumenError(
            "--threshold", expected="a probability above 0, at most 1", found=request.threshold
        )
    if request.tolerance is not None and not request.tolerance >= 0:
        raise VolumenError("--tolerance", expected="a length of at least 0", found=request.tolerance)
    if request.spacing is not None and not all(size > 0 for size in request.spacing):
        raise VolumenError("--spacing", expected="sizes above 0", found=", ".join(map(str, request.spacing)))
    if request.connectivity not in CONNECTIVITIES:
        raise VolumenError(
            "--connectivity", expected=" or ".join(CONNECTIVITIES), found=str(request.connectivity)
        )
    if request.metrics is not None:
        checked_names([name for name in request.metrics if name != ALL], "--metrics")
    output = Path(request.output)
    if output.exists() and not output.is_dir():
        raise VolumenError(
            output, expected="a folder for the report", found="a file", remedy="give another -o"
        )


def score(
    scored: Sequence[ScoredCase], request: EvaluateRequest, diagnosis: Diagnosis | None = None
) -> Evaluation:
    """Return the scores of cases, read piece by piece; of several processes each reads its share.

    Args:
        scored: what is compared.
        request: how.
        diagnosis: counts errors by geometry as well; None: nothing does.
    """
    from volumen.evaluation.case_scores import instance_details, score_regions
    from volumen.evaluation.diagnostics.diagnose import diagnose
    from volumen.evaluation.gather import gather, own_share, unite
    from volumen.evaluation.nothing_to_score import holds_anything, refuse_class_map
    from volumen.metrics.target_metrics import build_metrics

    names = _wanted(scored, request.metrics)
    targets = {case.target: case.as_target for case in scored}
    spacing = request.spacing or scored[0].spacing
    metrics = build_metrics(
        targets,
        spacing,
        names=names,
        tolerance=request.tolerance,
        threshold=request.threshold,
        connectivity=request.connectivity,
        border=request.surface_border,
    )
    details: dict[str, dict[str, dict[str, Details]]] = {}
    numbers: dict[str, dict[str, dict[str, ObjectNumbers]]] = {}
    seconds: dict[str, float] = {}
    seen: dict[str, list[int]] = {}
    for case in own_share(scored):
        size = request.spacing or case.spacing
        before = time.process_time()
        of_case = seen[f"{case.name}_{case.target}"] = [0, 0]
        for box in case.pieces():
            found, truth, known = case.read(box)
            _check_values(case, truth, known)
            of_case[0] += bool(known.any())
            of_case[1] += holds_anything(case, found, truth, known, request.threshold)
            metrics.update(
                {case.target: found[None]},
                {case.target: truth[None]},
                {case.target: known[None, None]},
                cases=[case.name],
                spacing=size,
                regions=False,
                start=[part.start for part in box],
            )
        costs = {"voxels": time.process_time() - before}
        if case.kind in PROBABILITIES:
            behind, named, regions = score_regions(case, metrics, size)
            costs |= regions
            numbers.setdefault(case.name, {})[case.target] = named
        else:
            table = metrics.tables(case.target).get(case.name)
            behind = {} if table is None else {"": instance_details(case, table, size)}
            if table is not None:
                refuse_class_map(case, table)
        if behind:
            details.setdefault(case.name, {})[case.target] = behind
        if diagnosis is not None:
            before = time.process_time()
            diagnose(case, metrics, size, diagnosis)
            costs["diagnostics"] = time.process_time() - before
        for part, cost in costs.items():
            seconds[part] = seconds.get(part, 0.0) + cost
    unite(metrics, scored)
    details, numbers, seconds, seen = gather(details, numbers, seconds, seen)
    if diagnosis is not None:
        diagnosis.gather()
    cases = {str(name): dict(sorted(row.items())) for name, row in metrics.per_case().items()}
    mean = _measured(metrics.compute(), cases)
    interval = {
        key: bootstrap([row.get(key, math.nan) for row in cases.values()], request.seed) for key in mean
    }
    counted = {target: metrics.histograms(target) for target in metrics.targets}
    settings = {
        "predictions": request.predictions,
        "labels": request.labels,
        "threshold": request.threshold,
        "tolerance": metrics.tolerance or min(spacing or (1.0,)),
        "connectivity": request.connectivity,
        "surface_border": request.surface_border,
        "spacing": None if spacing is None else list(spacing),
        "resamples": RESAMPLES,
        "seed": request.seed,
    }
    return Evaluation(
        mean, interval, dict(sorted(cases.items())), tuple(scored), settings, details=details, seconds=seconds,
        numbers=numbers, seen={name: (known, filled) for name, (known, filled) in seen.items()},
        diagnosis=diagnosis,
        histograms={target: classes for target, classes in counted.items() if classes},
    )  # fmt: skip


def _wanted(scored: Sequence[ScoredCase], names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names of the scores to measure, None for those that are measured unasked.

    Raises:
        VolumenError: a score that none of the targets can have.
    """
    if names is None:
        return None
    families = {case.target: family_of(case.kind) for case in scored}
    given = checked_names([name for name in names if name != ALL], "--metrics")
    for name in given:
        if not any(measures(name, family) for family in families.values()):
            told = ", ".join(f"{target} ({family})" for target, family in sorted(families.items()))
            known = dict.fromkeys(score for family in families.values() for score in names_of(family))
            raise VolumenError(
                "--metrics", expected=f"scores of {told}: {', '.join(known)}", found=name,
                remedy="leave it out, or score a target of its kind",
            )  # fmt: skip
    every = (name for family in families.values() for name in names_of(family, default=False))
    return tuple(dict.fromkeys([*(every if ALL in names else ()), *given]))


def _check_values(case: ScoredCase, truth: np.ndarray, known: np.ndarray) -> None:
    """Refuse labels with more classes than the prediction can have.

    Raises:
        VolumenError: a label above the highest class.
    """
    if case.kind != "multiclass" or case.truth is not None or case.channels < 2:
        return
    highest = int(truth[0].max(initial=0, where=known))
    if highest >= case.channels:
        raise VolumenError(
            case.label.path, expected=f"classes 0 to {case.channels - 1}, as the prediction's", found=highest,
            remedy=f"give --instances {case.target} where both number instances, or the ignore label or a mask",
        )  # fmt: skip


def _measured(mean: dict[str, float], cases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the means without scores of probabilities where labels were predicted."""
    found = {key for row in cases.values() for key in row}
    return {key: value for key, value in mean.items() if key == "mean_dice" or key in found or not cases}


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of the mean over resampled cases (Efron 1979).

    Args:
        values: one per case; NaN does not count.
        seed: of the resampling.

    Returns:
        (low, high), or None below two values.
    """
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = known[rng.integers(0, len(known), (RESAMPLES, len(known)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _warn_of_missing(evaluation: Evaluation, request: EvaluateRequest) -> None:
    """Warn of labels without a prediction and predictions without a label: they are in no mean."""
    for names, what, where in (
        (evaluation.unpredicted, "labels without a prediction", request.labels),
        (evaluation.unlabelled, "predictions without a label", request.predictions),
    ):
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            logger.warning(
                "%s: %s: %s%s; scored: %s",
                where,
                what,
                ", ".join(names[:MOST_NAMED]),
                more,
                evaluation.coverage,
            )
