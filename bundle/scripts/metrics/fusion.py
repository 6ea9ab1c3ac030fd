"""Fits how a label is read from several heads, and measures the gain on voxels that did not fit it.

The label's logit becomes bias + sum of weight * evidence. Each evidence is an output of a head with a sign such that
more of it speaks for the label: the target's own logit, minus the signed distance, the logit of an affinity. The
weights are at least 0, so the fusion is monotone in every head; they maximise the likelihood of the labels (logistic
regression). The bias then moves to where the Dice of the decision at 0 is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from volumen.utils.errors import VolumenError

CAPACITY = 200_000
"""Voxels of each half that are kept; with a dozen weights more would not change the fit."""
FEWEST = 1000
"""Voxels of foreground, and of background, that each half must have."""
LEAST_GAIN = 0.001
"""Gain of Dice from which on `auto` uses a fusion."""
HALVES = (0, 1)


@dataclass
class VoxelSample:
    """A random sample of voxels of two halves, drawn in one pass; its memory does not grow with the number of voxels.

    Each voxel gets an exponential random key divided by its weight, and the smallest keys of each half stay: a draw
    without replacement with probabilities that follow the weights (Efraimidis and Spirakis 2006).

    Args:
        columns: evidence values per voxel.
        capacity: voxels kept of each half.
        seed: of the draw.
    """

    columns: int
    capacity: int = CAPACITY
    seed: int = 0
    _rows: list[np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove all voxels, and draw as at the beginning."""
        self._rng = np.random.default_rng(self.seed)
        # Columns: key, label, evidence.
        self._rows = [np.empty((0, self.columns + 2), np.float32) for _ in HALVES]

    def add(self, evidence: np.ndarray, labels: np.ndarray, half: int, weight: float = 1.0) -> None:
        """Add voxels of a half.

        Args:
            evidence: (columns, n).
            labels: bool (n,).
            half: 0 or 1.
            weight: the number of voxels that each of these represents.
        """
        keys = self._rng.exponential(1 / weight, labels.size).astype(np.float32)
        kept = self._rows[half]
        if len(kept) == self.capacity:
            chosen = np.flatnonzero(keys < kept[:, 0].max())
        else:
            chosen = np.arange(labels.size)
        if len(chosen) > self.capacity:
            chosen = chosen[np.argpartition(keys[chosen], self.capacity - 1)[: self.capacity]]
        new = np.column_stack([keys[chosen], labels[chosen], evidence[:, chosen].T]).astype(np.float32)
        self._rows[half] = self._smallest(np.concatenate([kept, new[np.isfinite(new).all(axis=1)]]))

    def merge(self, rows: Sequence[np.ndarray]) -> None:
        """Add the sample of another process: its `rows`."""
        self._rows = [self._smallest(np.concatenate(pair)) for pair in zip(self._rows, rows, strict=True)]

    @property
    def rows(self) -> list[np.ndarray]:
        """The sample of each half: float32 (n, 2 + columns) with key, label and evidence."""
        return self._rows

    def half(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the evidence float64 (n, columns) and the labels bool (n,) of a half."""
        rows = self._rows[number]
        return rows[:, 2:].astype(np.float64), rows[:, 1] > 0

    def check(self, where: str) -> None:
        """Raise if a half has too few voxels of a class to fit anything.

        Raises:
            VolumenError: names the number.
        """
        counts = {
            f"{name} of half {number + 1}": int((self.half(number)[1] == value).sum())
            for number in HALVES
            for name, value in (("foreground", True), ("background", False))
        }
        part, count = min(counts.items(), key=lambda item: item[1])
        if count < FEWEST:
            raise VolumenError(
                where,
                expected=f"at least {FEWEST} known voxels of the {part} of the validation part to fit a fusion",
                found=count,
                remedy="validate on more (tr_setup.tr_val_split, max_val_steps_per_epoch), or set fuse: none",
            )

    def _smallest(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) <= self.capacity:
            return rows
        return rows[np.argpartition(rows[:, 0], self.capacity - 1)[: self.capacity]]


@dataclass(frozen=True)
class Gain:
    """What a fusion brings on the half that did not fit it, for both halves: Dice of the decisions.

    Args:
        alone: of the target's own head.
        moved: of the target's own head with the threshold that is best on the other half.
        fused: of the fusion that was fitted on the other half.
        by_half: fused minus the better of alone and moved, of each half.
        voxels: voxels of the sample.
    """

    alone: float
    moved: float
    fused: float
    by_half: tuple[float, float]
    voxels: int

    @property
    def gain(self) -> float:
        """Fused minus the better of alone and moved: what a threshold alone brings does not count."""
        return self.fused - max(self.alone, self.moved)

    @property
    def helps(self) -> bool:
        """Whether the gain is at least 0.001 and both halves gain."""
        return self.gain >= LEAST_GAIN and min(self.by_half) > 0

    def __str__(self) -> str:
        return (
            f"Dice {self.fused:.4f} fused, {self.alone:.4f} alone, {self.moved:.4f} alone with the best threshold"
            f" (gain {self.gain:+.4f}; halves {self.by_half[0]:+.4f}, {self.by_half[1]:+.4f}),"
            f" each half by a fit on the other"
        )


def fit(evidence: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return bias and weights of a fusion; its decision is bias + evidence @ weights >= 0.

    Args:
        evidence: float64 (n, columns).
        labels: bool (n,), both values occur.
    """
    bias, weights = fit_logistic(evidence, labels)
    score = evidence @ weights
    # Without any weight there is nothing to decide by: the likelihood's own bias stays.
    return (-best_threshold(score, labels) if weights.any() else bias), weights


def fit_logistic(evidence: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return bias and weights >= 0 that maximise the likelihood of the labels, (columns,) float64.

    The mean of log(1 + exp(-y z)), y = 1 or -1, is minimised over columns of unit deviation, with 1e-6 times the
    squared weights in addition, so that the minimum exists where classes can be separated.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    scale = np.maximum(evidence.std(axis=0), 1e-12)
    middle = evidence.mean(axis=0)
    x = (evidence - middle) / scale
    y = np.where(labels, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        bias, weights = parameters[0], parameters[1:]
        margin = y * (x @ weights + bias)
        slope = -y * expit(-margin) / len(y)
        value = np.logaddexp(0, -margin).mean() + 1e-6 * (weights @ weights)
        return value, np.concatenate([[slope.sum()], slope @ x + 2e-6 * weights])

    columns = x.shape[1]
    start = np.concatenate([[0.0], np.full(columns, 1 / columns)])
    bounds = [(None, None), *[(0.0, None)] * columns]
    found = minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-9},
    ).x
    weights = found[1:] / scale
    return float(found[0] - middle @ weights), weights


def best_threshold(score: np.ndarray, labels: np.ndarray) -> float:
    """Return the threshold t at which the Dice of the decision score >= t is best, midway between two scores."""
    order = np.argsort(-score, kind="stable")
    sorted_score = score[order]
    hits = np.cumsum(labels[order])
    dice = 2 * hits / (np.arange(1, len(score) + 1) + hits[-1])
    # A threshold cannot divide equal scores.
    last = np.append(sorted_score[1:] != sorted_score[:-1], True)
    place = int(np.argmax(np.where(last, dice, -1)))
    below = sorted_score[place + 1] if place + 1 < len(score) else sorted_score[place] - 1.0
    return float((sorted_score[place] + below) / 2)


def crossed_gain(sample: VoxelSample, own: int) -> Gain:
    """Return what fusions that were fitted on one half bring on the other.

    Args:
        sample: voxels of both halves, `check`ed.
        own: the column of the target's own logit.
    """
    counts = {name: np.zeros((2, 3)) for name in ("alone", "moved", "fused")}
    for number in HALVES:
        evidence, labels = sample.half(number)
        others, other_labels = sample.half(1 - number)
        bias, weights = fit(others, other_labels)
        threshold = best_threshold(others[:, own], other_labels)
        for name, decided in (
            ("alone", evidence[:, own] >= 0),
            ("moved", evidence[:, own] >= threshold),
            ("fused", bias + evidence @ weights >= 0),
        ):
            counts[name][number] = (decided & labels).sum(), decided.sum(), labels.sum()
    halves = {name: [_dice(row) for row in rows] for name, rows in counts.items()}
    by_half = tuple(
        halves["fused"][number] - max(halves["alone"][number], halves["moved"][number]) for number in HALVES
    )
    total = {name: _dice(rows.sum(axis=0)) for name, rows in counts.items()}
    voxels = sum(len(rows) for rows in sample.rows)
    return Gain(total["alone"], total["moved"], total["fused"], (by_half[0], by_half[1]), voxels)


def fitted_rule(
    sample: VoxelSample, heads: Mapping[str, Sequence[int]], numbers: Sequence[int] = HALVES
) -> dict[str, Any]:
    """Return the rule that halves together fit, as a network takes it.

    Args:
        sample: voxels, whose evidence has a column per channel of the heads, multiplied by its sign.
        heads: head to the sign of each channel.
        numbers: the halves, both by default.
    """
    evidence, labels = (np.concatenate(parts) for parts in zip(*map(sample.half, numbers)))
    bias, weights = fit(evidence, labels)
    columns = iter(weights.tolist())
    return {
        "bias": bias,
        "weights": {head: [sign * next(columns) for sign in signs] for head, signs in heads.items()},
    }


def _dice(counts: np.ndarray) -> float:
    hits, decided, true = counts
    return float(2 * hits / (decided + true)) if decided + true else 1.0
