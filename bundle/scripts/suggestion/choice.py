"""The choice among candidate boxes: by power-law noise, by class, without overlap, spread out. Pure numerics.

Sources: Kirsch et al. 2021, "Stochastic batch acquisition" (arXiv:2106.12059): drawing with probabilities proportional
to a power of the score is ranking by log score plus Gumbel noise over that power. Luth et al. 2026, "Finally outshining
the random baseline" (TMLR 01/2026): predictive entropy with such noise, and a part of the boxes drawn for each class by
the entropy weighted with the probability of the class. The greedy choice of the box that is farthest from the chosen
ones follows Sener and Savarese 2018 (arXiv:1708.00489); the features and the pool are those of this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FOREGROUND_SHARE = 2 / 3
"""Share of the boxes that are drawn for a foreground class; the others are drawn for none."""
POOL = 4
"""Candidates among which boxes are spread out, per box."""


@dataclass(frozen=True)
class Candidates:
    """The candidate boxes of all volumes.

    Args:
        volume: number of the volume of each box, (N,).
        corners: first voxel, (N, D).
        extents: voxels of a box per axis, by volume, (V, D).
        shapes: shape by volume, (V, D).
        features: (N, F), of any scale.
        entropy: mean entropy over the open targets, (N,).
        class_entropy: by foreground class, its mean entropy, 0 where its target is labelled, (S, N).
        class_share: by foreground class, its predicted share, 0 where its target is labelled, (S, N).
    """

    volume: np.ndarray
    corners: np.ndarray
    extents: np.ndarray
    shapes: np.ndarray
    features: np.ndarray
    entropy: np.ndarray
    class_entropy: np.ndarray
    class_share: np.ndarray

    def __len__(self) -> int:
        return len(self.volume)


@dataclass(frozen=True)
class Chosen:
    """A chosen box.

    Args:
        candidate: its number.
        stratum: the foreground class that it was drawn for; None: for none.
        by: "entropy", "share" (of a class) or "random", by which it was drawn.
    """

    candidate: int
    stratum: int | None
    by: str


def choose(
    candidates: Candidates, strategy: str, number: int, *, beta: float = 1.0, seed: int = 0
) -> list[Chosen]:
    """Choose boxes that do not overlap; fewer than asked if no more are left.

    Args:
        candidates: the boxes; their order is part of the result.
        strategy: see `SuggestRequest.strategy`.
        number: boxes.
        beta: power of the score by which `power` draws.
        seed: of the noise.

    Returns:
        The chosen boxes, the classes in turn.
    """
    rng = np.random.default_rng(seed)
    uniform = np.ones(len(candidates))
    strata = len(candidates.class_entropy)
    if strategy == "random":
        plan: list[_Draw] = [_Draw(None, "random", uniform, 1.0, number)]
    elif strategy == "entropy":
        plan = [_Draw(None, "entropy", candidates.entropy, math.inf, number)]
    else:
        by_class, rest = _quotas(number, strata, rng)
        if strategy == "foreground":
            scores, overall, names, power = candidates.class_share, uniform, ("share", "random"), 1.0
        else:
            scores, overall, names, power = (
                candidates.class_entropy, candidates.entropy, ("entropy", "entropy"), beta,
            )  # fmt: skip
        plan = [_Draw(s, names[0], scores[s], power, by_class[s]) for s in range(strata)]
        plan.append(_Draw(None, names[1], overall, power, rest))
    plan.append(_Draw(None, "random", uniform, 1.0, number))  # what is left, if scores are 0 elsewhere
    spread = _Spread(candidates) if strategy == "power" else None
    return _in_turn(_pick(candidates, plan, number, rng, spread), strata)


@dataclass(frozen=True)
class _Draw:
    """A part of the choice: how many boxes are drawn by which score."""

    stratum: int | None
    by: str
    score: np.ndarray
    power: float
    quota: int


def _quotas(number: int, strata: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """Return the boxes per foreground class and for none; the classes that get one more are random."""
    foreground = round(FOREGROUND_SHARE * number) if strata else 0
    counts = [foreground // strata] * strata if strata else []
    for stratum in rng.permutation(strata)[: foreground % strata if strata else 0]:
        counts[stratum] += 1
    return counts, number - foreground


def _pick(
    candidates: Candidates,
    plan: Sequence[_Draw],
    number: int,
    rng: np.random.Generator,
    spread: _Spread | None,
) -> list[Chosen]:
    free = np.ones(len(candidates), bool)
    chosen: list[Chosen] = []
    for draw in plan:
        order = _noisy_order(draw.score, draw.power, rng)
        for _ in range(min(draw.quota, number - len(chosen))):
            pool = order[free[order]]
            if not len(pool):
                break
            pool = pool[: POOL * draw.quota] if spread is not None else pool[:1]
            best = int(pool[0] if spread is None else spread.farthest(pool))
            chosen.append(Chosen(best, draw.stratum, draw.by))
            free &= ~overlapping(candidates, best)
            if spread is not None:
                spread.add(best)
    return chosen


def _noisy_order(score: np.ndarray, power: float, rng: np.random.Generator) -> np.ndarray:
    """Return the candidates of scores above 0 in the order of a draw without replacement, by score ** power."""
    noise = rng.gumbel(size=len(score))
    some = np.flatnonzero(score > 0)
    if math.isinf(power):
        key = np.log(score[some])
    else:
        key = power * np.log(score[some]) + noise[some]
    # A stable sort: equal scores keep the order of the candidates.
    return some[np.argsort(-key, kind="stable")]


def overlapping(candidates: Candidates, one: int) -> np.ndarray:
    """Return which candidates share a voxel with one of them, itself included: bool (N,)."""
    extent = candidates.extents[candidates.volume[one]]
    apart = np.abs(candidates.corners - candidates.corners[one]) >= extent
    return np.asarray((candidates.volume == candidates.volume[one]) & ~apart.any(axis=1))


class _Spread:
    """Distances of candidates to the chosen boxes, in features and in space.

    A feature counts by its standard deviation over the candidates. Two boxes of one volume are as far apart as their
    distance in relation to the volume's diagonal, boxes of two volumes by 1.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        scale = candidates.features.std(axis=0)
        # Rounded, so that the last bits of another machine cannot turn a choice.
        self._features = np.round((candidates.features / np.where(scale > 1e-9, scale, np.inf)), 6)
        self._nearest = np.full(len(candidates), np.inf)

    def farthest(self, pool: np.ndarray) -> int:
        """Return the candidate of a pool that is farthest from the chosen boxes; the first one if none is chosen."""
        return int(pool[int(np.argmax(self._nearest[pool]))])

    def add(self, one: int) -> None:
        """Take a chosen box into account."""
        c = self._candidates
        features = np.sqrt(((self._features - self._features[one]) ** 2).mean(axis=1))
        shape = c.shapes[c.volume[one]].astype(float)
        far = np.sqrt((((c.corners - c.corners[one]) / shape) ** 2).mean(axis=1))
        space = np.where(c.volume == c.volume[one], np.minimum(far, 1.0), 1.0)
        self._nearest = np.minimum(self._nearest, features + space)


def _in_turn(chosen: Sequence[Chosen], strata: int) -> list[Chosen]:
    """Return the boxes such that the first ones are of all classes: the first of each class, then the second, ..."""
    place: dict[int | None, int] = {}
    keys = []
    for one in chosen:
        nth = place[one.stratum] = place.get(one.stratum, -1) + 1
        keys.append((nth, strata if one.stratum is None else one.stratum))
    return [chosen[i] for i in sorted(range(len(chosen)), key=lambda i: keys[i])]
