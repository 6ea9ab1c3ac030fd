"""`volumen evaluate`: flags in, `EvaluateRequest` out."""

from __future__ import annotations

import argparse
import logging
import math
from typing import TYPE_CHECKING

from volumen.cli.flags import Once
from volumen.utils.console import make_console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from volumen.evaluation.cases import Evaluation
    from volumen.evaluation.differences import Comparison

logger = logging.getLogger(__name__)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen evaluate` to a parser."""
    parser.add_argument(
        "-p",
        "--predictions",
        action="append",
        metavar="PREDICTIONS",
        required=True,
        help="output of volumen predict, or IMAGE_TARGET files; given several times, models are compared with the "
        "first of them",
    )
    parser.add_argument(
        "-l",
        "--labels",
        action=Once,
        required=True,
        help="dataset, folder of IMAGE_TARGET labels, or a label",
    )
    parser.add_argument(
        "-o",
        "--output",
        action=Once,
        metavar="REPORT",
        required=True,
        help="folder for metrics.json, metrics.csv, report.html",
    )
    parser.add_argument(
        "--masks",
        action=Once,
        metavar="PATH",
        help="folder of masks, or one mask; scored where above 0 (default: masks/ beside labels/)",
    )
    parser.add_argument(
        "--targets", metavar="NAMES", help="targets to score, by commas (default: all with labels)"
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help="scores by commas, such as dice,hd95,b1_error,voi_merge,f1@0.75, or all; names are in docs/scores.md "
        "(default: all that make sense but for a few that are expensive)",
    )
    parser.add_argument(
        "--instances",
        help="targets whose predictions number instances, by commas (default: those of volumen predict --instances)",
    )
    parser.add_argument(
        "--threshold",
        metavar="P",
        type=float,
        default=0.5,
        help="foreground from this probability on (default: 0.5)",
    )
    parser.add_argument(
        "--tolerance",
        metavar="LENGTH",
        type=float,
        help="surface Dice tolerance, in the spacing's unit (default: one voxel)",
    )
    parser.add_argument(
        "--spacing", metavar="Z,Y,X", help="voxel size per axis, by commas (default: from the files)"
    )
    parser.add_argument(
        "--worst", metavar="N", type=int, default=3, help="cases with a picture, per target (default: 3)"
    )
    parser.add_argument(
        "--ignore-label",
        metavar="VALUE",
        type=int,
        help="label value that means unknown (default: as the record of a prediction says)",
    )
    parser.add_argument(
        "--require-all",
        action="store_true",
        help="exit with 1 if a label has no prediction or a prediction no label",
    )
    parser.add_argument(
        "--connectivity",
        metavar="F/B",
        default="26/6",
        help="neighbours of foreground/background voxels in topology and objects of labels: 26/6 or 6/26 "
        "(default: 26/6)",
    )
    parser.add_argument(
        "--surface-border",
        action="store_true",
        help="count a surface where the volume's border cuts a structure, as MONAI does (default: none there)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the bootstrap (default: 0)")


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Run `volumen evaluate`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.evaluation.cases import EvaluateRequest
    from volumen.evaluation.comparison import compare
    from volumen.evaluation.score import evaluate
    from volumen.utils.errors import VolumenError

    spacing = None
    if arguments.spacing:
        try:
            spacing = tuple(float(part) for part in arguments.spacing.split(","))
        except ValueError:
            raise VolumenError("--spacing", expected="numbers by commas", found=arguments.spacing) from None
    request = EvaluateRequest(
        predictions=arguments.predictions[0],
        labels=arguments.labels,
        output=arguments.output,
        masks=arguments.masks,
        targets=_names(arguments.targets),
        metrics=_names(arguments.metrics),
        tolerance=arguments.tolerance,
        threshold=arguments.threshold,
        spacing=spacing,
        worst=arguments.worst,
        seed=arguments.seed,
        instances=_names(arguments.instances) or (),
        ignore_label=arguments.ignore_label,
        connectivity=arguments.connectivity,
        surface_border=arguments.surface_border,
    )
    if len(arguments.predictions) == 1:
        evaluations = [evaluate(request)]
        tables = [_table(evaluations[0])]
    else:
        comparison = compare(arguments.predictions, request)
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


def _difference_table(comparison: Comparison, model: str) -> Table:
    """Return the differences of a model from the first one, with their intervals, and which is better."""
    from volumen.evaluation.report import number

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


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part for part in text.replace(",", " ").split())
