"""Says what the heads of derived targets and their decoders cost within a time budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def cost_lines(
    config: ConfigManager, chosen: Measured, again: Callable[[ConfigManager], Measured | None]
) -> list[str]:
    """Return a line on the cost of all derived targets together, and one on each if there are several.

    Args:
        config: the run's configuration.
        chosen: the choice, with all heads.
        again: measures the choice for another configuration; None where there is no time left. Every process calls it
            equally often.
    """
    names = derived_heads(config)
    groups = [names, *([name] for name in names if len(names) > 1)] if names else []
    lines = []
    for group in groups:
        fewer = without_heads(config, group)
        found = None if fewer is None else again(fewer)
        if found is not None:
            lines.append(cost_line(group, chosen, found))
    return lines


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
        line += f", and {chosen.needed} are enough: leave out what you do not need to predict"
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
