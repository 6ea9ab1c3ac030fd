"""Running a command so that a mistake is one line, a defect a short one, and a signal an exit code."""

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

from volumen.utils.console import coloured
from volumen.utils.errors import VolumenError, find_cause

logger = logging.getLogger(__name__)

EXIT_DEFECT, EXIT_USER_ERROR, EXIT_INTERRUPT = 1, 2, 130
#: Names the folder in which each of several processes leaves its last line for their parent, `engines.processes`.
TOLD = "VOLUMEN_TOLD"


def run_guarded(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command and turn what it raises into a line on stderr and an exit code.

    Args:
        command: takes the options, returns an exit code.
        options: has `verbose` and `quiet`.

    Returns:
        The command's exit code; 2 for a mistake the user can mend, 1 for a defect, 130 for Ctrl-C.
    """
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    try:
        return command(options)
    except KeyboardInterrupt:
        _tell(EXIT_INTERRUPT, "stopped by Ctrl-C")
        return EXIT_INTERRUPT
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_DEFECT
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        code, line = explain(error)
        _tell(code, line)
        return code


def leave(code: int) -> None:
    """End this process with an exit code.

    One of several processes that did not succeed ends at once: what it shares with the others may be gone, and tidying
    up would wait for it. Its files are written.
    """
    if code and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send our messages to stderr in a short form, and keep the libraries' own quiet unless asked."""
    # Of several processes that train together the first one tells what they do and what they find.
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
    # What tifffile logs of a damaged file, the reader raises as an error of ours.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    if quiet:
        # What tqdm reads as its default for `disable`.
        os.environ["TQDM_DISABLE"] = "1"
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger("py.warnings").setLevel(logging.ERROR)
        # Ignite and MONAI log every exception that passes through them; we report it in one line.
        logging.getLogger("ignite").setLevel(logging.CRITICAL)
        logging.getLogger("monai").setLevel(logging.CRITICAL)


class _Formatter(logging.Formatter):
    """Time and message; the level too where it is a warning or worse."""

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
    """Return the exit code for an error, and the line that tells a person what is wrong.

    Args:
        error: what a command raised, as it came through the libraries.
    """
    cause = find_cause(error)
    if isinstance(cause, VolumenError):
        return EXIT_USER_ERROR, str(cause)
    if isinstance(cause, OSError):
        return EXIT_USER_ERROR, _explain_os_error(cause)
    text = " ".join(str(cause).split())
    if "out of memory" in text.lower() or isinstance(cause, MemoryError):
        return (
            EXIT_USER_ERROR,
            f"out of memory ({text[:200]}); use a smaller --patch-size or --batch-size",
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


def _tell(code: int, line: str) -> None:
    """Say a line, or have the parent of several processes say it, once for all of them."""
    folder = os.environ.get(TOLD)
    if folder and "RANK" in os.environ:
        entry = json.dumps([time.monotonic(), code, line])
        with suppress(OSError):
            Path(folder, os.environ["RANK"]).write_text(entry)
            return
    say(line)


def say(line: str) -> None:
    """Write the one line that a command which failed has for a person."""
    sys.stderr.write(f"volumen: {coloured('error:', 'bold red', sys.stderr)} {line}\n")
