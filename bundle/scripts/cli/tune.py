"""`volumen tune`: converts flags to a `TuneRequest`."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from volumen.cli.flags import add_field_flags, given_fields
from volumen.inference.rules import read_rules
from volumen.tuning.request import TuneRequest
from volumen.utils.terminal.console import make_console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from volumen.tuning.fuse import FusionTuning
    from volumen.tuning.tune import Tuning

logger = logging.getLogger(__name__)


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen tune` to a parser: one for each field of `TuneRequest`."""
    add_field_flags(parser, TuneRequest)


def run_tune(arguments: argparse.Namespace) -> int:
    """Run `volumen tune`; return the exit status.

    Raises:
        VolumenError: an error that the user can correct.
    """
    from volumen.cli.running.progress_bar import ProgressBar
    from volumen.tuning.tune import tune

    request = TuneRequest(**given_fields(arguments, TuneRequest, {"instances": read_rules}))
    if request.fuse is not None:
        return _run_fusion(request, quiet=arguments.quiet)
    with ProgressBar() as bar:
        found = tune(request, progress=bar)
    if not arguments.quiet:
        make_console().print(_table(found))
    for name in found.at_end:
        logger.info("the best %s is at the end of those tried: try more beyond it", name)
    logger.info("settings: %s; all trials: %s", found.checkpoint, found.table)
    return 0


def _run_fusion(request: TuneRequest, *, quiet: bool) -> int:
    """Run `volumen tune --fuse`; return the exit status.

    Raises:
        VolumenError: an error that the user can correct.
    """
    from volumen.cli.running.progress_bar import ProgressBar
    from volumen.tuning.fuse import tune_fusion

    with ProgressBar() as bar:
        found = tune_fusion(request, progress=bar)
    if not quiet:
        make_console().print(_fusion_table(found))
    if found.checkpoint is None:
        logger.info("not better than the own head: nothing is stored; scores: %s", found.table)
    else:
        logger.info("fusion: %s; scores: %s", found.checkpoint, found.table)
    return 0


def _fusion_table(found: FusionTuning) -> Table:
    """Return the score of each way to read the label, and the weights."""
    better = "smaller" if found.subject.smaller else "larger"
    title = (
        f"{found.subject.key} on the validation part, each half by a fit on the other ({better} is better)"
    )
    table = make_table(title, ("label read from", "score", ""))
    for name, value in found.scores.items():
        table.add_row(name, _text(value), f"gain {found.gain:+.4g}" if name == "fused" else "")
    for head, weights in found.rule["weights"].items():
        table.add_row(f"  {head}", "", "weight " + ", ".join(f"{weight:.3g}" for weight in weights))
    return table


def _table(found: Tuning) -> Table:
    """Return the score and the settings, the best beside the default."""
    best, default = found.best, found.default
    better = "smaller" if found.subject.smaller else "larger"
    title = f"{found.subject.key} on the validation part, {len(found.trials)} settings tried"
    table = make_table(title, ("", "best", "default", "difference"))
    gain = best.value - default.value
    table.add_row(
        f"{found.subject.key} ({better} is better)",
        _text(best.value),
        _text(default.value),
        "" if math.isnan(gain) else f"{gain:+.4g}",
    )
    for name, value in best.settings.items():
        change = value - default.settings[name]
        table.add_row(name, f"{value:g}", f"{default.settings[name]:g}", f"{change:+.4g}" if change else "")
    if len({trial.checkpoint for trial in found.trials}) > 1:
        table.add_row("checkpoint", Path(best.checkpoint).name, Path(default.checkpoint).name, "")
    return table


def _text(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.6g}"
