"""`volumen suggest`: flags in, `SuggestRequest` or `AcceptRequest` out."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from volumen.cli.flags import add_field_flags, flag_of, given_fields
from volumen.config.prediction import HOW
from volumen.suggestion.request import CHOICE, AcceptRequest, SuggestRequest
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def add_suggest_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen suggest` to a parser: one for each field of both requests."""
    # Which are required depends on --accept, so that is checked later.
    groups = (CHOICE, HOW)
    add_field_flags(parser, SuggestRequest, groups, optional=("checkpoint", "input", "output"))
    accept = parser.add_argument_group("taking painted boxes back")
    accept.add_argument(
        "--accept", metavar="SUGGESTIONS",
        help="take the painted boxes of this folder back as labels with masks: into DATA, or into -o as a new data"
        " folder",
    )  # fmt: skip
    accept.add_argument(
        "--boxes", metavar="N,N,...", help="ranks of the painted boxes (default: those marked as done)"
    )
    accept.add_argument(
        "--overwrite-labels", action="store_true", default=None,
        help="painted values replace earlier labels, too (default: earlier labels stay)",
    )  # fmt: skip


def run_suggest(arguments: argparse.Namespace) -> int:
    """Run `volumen suggest`; return the exit status.

    Raises:
        VolumenError: an error that the user can correct.
    """
    return _run_accept(arguments) if arguments.accept is not None else _run_suggest(arguments)


def _run_suggest(arguments: argparse.Namespace) -> int:
    from volumen.cli.running.progress_bar import ProgressBar
    from volumen.suggestion.suggest import describe, suggest
    from volumen.utils.terminal.console import make_console, make_table

    for name in ("boxes", "overwrite_labels"):
        if getattr(arguments, name) is not None:
            raise VolumenError(flag_of(name), "belongs to --accept", remedy="leave it out, or add --accept")
    given = given_fields(arguments, SuggestRequest, {"checkpoint": _one_or_several})
    _require(given, {"checkpoint": "-m", "input": "-i", "output": "-o"})
    request = SuggestRequest(**given)
    with ProgressBar() as bar:
        found = suggest(request, progress=bar)
    if not arguments.quiet:
        table = make_table("boxes to label next", ("rank", "volume", "box", "entropy", "reason"))
        for row in describe(found):
            table.add_row(*row)
        make_console().print(table)
    logger.info(
        "paint the labels in %s/boxes, mark each finished folder with an empty file named done, then: volumen suggest"
        " --accept %s -i %s",
        request.output, request.output, request.input,
    )  # fmt: skip
    return 0


def _run_accept(arguments: argparse.Namespace) -> int:
    from volumen.suggestion.accept import accept

    foreign = set(given_fields(arguments, SuggestRequest, {"checkpoint": tuple})) - {"input", "output"}
    if foreign:
        raise VolumenError(flag_of(min(foreign)), "does not belong to --accept", remedy="leave it out")
    given = given_fields(arguments, AcceptRequest)
    given["suggestions"] = arguments.accept
    _require(given, {"input": "-i"})
    report = accept(AcceptRequest(**given))
    for line in report.lines():
        logger.info("%s", line)
    return 0


def _require(given: dict[str, Any], flags: dict[str, str]) -> None:
    missing = next((flag for name, flag in flags.items() if name not in given), None)
    if missing is not None:
        raise VolumenError(missing, "missing", remedy=f"give {missing}; volumen suggest --help shows how")


def _one_or_several(paths: Any) -> str | tuple[str, ...]:
    return paths[0] if len(paths) == 1 else tuple(paths)
