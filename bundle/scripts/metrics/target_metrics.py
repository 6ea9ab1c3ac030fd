"""Metrics of every target and class, accumulated over cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.metrics.label_scores import LabelSettings, score_masks
from volumen.metrics.objects.contingency import add_overlaps, overlaps
from volumen.metrics.objects.errors import object_errors
from volumen.metrics.objects.scores import object_score
from volumen.metrics.overlap import dice, iou, overlap_counts
from volumen.metrics.probabilities import (
    average_precision,
    best_threshold,
    expected_calibration_error,
    probability_counts,
)
from volumen.metrics.regression import absolute_sums, angle_sums, mean
from volumen.metrics.score_names import (
    DIRECTIONS,
    INSTANCES,
    LABELS,
    VALUES,
    checked_names,
    family_of,
    is_score,
    measures,
    names_of,
    score_of,
    smaller_is_better,
)
from volumen.metrics.topology.counts import Connectivity
from volumen.utils.errors import VolumenError

__all__ = ["CHEAP_METRICS", "TargetMetrics", "build_metrics", "is_score", "metrics_of", "smaller_is_better"]

# Those that need one pass over the arrays, cheap enough for every validation.
CHEAP_METRICS = ("dice", "iou", "angular_error", "mae")
# What all scores of objects follow from, in place of a metric's name.
_TABLE = "overlaps"
# All cases go under one key when they are pooled.
_POOL = "pooled"
_OVERLAP = {"dice": dice, "iou": iou}
_OF_PROBABILITIES: dict[str, Callable[[np.ndarray], float]] = {
    "ece": expected_calibration_error,
    "average_precision": average_precision,
    "best_threshold": best_threshold,
}


def metrics_of(kind: str) -> tuple[str, ...]:
    """Return the metrics that are measured unasked of a kind of target."""
    return names_of(family_of(kind))


def _value_of(metric: str, sums: np.ndarray) -> float:
    """Return the value of a metric from its sums, NaN where it is undefined."""
    if metric in _OVERLAP:
        return _OVERLAP[metric](sums)
    if metric in _OF_PROBABILITIES:
        return _OF_PROBABILITIES[metric](sums)
    return mean(sums)


@dataclass(frozen=True)
class _Target:
    name: str
    kind: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    labelled: bool = True

    @property
    def family(self) -> str:
        return family_of(self.kind)

    @property
    def region_metrics(self) -> tuple[str, ...]:
        """Metrics of labels that only a whole region shows."""
        found = (score_of(name) for name in self.metrics) if self.family == LABELS else ()
        return tuple(name for name, score in zip(self.metrics, found) if score and not score.pieces)


class TargetMetrics:
    """Accumulates metrics per target and class over cases.

    Most metrics are functions of sums that add up over the parts of a case, so a case may come in pieces. Scores of
    labels that look around a voxel (surfaces, skeletons, topology, objects) are those of a whole array; of a case that
    is too large for memory they come from `LabelScores`, by `put`. `compute` gives the mean over cases; a case without
    any known voxel of a target does not count there, and neither does an undefined value (NaN: truth and prediction
    both empty). With `pool` all cases are one, which suits random patches, where single ones are often empty.

    Keys of `compute`: "<target>/<metric>" (for several classes the mean over them),
    "<target>/<metric>/<class>" for each of several classes, and "mean_dice" over the labelled targets that have a
    Dice: heads that are derived from another target do not enter it.

    Build it with `build_metrics`.
    """

    def __init__(
        self,
        targets: Sequence[_Target],
        spacing: Sequence[float] | None,
        *,
        tolerance: float | None,
        threshold: float,
        pool: bool,
        connectivity: Connectivity = "26/6",
        border: bool = False,
    ) -> None:
        self.targets = {target.name: target for target in targets}
        self.spacing = None if spacing is None else tuple(float(s) for s in spacing)
        self.tolerance = tolerance
        self.threshold = threshold
        self.pool = pool
        self.connectivity = connectivity
        self.border = border
        self.reset()

    def reset(self) -> None:
        """Forget all cases."""
        self._sums: dict[tuple[str, str, str], dict[Hashable, np.ndarray]] = {}
        self._cases = 0

    def update(
        self,
        predictions: Mapping[str, Any],
        labels: Mapping[str, Any],
        masks: Mapping[str, Any] | None = None,
        *,
        cases: Sequence[Hashable] | None = None,
        spacing: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        regions: bool = True,
        start: Sequence[int] = (0, 0, 0),
    ) -> None:
        """Add samples.

        Args:
            predictions: target -> array or tensor (B, C, *spatial), activated: probabilities for labels
                ("multiclass" also class indices (B, 1, *spatial)), plain values for regressions. Targets
                without metrics here are skipped.
            labels: target -> (B, Ct, *spatial), class indices or 0/1 maps; values for regressions.
            masks: target -> (B, 1, *spatial) bool, voxels with a label; a missing one means all.
            cases: names of the samples' cases, to put pieces of one case together; None: each sample is a
                case.
            spacing: voxel size of these samples, instead of the one given at construction.
            weights: how often each sample counts, such as the blocks that a drawn one stands for; None: once. HD95 and
                instance scores are no sums over blocks, so they take no weight.
            regions: whether the samples are whole regions. False: they are pieces, of which metrics that look around a
                voxel are not taken.
            start: first voxel of the samples in their case, by which boxes around objects are those of the case.
        """
        masks = masks or {}
        sizes = {len(predictions[name]) for name in self.targets if name in predictions}
        if not sizes:
            raise VolumenError("predictions", expected=f"some of {', '.join(self.targets)}", found="none")
        size = sizes.pop()
        keys = [(self._cases + i) for i in range(size)] if cases is None else list(cases)
        if len(keys) != size:
            raise ValueError(f"{size} samples but {len(keys)} case names")
        self._cases += size
        shares = [1.0] * size if weights is None else [float(weight) for weight in weights]
        for name, target in self.targets.items():
            if name not in predictions or name not in labels:
                continue
            for i, key in enumerate(keys):
                mask = masks.get(name)
                self._add(
                    target,
                    _POOL if self.pool else key,
                    _array(predictions[name][i]),
                    _array(labels[name][i]),
                    None if mask is None else _array(mask[i])[0].astype(bool),
                    spacing or self.spacing,
                    shares[i],
                    regions,
                    start,
                )

    def _add(
        self,
        target: _Target,
        case: Hashable,
        pred: np.ndarray,
        truth: np.ndarray,
        known: np.ndarray | None,
        spacing: Sequence[float] | None,
        weight: float,
        regions: bool,
        start: Sequence[int],
    ) -> None:
        if known is not None and not known.any():
            return
        if target.family == LABELS:
            for label, found, wanted in self.label_masks(target.name, pred, truth):
                for metric, sums in self._label_sums(
                    target, found, wanted, known, spacing if regions else ()
                ):
                    # What looks around a voxel is a finished value, which does not add up.
                    share = weight if metric in _OVERLAP else 1
                    self._store(target.name, metric, label, case, share * sums)
            self._add_probabilities(target, case, pred, truth, known)
        elif target.family == DIRECTIONS and target.metrics:
            sums = angle_sums(pred, truth, known, signed=target.kind == "vector")
            self._store(target.name, "angular_error", "", case, weight * sums)
        elif target.family == INSTANCES and target.metrics:
            self._store(target.name, _TABLE, "", case, overlaps(pred[0], truth[0], known, start))
        elif target.family == VALUES and target.metrics:
            self._store(target.name, "mae", "", case, weight * absolute_sums(pred, truth, known))

    def put(self, name: str, label: str, case: Hashable, values: Mapping[str, float]) -> None:
        """Add finished values of a case.

        Args:
            name: the target.
            label: the class, "" where there is one.
            case: the case.
            values: metric to value, NaN where it is undefined.
        """
        for metric, value in values.items():
            self._store(name, metric, label, _POOL if self.pool else case, _finished(value))

    def _store(self, name: str, metric: str, label: str, case: Hashable, sums: np.ndarray) -> None:
        cases = self._sums.setdefault((name, metric, label), {})
        if case not in cases:
            cases[case] = sums
        elif self.targets[name].family == INSTANCES:
            cases[case] = add_overlaps([cases[case], sums])
        else:
            cases[case] = cases[case] + sums

    def label_masks(
        self, name: str, pred: np.ndarray, truth: np.ndarray
    ) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Return (class name, predicted mask, true mask) for every class of a target but a background.

        Args:
            name: the target.
            pred: (C, *spatial), probabilities, or class indices or masks.
            truth: (Ct, *spatial), class indices or masks.
        """
        target = self.targets[name]
        if target.kind != "multiclass":
            return [
                (label, pred[i] >= self.threshold, truth[i] > 0) for i, label in enumerate(target.classes)
            ]
        index = pred[0] if pred.shape[0] == 1 else pred.argmax(axis=0)
        return [(label, index == i, truth[0] == i) for i, label in enumerate(target.classes, start=1)]

    def settings(self, name: str, ndim: int, spacing: Sequence[float] | None) -> LabelSettings:
        """Return how the metrics of a target that look around a voxel are measured.

        Args:
            name: the target.
            ndim: axes of its volumes.
            spacing: voxel size; None is 1.
        """
        return LabelSettings(
            self.targets[name].region_metrics,
            tuple(float(side) for side in spacing or (1.0,) * ndim),
            self.tolerance if self.tolerance is not None else min(spacing or (1.0,)),
            self.connectivity,
            border=self.border,
        )

    def _label_sums(
        self,
        target: _Target,
        pred: np.ndarray,
        truth: np.ndarray,
        known: np.ndarray | None,
        spacing: Sequence[float] | None,
    ) -> list[tuple[str, np.ndarray]]:
        """Return the sums of a class; an empty spacing stands for a piece of a region."""
        found: list[tuple[str, np.ndarray]] = []
        counts = overlap_counts(pred, truth, known)
        found += [(name, counts) for name in _OVERLAP if name in target.metrics]
        if target.region_metrics and (spacing is None or len(spacing)):
            settings = self.settings(target.name, pred.ndim, spacing)
            values = score_masks(pred, truth, known, settings)
            found += [(name, _finished(value)) for name, value in values.items()]
        return found

    def _add_probabilities(
        self,
        target: _Target,
        case: Hashable,
        pred: np.ndarray,
        truth: np.ndarray,
        known: np.ndarray | None,
    ) -> None:
        """Count the probabilities of every class; decided labels have none."""
        wanted = [name for name in _OF_PROBABILITIES if name in target.metrics]
        if not wanted or not np.issubdtype(pred.dtype, np.floating):
            return
        first = 1 if target.kind == "multiclass" else 0
        if len(pred) < first + len(target.classes):
            return
        for i, label in enumerate(target.classes):
            positive = truth[0] == i + first if first else truth[i] > 0
            counts = probability_counts(pred[i + first], positive, known)
            for name in wanted:
                self._store(target.name, name, label, case, counts)

    def per_case(self) -> dict[Hashable, dict[str, float]]:
        """Return the values of each case, NaN where undefined, keyed as in `compute`."""
        rows: dict[Hashable, dict[str, float]] = {}
        for (name, metric, label), cases in self._values().items():
            for case, value in cases.items():
                rows.setdefault(case, {})[self._key(name, metric, label)] = value
        for row in rows.values():
            self._add_class_means(row)
        return rows

    def _values(self) -> dict[tuple[str, str, str], dict[Hashable, float]]:
        """Return target, metric and class to the values of the cases."""
        found: dict[tuple[str, str, str], dict[Hashable, float]] = {}
        for (name, metric, label), cases in self._sums.items():
            for case, sums in cases.items():
                if metric != _TABLE:
                    found.setdefault((name, metric, label), {})[case] = _value_of(metric, sums)
                    continue
                errors = object_errors(sums)
                for score in self.targets[name].metrics:
                    found.setdefault((name, score, label), {})[case] = object_score(score, sums, errors)
        return found

    def tables(self, name: str) -> dict[Hashable, np.ndarray]:
        """Return the overlaps of the objects of a target by case, see `overlaps`; {} where it numbers none."""
        return dict(self._sums.get((name, _TABLE, ""), {}))

    def histograms(self, name: str) -> dict[str, dict[str, np.ndarray]]:
        """Return the counts of probabilities of a target by class and case, see `probability_counts`.

        {} where decided labels came, or no score of probabilities is measured.
        """
        target = self.targets[name]
        metric = next((metric for metric in target.metrics if metric in _OF_PROBABILITIES), "")
        found = {label: self._sums.get((name, metric, label), {}) for label in target.classes}
        return {
            label: {str(case): counts for case, counts in cases.items()}
            for label, cases in found.items()
            if cases
        }

    def compute(self) -> dict[str, float]:
        """Return every metric as its mean over cases; NaN where no case defines it. Keys: see the class."""
        result: dict[str, float] = {}
        found = self._values()
        for target in self.targets.values():
            for metric in target.metrics:
                for label in target.classes:
                    values = found.get((target.name, metric, label), {}).values()
                    result[self._key(target.name, metric, label)] = _nanmean(list(values))
        self._add_class_means(result)
        dices = [
            result[f"{t.name}/dice"] for t in self.targets.values() if t.labelled and "dice" in t.metrics
        ]
        if dices:
            result["mean_dice"] = _nanmean(dices)
        return result

    def _key(self, name: str, metric: str, label: str) -> str:
        several = len(self.targets[name].classes) > 1
        return f"{name}/{metric}/{label}" if several else f"{name}/{metric}"

    def _add_class_means(self, values: dict[str, float]) -> None:
        for target in self.targets.values():
            if len(target.classes) < 2:
                continue
            for metric in target.metrics:
                keys = [self._key(target.name, metric, label) for label in target.classes]
                found = [values[key] for key in keys if key in values]
                if found:
                    values[f"{target.name}/{metric}"] = _nanmean(found)

    def state(self) -> dict[str, Any]:
        """Return the sums so far as plain lists, to be merged elsewhere (another process, another block)."""
        rows = [
            [*key, case, sums.tolist()] for key, cases in self._sums.items() for case, sums in cases.items()
        ]
        return {"cases": self._cases, "sums": rows}

    def merge(self, state: Mapping[str, Any], *, prefix: Hashable | None = None) -> None:
        """Add the sums of another accumulator.

        Args:
            state: what its `state` returned.
            prefix: told apart from this one's: unnamed cases of both would else be taken for the same; named
                cases that were split between the two want None.
        """
        for name, metric, label, case, sums in state["sums"]:
            key = case if prefix is None or case == _POOL else (prefix, case)
            # Tables of objects hold integers beyond what floating point tells apart.
            kind = np.int64 if self.targets[name].family == INSTANCES else np.float64
            self._store(name, metric, label, key, np.asarray(sums, dtype=kind).reshape(np.shape(sums)))


def _finished(value: float) -> np.ndarray:
    """Return a finished value as a sum and a count, which add up to a mean; none where it is undefined."""
    return np.array([0.0, 0.0] if math.isnan(value) else [value, 1.0])


def _nanmean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _array(x: Any) -> np.ndarray:
    """Return a numpy array of an array or a tensor on any device."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        # NumPy has no bfloat16.
        x = x.float() if x.is_floating_point() and x.element_size() < 4 else x
    return np.asarray(x)


def build_metrics(
    targets: Mapping[str, Mapping[str, Any]],
    spacing: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    tolerance: float | None = None,
    threshold: float = 0.5,
    pool: bool = False,
    connectivity: Connectivity = "26/6",
    border: bool = False,
) -> TargetMetrics:
    """Choose the metrics of each target by its kind.

    Args:
        targets: name -> {"kind", "out_channels", "classes"=None, "source_target"=None}; classes are the names of all
            K classes, or of the K - 1 without the background ("multiclass"), or of the channels ("multilabel"); one
            with a source target is derived, so it does not enter the mean Dice.
        spacing: voxel size in spatial order, the unit of surface metrics; None is 1.
        names: of metrics, see `volumen.metrics.score_names`; None: those that are measured unasked. `CHEAP_METRICS`
            leaves out what takes seconds a volume.
        tolerance: of the surface Dice, in units of the spacing; None: the smallest side of a voxel.
        threshold: probability from which on a voxel of "binary" and "multilabel" is foreground.
        pool: see `TargetMetrics`.
        connectivity: neighbourhoods of foreground and background in topology and objects.
        border: whether a surface is where the volume's border cuts a structure, as MONAI takes it.

    Raises:
        VolumenError: an unknown metric, kind or number of class names.
    """
    wanted = None if names is None else checked_names(names)
    built = []
    for name, target in targets.items():
        kind = target["kind"]
        family = family_of(kind)
        metrics = names_of(family) if wanted is None else tuple(n for n in wanted if measures(n, family))
        labelled = target.get("source_target") is None
        built.append(_Target(name, kind, class_names(name, kind, target), metrics, labelled))
    return TargetMetrics(
        built, spacing, tolerance=tolerance, threshold=threshold, pool=pool, connectivity=connectivity,
        border=border,
    )  # fmt: skip


def class_names(name: str, kind: str, target: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes that are scored, or one empty name for a regression."""
    if kind not in ("multiclass", "multilabel"):
        return ("",)
    count = int(target["out_channels"]) - (kind == "multiclass")
    given = [str(label) for label in target.get("classes") or ()]
    if not given:
        first = 1 if kind == "multiclass" else 0
        return tuple(str(i) for i in range(first, first + count))
    if len(given) == count + 1 and kind == "multiclass":
        given = given[1:]
    if len(given) != count:
        raise VolumenError(f"targets.{name}.classes", expected=f"{count} names", found=f"{len(given)}")
    return tuple(given)
