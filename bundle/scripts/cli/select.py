"""`volumen select`: flags in, `SelectRequest` out."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from volumen.cli.flags import Once
from volumen.utils.terminal.console import make_console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from volumen.tuning.selection import Entry, Selection

logger = logging.getLogger(__name__)


def add_select_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen select` to a parser."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, with folds or without, or a checkpoint in it; trained on splits in common",
    )
    parser.add_argument(
        "-i", "--input", action="append", default=[], metavar="DATA",
        help="the data of the runs (default: as the runs record; repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--score", action=Once, metavar="NAME",
        help="score that decides (default: that of the runs' key metric, else dice)",
    )  # fmt: skip
    parser.add_argument(
        "--target",
        action=Once,
        metavar="NAME",
        help="target that is scored (default: the only labelled target)",
    )
    parser.add_argument(
        "--tta", default="none,mirror", metavar="MODES",
        help="test-time augmentations to try, by commas (default: none,mirror)",
    )  # fmt: skip
    parser.add_argument(
        "--no-postprocess", action="store_true", help="keep the default threshold, and clean nothing"
    )
    parser.add_argument(
        "-o",
        "--output",
        action=Once,
        metavar="OUT",
        help="folder for selection.json (default: the first RUN's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier selection")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)"
    )


def run_select(arguments: argparse.Namespace) -> int:
    """Run `volumen select`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.cli.running.progress_bar import ProgressBar
    from volumen.tuning.select import SelectRequest, select

    request = SelectRequest(
        runs=tuple(arguments.runs),
        data=tuple(arguments.input),
        score=arguments.score,
        target=arguments.target,
        output=arguments.output,
        tta=tuple(mode.strip() for mode in arguments.tta.split(",") if mode.strip()) or ("none",),
        postprocess=not arguments.no_postprocess,
        device=arguments.device,
        overwrite=arguments.overwrite,
    )
    with ProgressBar() as bar:
        found = select(request, bar)
    if not arguments.quiet:
        make_console().print(_table(found))
    _tell(found)
    return 0


def _table(found: Selection) -> Table:
    """Return the candidates with their scores, the chosen one first."""
    better = "smaller" if found.subject.smaller else "larger"
    title = f"{found.subject.key} ({better} is better) on {found.regions} regions that were not trained on"
    columns = ("candidate", "mean", "95 % interval", "less the chosen one's", "networks", "passes")
    table = make_table(title, (*columns, "patches", "settings"))
    for entry in found.entries:
        key = found.subject.key
        table.add_row(
            entry.candidate.name,
            f"{entry.evaluation.mean[key]:.4f}",
            _interval(entry.evaluation.interval.get(key)),
            _difference(entry),
            str(len(entry.candidate.members)),
            str(entry.passes),
            str(entry.patches),
            ", ".join(
                f"{name} {value:g}"
                for name, value in entry.settings.items()
                if value != found.subject.default[name]
            )
            or "default",
        )
    return table


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def _difference(entry: Entry) -> str:
    if entry.difference is None:
        return ""
    interval = _interval(entry.difference.interval)
    return f"{entry.difference.mean:+.4f}" + (f" ({interval})" if interval else "")


def _tell(found: Selection) -> None:
    chosen = found.entries[0]
    several = found.several
    if several and not found.as_long:
        longest = max(sum(member.patches for member in run.members) for run in several)
        logger.warning(
            "no run here is one network trained for as long as the folds together (%d patches), which may be better:"
            " train one with --split %s/splits.json --fold 0/%d, and compare it too",
            longest, several[0].path, len(several[0].members),
        )  # fmt: skip
    if any(len(run.members) > 1 for run in chosen.candidate.runs):
        logger.info(
            "each region was predicted by the folds that had not seen it; a new image gets the mean of all"
        )
    logger.info("report: %s", found.file.with_suffix(".html"))
    logger.info("chosen: %s; volumen predict -m %s", chosen.candidate.name, found.file.parent)
