"""`volumen tune`: flags in, `TuneRequest` out."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from volumen.cli.flags import Once
from volumen.utils.terminal.console import make_console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from volumen.tuning.tune import Tuning

logger = logging.getLogger(__name__)

N = TypeVar("N", int, float)
REALS, WHOLES = "numbers by commas", "whole numbers by commas"


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen tune` to a parser."""
    parser.add_argument(
        "-m",
        "--checkpoint",
        action=Once,
        metavar="MODEL.pth",
        required=True,
        help="checkpoint in the folder of its run",
    )
    parser.add_argument(
        "-i",
        "--input",
        action=Once,
        metavar="DATA",
        required=True,
        help="the data of the run: folder with images/ and labels/",
    )
    parser.add_argument(
        "--score",
        action=Once,
        metavar="NAME",
        required=True,
        help="score that decides, such as dice, surface_challenge or voi_split; names are in docs/scores.md",
    )
    parser.add_argument(
        "--target",
        action=Once,
        metavar="NAME",
        help="target that is scored (default: the instances, else the only labelled target)",
    )
    parser.add_argument(
        "--instances",
        action=Once,
        metavar="HEADS",
        help="tune instances, from heads as in volumen predict (default: those of the checkpoint)",
    )
    parser.add_argument(
        "--truth",
        action=Once,
        metavar="NAME",
        help="labelled target of DATA that numbers the instances (default: the one that their heads were trained on)",
    )
    parser.add_argument(
        "-o",
        "--output",
        action=Once,
        metavar="FOLDER",
        help="folder for MODEL_tuned.pth and MODEL_tuning.csv, and for probabilities meanwhile (default: the run's)",
    )
    parser.add_argument(
        "--thresholds", metavar="P,P,...", help="thresholds to try (default: 0.1 to 0.9; of instances 0.3,0.5,0.7)"
    )  # fmt: skip
    parser.add_argument(
        "--merge-thresholds",
        metavar="P,P,...",
        help="merge thresholds of instances to try (default: 0.3 to 0.7)",
    )
    parser.add_argument(
        "--fill-holes", metavar="N,N,...", help="sizes of filled holes to try (default: 0,100,1000)"
    )
    parser.add_argument("--min-sizes", metavar="N,N,...", help="least sizes to try (default: 0,100,1000)")
    parser.add_argument(
        "--epochs", action="store_true", help="try the checkpoints of all epochs that the run still has, too"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="store the settings in the checkpoint itself, not in a new file"
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier tuning")
    parser.add_argument(
        "--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )


def run_tune(arguments: argparse.Namespace) -> int:
    """Run `volumen tune`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.cli.progress_bar import ProgressBar
    from volumen.inference.rules import read_rules
    from volumen.tuning.tune import TuneRequest, tune

    request = TuneRequest(
        arguments.checkpoint,
        arguments.input,
        arguments.score,
        target=arguments.target,
        instances=read_rules(arguments.instances),
        truth=arguments.truth,
        output=arguments.output,
        thresholds=_numbers("--thresholds", arguments.thresholds, float, REALS),
        merge_thresholds=_numbers("--merge-thresholds", arguments.merge_thresholds, float, REALS),
        fill_holes=_numbers("--fill-holes", arguments.fill_holes, int, WHOLES),
        min_sizes=_numbers("--min-sizes", arguments.min_sizes, int, WHOLES),
        epochs=arguments.epochs,
        in_place=arguments.in_place,
        overwrite=arguments.overwrite,
        device=arguments.device,
    )
    with ProgressBar() as bar:
        found = tune(request, progress=bar)
    if not arguments.quiet:
        make_console().print(_table(found))
    for name in found.at_end:
        logger.info("the best %s is at the end of those tried: try more beyond it", name)
    logger.info("settings: %s; all trials: %s", found.checkpoint, found.table)
    return 0


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


def _numbers(flag: str, text: str | None, number: Callable[[str], N], expected: str) -> tuple[N, ...] | None:
    from volumen.utils.errors import VolumenError

    if text is None:
        return None
    try:
        return tuple(number(part) for part in text.split(","))
    except ValueError:
        raise VolumenError(flag, expected=expected, found=repr(text)) from None
