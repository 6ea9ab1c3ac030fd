"""Right and wrong voxels counted by a quantity: fine counts that add up, and tables with round edges made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MOST_BINS = 12
"""Bins of a table between the 2nd and the 98th percentile."""
ENDS = 0.02
"""Share of voxels at each end that one open bin holds."""
_UNMEASURED = np.iinfo(np.int64).min
_HIT, _MISSED, _FALSE, _MISSED_AND_FALSE = range(4)


@dataclass(frozen=True)
class Bin:
    """Errors of the voxels whose quantity lies between two values.

    Args:
        low, high: from the first on, below the second; infinite at the open ends, NaN of voxels that were not measured.
        truth_voxels: voxels of the truth.
        missed: those of them that the prediction has wrong.
        predicted_voxels: voxels of the prediction.
        false: those of them that the truth has not.
    """

    low: float
    high: float
    truth_voxels: int
    missed: int
    predicted_voxels: int
    false: int

    @property
    def miss_rate(self) -> float:
        """Share of the truth that was missed, NaN without truth."""
        return self.missed / self.truth_voxels if self.truth_voxels else math.nan

    @property
    def false_rate(self) -> float:
        """Share of the prediction that is false, NaN without prediction."""
        return self.false / self.predicted_voxels if self.predicted_voxels else math.nan


def error_kinds(truth: np.ndarray, pred: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Return how each voxel is right or wrong, as `QuantityCounts.add` takes it: uint8, shape of the arrays.

    Args:
        truth, pred, hit: bool; whether a voxel is of the truth, is predicted, is predicted rightly.
    """
    wrong = np.where(truth & pred, _MISSED_AND_FALSE, np.where(truth, _MISSED, _FALSE))
    return np.where(hit, _HIT, wrong).astype(np.uint8)


@dataclass
class QuantityCounts:
    """How many voxels are right and wrong, by steps of a quantity.

    Args:
        step: width of a step; the edges of the tables are multiples of it.
        least: what the quantity cannot be below, 0 for lengths.
    """

    step: float
    least: float = -math.inf
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))

    def add(self, values: np.ndarray, kinds: np.ndarray) -> None:
        """Count voxels.

        Args:
            values: (n,), the quantity; NaN where it was not measured.
            kinds: uint8 (n,), of `error_kinds`.
        """
        measured = np.isfinite(values)
        # A hundredth of a step is rounding: a thickness of 6 voxels lies at 6, a flat surface at 0, not just below.
        steps = np.full(len(values), _UNMEASURED)
        steps[measured] = np.floor(values[measured] / self.step + 0.01).astype(np.int64)
        found, place = np.unique(steps, return_inverse=True)
        counts = np.bincount(place.reshape(-1) * 4 + kinds, minlength=4 * len(found)).reshape(-1, 4)
        self._put(found, counts)

    def merge(self, other: QuantityCounts) -> None:
        """Add the counts of another part of the data, of the same step."""
        self._put(other.steps, other.counts)

    def _put(self, steps: np.ndarray, counts: np.ndarray) -> None:
        both = np.concatenate([self.steps, steps])
        self.steps, place = np.unique(both, return_inverse=True)
        total = np.zeros((len(self.steps), 4), np.int64)
        np.add.at(total, place.reshape(-1), np.concatenate([self.counts, counts]))
        self.counts = total

    def table(self, edges: Sequence[int] | None = None) -> list[Bin]:
        """Return the bins that hold a voxel, in ascending order; last, if there are any, those not measured.

        Args:
            edges: inner edges, in steps; None: round ones, see `round_edges`.
        """
        measured = self.steps != _UNMEASURED
        steps, counts = self.steps[measured], self.counts[measured]
        of_truth = counts[:, [_HIT, _MISSED, _MISSED_AND_FALSE]].sum(axis=1)
        if edges is None:
            edges = round_edges(steps, of_truth if of_truth.any() else counts.sum(axis=1))
        inner = [edge for edge in edges if edge * self.step > self.least]
        place = np.searchsorted(np.asarray(inner, np.int64), steps, side="right")
        ends = [self.least, *(self._value(edge) for edge in inner), math.inf]
        rows = [_bin(ends[i], ends[i + 1], counts[place == i].sum(axis=0)) for i in range(len(ends) - 1)]
        rows.append(_bin(math.nan, math.nan, self.counts[~measured].sum(axis=0)))
        return [row for row in rows if row.truth_voxels or row.predicted_voxels]

    def _value(self, steps: int) -> float:
        # The step is a power of ten, so this number has few decimals.
        return float(f"{steps * self.step:.12g}")


def _bin(low: float, high: float, counts: np.ndarray) -> Bin:
    hit, missed, false, both = (int(count) for count in counts)
    return Bin(low, high, hit + missed + both, missed + both, hit + false + both, false + both)


def round_edges(steps: np.ndarray, weights: np.ndarray) -> list[int]:
    """Return edges that are multiples of 1, 2 or 5 times a power of ten steps, at most `MOST_BINS` bins between them.

    They reach over all but the outer 2 % of the weight at each end; the bins beyond are open. Edges depend on the truth
    alone where there is any, so that all models have the same on the same labels.

    Args:
        steps: int64 (n,), ascending.
        weights: int64 (n,).
    """
    if not weights.sum():
        return []
    ends = np.cumsum(weights) / weights.sum()
    places = np.searchsorted(ends, [ENDS, 1 - ENDS]).clip(0, len(steps) - 1)
    low, high = (int(step) for step in steps[places])
    for power in range(18):
        for factor in (1, 2, 5):
            width = factor * 10**power
            first, last = -(-low // width), high // width
            if last - first < MOST_BINS:
                return [edge * width for edge in range(first, last + 1)]
    return []


def power_of_ten(most: float) -> float:
    """Return the largest power of ten that is not above a positive number."""
    return float(f"1e{math.floor(math.log10(most) + 1e-9)}")
