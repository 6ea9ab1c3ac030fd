"""Metrics of every target and class, accumulated over cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volumen.metrics.centreline import cldice, cldice_counts
from volumen.metrics.overlap import dice, iou, overlap_counts
from volumen.metrics.partition import adapted_rand_error, add_pairs, pair_counts, vi_merge, vi_split
from volumen.metrics.regression import absolute_sums, angle_sums, mean
from volumen.metrics.surface import hausdorff, surface_dice, surface_dice_counts, surface_distances
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

LABEL_METRICS = ("dice", "iou", "surface_dice", "hd95", "cldice")
DIRECTION_METRICS = ("angular_error",)
VALUE_METRICS = ("mae",)
INSTANCE_METRICS = ("adapted_rand_error", "vi_split", "vi_merge")
ALL_METRICS = LABEL_METRICS + DIRECTION_METRICS + VALUE_METRICS + INSTANCE_METRICS
# Those that need one pass over the arrays, cheap enough for every validation.
CHEAP_METRICS = ("dice", "iou", "angular_error", "mae")
# Those that look around a voxel: only a whole region shows them, and they take seconds a volume.
REGION_METRICS = ("surface_dice", "hd95", "cldice")
SMALLER_IS_BETTER = ("hd95", *DIRECTION_METRICS, *VALUE_METRICS, *INSTANCE_METRICS)
# All cases go under one key when they are pooled.
_POOL = "pooled"


def metrics_of(kind: str) -> tuple[str, ...]:
    """Return the metrics that make sense for a kind of target; overlap is never measured on a regression."""
    if kind in ("binary", "multiclass", "multilabel"):
        return LABEL_METRICS
    if kind == "instances":
        return INSTANCE_METRICS
    return DIRECTION_METRICS if kind in ("vector", "axis") else VALUE_METRICS


def smaller_is_better(key: str) -> bool:
    """Return which way is better for a key of `TargetMetrics.compute`, such as "membrane/hd95"."""
    return "/" in key and key.split("/")[1] in SMALLER_IS_BETTER


# How the sums of each metric become its value.
_VALUE: dict[str, Callable[[np.ndarray], float]] = {
    "dice": dice,
    "iou": iou,
    "surface_dice": surface_dice,
    "hd95": mean,
    "cldice": cldice,
    "angular_error": mean,
    "mae": mean,
    "adapted_rand_error": adapted_rand_error,
    "vi_split": vi_split,
    "vi_merge": vi_merge,
}


@dataclass(frozen=True)
class _Target:
    name: str
    kind: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    labelled: bool = True


class TargetMetrics:
    """Accumulates metrics per target and class over cases.

    Each metric is a function of sums that add up over the parts of a case, so a case may come in pieces (HD95
    of pieces is averaged over them, which a whole case is not). `compute` gives the mean over cases; a case
    without any known voxel of a target does not count there, and neither does an undefined value (NaN: truth
    and prediction both empty). With `pool` all cases are one, which suits random patches, where single ones
    are often empty.

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
        tolerance: float,
        threshold: float,
        pool: bool,
    ) -> None:
        self.targets = {target.name: target for target in targets}
        self.spacing = None if spacing is None else tuple(float(s) for s in spacing)
        self.tolerance = tolerance
        self.threshold = threshold
        self.pool = pool
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
    ) -> None:
        if known is not None and not known.any():
            return
        if target.metrics and target.metrics[0] in LABEL_METRICS:
            for label, found, wanted in self._label_pairs(target, pred, truth):
                for metric, sums in self._label_sums(target, found, wanted, known, spacing):
                    self._store(target.name, metric, label, case, weight * sums)
        elif "angular_error" in target.metrics:
            sums = angle_sums(pred, truth, known, signed=target.kind == "vector")
            self._store(target.name, "angular_error", "", case, weight * sums)
        elif target.kind == "instances":
            pairs = pair_counts(pred[0], truth[0], known)
            for metric in target.metrics:
                self._store(target.name, metric, "", case, pairs)
        elif "mae" in target.metrics:
            self._store(target.name, "mae", "", case, weight * absolute_sums(pred, truth, known))

    def _store(self, name: str, metric: str, label: str, case: Hashable, sums: np.ndarray) -> None:
        cases = self._sums.setdefault((name, metric, label), {})
        if case not in cases:
            cases[case] = sums
        else:
            cases[case] = add_pairs(cases[case], sums) if metric in INSTANCE_METRICS else cases[case] + sums

    def _label_pairs(
        self, target: _Target, pred: np.ndarray, truth: np.ndarray
    ) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Return (class name, predicted mask, true mask) for every class but a background."""
        if target.kind != "multiclass":
            return [
                (label, pred[i] >= self.threshold, truth[i] > 0) for i, label in enumerate(target.classes)
            ]
        index = pred[0] if pred.shape[0] == 1 else pred.argmax(axis=0)
        return [(label, index == i, truth[0] == i) for i, label in enumerate(target.classes, start=1)]

    def _label_sums(
        self,
        target: _Target,
        pred: np.ndarray,
        truth: np.ndarray,
        known: np.ndarray | None,
        spacing: Sequence[float] | None,
    ) -> list[tuple[str, np.ndarray]]:
        found: list[tuple[str, np.ndarray]] = []
        wanted = target.metrics
        if "dice" in wanted or "iou" in wanted:
            counts = overlap_counts(pred, truth, known)
            found += [(name, counts) for name in ("dice", "iou") if name in wanted]
        if "surface_dice" in wanted or "hd95" in wanted:
            distances = surface_distances(pred, truth, spacing, known)
            if "surface_dice" in wanted:
                found.append(("surface_dice", surface_dice_counts(distances, self.tolerance)))
            if "hd95" in wanted:
                value = hausdorff(distances)
                found.append(("hd95", np.array([0.0, 0.0] if math.isnan(value) else [value, 1.0])))
        if "cldice" in wanted:
            found.append(("cldice", cldice_counts(pred, truth, known)))
        return found

    def per_case(self) -> dict[Hashable, dict[str, float]]:
        """Return the values of each case, NaN where undefined, keyed as in `compute`."""
        rows: dict[Hashable, dict[str, float]] = {}
        for (name, metric, label), cases in self._sums.items():
            for case, sums in cases.items():
                key = self._key(name, metric, label)
                rows.setdefault(case, {})[key] = _VALUE[metric](sums)
        for row in rows.values():
            self._add_class_means(row)
        return rows

    def compute(self) -> dict[str, float]:
        """Return every metric as its mean over cases; NaN where no case defines it. Keys: see the class."""
        result: dict[str, float] = {}
        for target in self.targets.values():
            for metric in target.metrics:
                for label in target.classes:
                    cases = self._sums.get((target.name, metric, label), {})
                    values = [_VALUE[metric](sums) for sums in cases.values()]
                    result[self._key(target.name, metric, label)] = _nanmean(values)
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
            self._store(name, metric, label, key, np.asarray(sums, dtype=np.float64))


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
) -> TargetMetrics:
    """Choose the metrics of each target by its kind.

    Args:
        targets: name -> {"kind", "out_channels", "classes"=None, "source_target"=None}; classes are the names of all
            K classes, or of the K - 1 without the background ("multiclass"), or of the channels ("multilabel"); one
            with a source target is derived, so it does not enter the mean Dice.
        spacing: voxel size in spatial order, the unit of surface metrics; None is 1.
        names: of `ALL_METRICS`; None: all that make sense. `CHEAP_METRICS` leaves out what takes seconds a
            volume.
        tolerance: of the surface Dice, in units of the spacing; None: the smallest spacing, one voxel.
        threshold: probability from which on a voxel of "binary" and "multilabel" is foreground.
        pool: see `TargetMetrics`.

    Raises:
        VolumenError: an unknown metric, kind or number of class names.
    """
    wanted = ALL_METRICS if names is None else tuple(names)
    unknown = [name for name in wanted if name not in ALL_METRICS]
    if unknown:
        raise VolumenError(
            "metrics",
            expected=f"some of {', '.join(ALL_METRICS)}",
            found=", ".join(unknown),
            remedy=closest(unknown[0], ALL_METRICS),
        )
    built = []
    for name, target in targets.items():
        kind = target["kind"]
        metrics = tuple(metric for metric in metrics_of(kind) if metric in wanted)
        labelled = target.get("source_target") is None
        built.append(_Target(name, kind, _class_names(name, kind, target), metrics, labelled))
    if tolerance is None:
        tolerance = min(spacing) if spacing else 1.0
    return TargetMetrics(built, spacing, tolerance=tolerance, threshold=threshold, pool=pool)


def _class_names(name: str, kind: str, target: Mapping[str, Any]) -> tuple[str, ...]:
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
