"""Says what the heads of derived targets and their decoders cost within a time budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from volumen.time_budget.measured import Measured
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

NOTHING = 0.02
"""A part of a step below which a head is called free: timings of a few steps differ by as much."""


def derived_heads(config: ConfigManager) -> list[str]:
    """Return the names of the derived targets that the network predicts."""
    return [name for name, task in config.auxiliary_tasks.items() if task.get("head", True)]


def without_heads(config: ConfigManager, names: Sequence[str]) -> ConfigManager | None:
    """Return the experiment without some derived targets; None if other settings need them, such as a fusion."""
    tasks = {name: task for name, task in config.auxiliary_tasks.items() if name not in names}
    fewer = config.variant(auxiliary_tasks=tasks)
    try:
        _ = fewer.targets, fewer.fusions  # checked when they are asked for
    except VolumenError:
        return None
    return fewer


def measure_without(
    config: ConfigManager, again: Callable[[ConfigManager], Measured | None]
) -> dict[tuple[str, ...], Measured]:
    """Measure the chosen network without all derived targets together, and without each of them if there are several.

    Args:
        config: the run's configuration.
        again: measures the choice for another configuration; None where there is no time left. Every process calls it
            equally often.

    Returns:
        What was measured, by the names of the targets that were left out.
    """
    names = derived_heads(config)
    groups = [tuple(names), *((name,) for name in names if len(names) > 1)] if names else []
    found = {}
    for group in groups:
        fewer = without_heads(config, group)
        cost = None if fewer is None else again(fewer)
        if cost is not None:
            found[group] = cost
    return found


def left_out(
    config: ConfigManager, chosen: Measured, without: Mapping[tuple[str, ...], Measured]
) -> tuple[list[str], Measured]:
    """Choose the optional derived targets to leave out, where there are too few steps for the network.

    The most expensive one is left out first, until the steps are enough. Targets that cost hardly anything remain, and
    those that other settings need. Costs of several targets are added.

    Args:
        config: the run's configuration.
        chosen: the choice, with all heads.
        without: the same network without some targets, see `measure_without`.

    Returns:
        The names in the order of the configuration, and the choice with its time and its steps without them.
    """
    cost = {
        group[0]: chosen.seconds - fewer.seconds
        for group, fewer in without.items()
        if len(group) == 1 and config.auxiliary_tasks[group[0]].get("optional")
    }
    dropped: list[str] = []
    fewer = chosen
    for name in sorted(cost, key=lambda name: -cost[name]):
        free = cost[name] < NOTHING * chosen.seconds
        if fewer.steps >= chosen.needed or free or without_heads(config, [*dropped, name]) is None:
            continue
        dropped.append(name)
        seconds = chosen.seconds - sum(cost[each] for each in dropped)
        fewer = replace(chosen, seconds=seconds, steps=round(chosen.steps * chosen.seconds / seconds))
    return [name for name in config.auxiliary_tasks if name in dropped], fewer


def cost_line(names: Sequence[str], chosen: Measured, fewer: Measured) -> str:
    """Return what derived targets cost.

    Args:
        names: of the targets.
        chosen: the choice, with all heads.
        fewer: the same network without these.
    """
    text = ("derived target " if len(names) == 1 else "derived targets ") + ", ".join(names)
    part = 1 - fewer.seconds / chosen.seconds
    if part < NOTHING:
        return f"{text}: hardly any part of a step"
    # Not the steps of `fewer`: it was measured later, when less of the budget was left.
    steps = round(chosen.steps * chosen.seconds / fewer.seconds)
    line = f"{text}: {part:.0%} of a step; without, {steps} steps instead of {chosen.steps}"
    if chosen.steps < chosen.needed <= steps:
        line += f", and {chosen.needed} are enough: leave out what you do not need to predict, or set optional: true"
    return line


def decoder_line(measured: Sequence[Measured], chosen: Measured) -> str | None:
    """Return why all heads share a decoder: the candidate with a decoder each that has too few steps; else None."""
    if chosen.candidate.separate_decoders:
        return None
    for entry in measured:
        if entry.candidate.separate_decoders and entry.steps < entry.needed:
            return (
                f"one decoder for all targets: with a decoder each there are {entry.steps} steps where"
                f" {entry.needed} are enough"
            )
    return None
