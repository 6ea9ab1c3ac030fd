"""Scoring in several processes: each takes a share of the cases, and all have the sums of all in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from volumen.utils import distributed

if TYPE_CHECKING:
    from volumen.evaluation.cases import ScoredCase
    from volumen.metrics.target_metrics import TargetMetrics


def own_share(scored: Sequence[ScoredCase]) -> Sequence[ScoredCase]:
    """Return the cases of this process: every one is of exactly one, and alone it has all."""
    return scored[distributed.rank() :: distributed.world_size()]


def gather(
    details: dict[str, Any], numbers: dict[str, Any], seconds: dict[str, float], seen: dict[str, list[int]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float], dict[str, list[int]]]:
    """Return what all processes found of their cases, and the CPU seconds of all.

    Args:
        details: case to target to what was found.
        numbers: case to target to numbers of objects.
        seconds: part of the work to its CPU seconds.
        seen: case and target to what its pieces hold.
    """
    if not distributed.is_distributed():
        return details, numbers, seconds, seen
    states: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(states, (details, numbers, seconds, seen))
    together: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    total: dict[str, float] = {}
    everything: dict[str, list[int]] = {}
    for *found, costs, of_cases in states:
        for whole, part in zip(together, found, strict=True):
            for case, targets in part.items():
                whole.setdefault(case, {}).update(targets)
        for name, cost in costs.items():
            total[name] = total.get(name, 0.0) + cost
        everything |= of_cases
    return *together, total, everything


def unite(metrics: TargetMetrics, scored: Sequence[ScoredCase]) -> None:
    """Give the metrics of every process the sums of all, in the order of the cases: as one process would have them.

    Args:
        metrics: with the sums of this process's share.
        scored: all cases.
    """
    if not distributed.is_distributed():
        return
    states: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(states, metrics.state())
    place = {(case.target, case.name): number for number, case in enumerate(scored)}
    rows = sorted((row for state in states for row in state["sums"]), key=lambda row: place[row[0], row[3]])
    metrics.reset()
    metrics.merge({"sums": rows})
