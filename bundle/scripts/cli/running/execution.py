"""Runs a command and reports a user error or a defect in one line, and a signal by the exit code."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from volumen.utils.errors import VolumenError, find_cause, is_out_of_memory
from volumen.utils.terminal.console import coloured

logger = logging.getLogger(__name__)

EXIT_DEFECT, EXIT_USER_ERROR, EXIT_INTERRUPT = 1, 2, 130
#: Environment variable: folder in which each of several processes writes its last line for the parent,
#: `volumen.cli.running.processes`.
MESSAGE_FOLDER = "VOLUMEN_TOLD"


def run_guarded(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command and convert an exception to one line on stderr and an exit code.

    Args:
        command: called with the options, returns an exit code.
        options: options with `verbose` and `quiet`.

    Returns:
        The command's exit code; 2 for an error that the user can correct, 1 for a defect, 130 for Ctrl-C.
    """
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    try:
        return command(options)
    except KeyboardInterrupt:
        _report(EXIT_INTERRUPT, "stopped by Ctrl-C")
        return EXIT_INTERRUPT
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_DEFECT
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        code, line = explain(error)
        _report(code, line)
        return code


def leave(code: int) -> None:
    """End this process with an exit code.

    If one of several processes failed, it ends at once: cleaning up would wait for resources shared with the other
    processes, which may have ended. All files are written by then.
    """
    if code and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Log our messages to stderr in a short form, and silence those of libraries unless `verbose`."""
    # Of several processes that train together, only the first one logs.
    other = os.environ.get("RANK", "0") != "0"
    quiet = quiet or other
    level = logging.ERROR if other else logging.WARNING if quiet else logging.INFO
    if verbose:
        level = logging.DEBUG
    root = logging.getLogger()
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    root.handlers[:] = [handler]
    root.setLevel(level if verbose else logging.WARNING)
    logging.getLogger("volumen").setLevel(level)
    logging.captureWarnings(True)
    # The reader raises an error of ours for the damage that tifffile logs.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    if quiet:
        # tqdm reads its default of `disable` from this variable.
        os.environ["TQDM_DISABLE"] = "1"
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger("py.warnings").setLevel(logging.ERROR)
        # Ignite and MONAI log every exception that passes through them, but we report it in one line.
        logging.getLogger("ignite").setLevel(logging.CRITICAL)
        logging.getLogger("monai").setLevel(logging.CRITICAL)


class _Formatter(logging.Formatter):
    """Formats time and message, with the level from warnings on."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            time, _, rest = text.partition(" ")
            colour = "yellow" if record.levelno == logging.WARNING else "red"
            text = f"{time} {coloured(record.levelname.lower() + ':', colour, sys.stderr)} {rest}"
        return text


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code for an error, and the line that describes it.

    Args:
        error: exception of a command, possibly wrapped by libraries.
    """
    cause = find_cause(error)
    if isinstance(cause, VolumenError):
        return EXIT_USER_ERROR, str(cause)
    if isinstance(cause, OSError):
        return EXIT_USER_ERROR, _explain_os_error(cause)
    text = " ".join(str(cause).split())
    if is_out_of_memory(error):
        return (
            EXIT_USER_ERROR,
            f"out of memory ({text[:200]}); use a smaller --patch-size, --batch-size or --preset",
        )
    return EXIT_DEFECT, (
        f"{type(cause).__name__}: {text[:500]}; this may be a defect: run again with --verbose for a traceback"
    )


def _explain_os_error(error: OSError) -> str:
    where = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: no space left on the disk; free some, then go on with --resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: not permitted ({error.strerror}); check the folder's permissions"
    return f"{where}: {error.strerror or error}"


def _report(code: int, line: str) -> None:
    """Report an error line, or let the parent of several processes report it once for all of them."""
    folder = os.environ.get(MESSAGE_FOLDER)
    if folder and "RANK" in os.environ:
        entry = json.dumps([time.monotonic(), code, line])
        with suppress(OSError):
            Path(folder, os.environ["RANK"]).write_text(entry)
            return
    print_error(line)


def print_error(line: str) -> None:
    """Write the error line of a failed command to stderr."""
    sys.stderr.write(f"volumen: {coloured('error:', 'bold red', sys.stderr)} {line}\n")
