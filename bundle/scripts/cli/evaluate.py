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
    from volumen.evaluation.differences import Comparison

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
    from volumen.evaluation.comparison import compare
    from volumen.evaluation.score import evaluate

    models = arguments.predictions
    arguments.predictions = models[0]
    request = EvaluateRequest(**given_fields(arguments, EvaluateRequest))
    if len(models) == 1:
        evaluations = [evaluate(request)]
        tables = [_table(evaluations[0])]
    else:
        comparison = compare(models, request)
        evaluations = list(comparison.evaluations.values())
        tables = [_difference_table(comparison, name) for name in comparison.differences]
    if not arguments.quiet:
        for table in tables:
            make_console().print(table)
    logger.info("report: %s/report.html", arguments.output)
    incomplete = any(evaluation.unpredicted or evaluation.unlabelled for evaluation in evaluations)
    return 1 if arguments.require_all and incomplete else 0


def _table(evaluation: Evaluation) -> Table:
    """Return the means over cases with their intervals, and which way is better."""
    from volumen.evaluation.html.report_words import direction, readable, unit_of

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


def _difference_table(comparison: Comparison, model: str) -> Table:
    """Return the differences of a model from the first one, with their intervals, and which is better."""
    from volumen.evaluation.html.report_words import number

    table = make_table(
        f"{model} minus {comparison.first}, over cases that both have",
        ("metric", comparison.first, model, "difference", "95 % interval", "cases", f"{model} is"),
    )
    for key, found in comparison.differences[model].items():
        table.add_row(
            key,
            *(number(value) for value in (found.first, found.other, found.mean)),
            f"{number(found.interval[0])} to {number(found.interval[1])}" if found.interval else "",
            str(len(found.cases)),
            comparison.verdict(model, key),
        )
    return table
