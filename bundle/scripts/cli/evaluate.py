"""`volumen evaluate`: flags in, `EvaluateRequest` out."""

from __future__ import annotations

import argparse
import logging
import math
from typing import TYPE_CHECKING

from volumen.cli.flags import add_field_flags, given_fields
from volumen.evaluation.request import EvaluateRequest
from volumen.utils.terminal.console import make_console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from volumen.evaluation.cases import Evaluation

logger = logging.getLogger(__name__)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen evaluate` to a parser: one for each field of `EvaluateRequest`."""
    add_field_flags(parser, EvaluateRequest)
    parser.add_argument(
        "--require-all",
        action="store_true",
        help="exit with 1 if a label has no prediction or a prediction no label",
    )


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Run `volumen evaluate`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.evaluation.score import evaluate

    evaluation = evaluate(EvaluateRequest(**given_fields(arguments, EvaluateRequest)))
    if not arguments.quiet:
        make_console().print(_table(evaluation))
    logger.info("report: %s/report.html", arguments.output)
    incomplete = evaluation.unpredicted or evaluation.unlabelled
    return 1 if arguments.require_all and incomplete else 0


def _table(evaluation: Evaluation) -> Table:
    """Return the means over cases with their intervals, and which way is better."""
    from volumen.evaluation.report import direction, readable, unit_of

    title = f"means over {evaluation.coverage}"
    table = make_table(title, ("metric", "mean", "unit", "95 % interval", "better"))
    for key, value in evaluation.mean.items():
        bounds = evaluation.interval[key]
        table.add_row(
            key,
            "undefined" if math.isnan(value) else readable(value),
            unit_of(key, evaluation),
            f"{readable(bounds[0])} to {readable(bounds[1])}" if bounds else "",
            direction(key),
        )
    return table
