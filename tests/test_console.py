"""Colours and tables: on a terminal, in a pipe, and with NO_COLOR and FORCE_COLOR."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

ESCAPE = "\x1b["
PROGRAM = """
import logging
from volumen.cli.running.execution import set_up_logging
from volumen.utils.terminal.console import make_console, make_table
set_up_logging()
logging.getLogger("volumen").warning("told %s", "[bold]")
table = make_table("volumes", ("volume", "shape"))
table.add_row("scroll [1]", "64x64x64")
table.add_row("a_name_of_a_volume_" * 8, "64x64x64")
make_console().print(table)
narrow = make_table("sizes", ("volume", "shape"))
narrow.add_row("scroll [1]", "64x64x64")
make_console().print(narrow)
"""


def environment(**values: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return {**known, "TERM": "xterm-256color", "COLUMNS": "80", **values}


def piped(*command: str, **values: str) -> str:
    run = subprocess.run(command, env=environment(**values), capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def on_terminal(*command: str, **values: str) -> str:
    """Return what a program writes to a terminal of 24 lines and 80 columns."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(
        command, env=environment(**values), stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux raises it when no process writes any more
                part = b""
            if not part:
                break
            parts.append(part)
        process.wait()
    os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")


def test_a_pipe_gets_plain_columns_and_nothing_is_cut():
    told = piped(sys.executable, "-c", PROGRAM)
    assert ESCAPE not in told
    assert "warning: told [bold]" in told
    assert re.search(r"^scroll \[1\] +64x64x64", told, flags=re.MULTILINE)
    assert "a_name_of_a_volume_" * 8 + "  64x64x64" in told
    assert told.isascii()


@needs_terminal
def test_a_terminal_gets_colours_and_lines_that_fit():
    told = on_terminal(sys.executable, "-c", PROGRAM)
    assert f"{ESCAPE}33mwarning:{ESCAPE}0m" in told
    assert "╭" in told
    bare = re.sub(r"\x1b\[[0-9;]*m", "", told)
    assert max(map(len, bare.splitlines())) <= 80
    # The text is wrapped, not cut.
    assert re.sub(r"[^a-z_]", "", bare).count("a_name_of_a_volume_") >= 1
    assert "…" not in bare


@needs_terminal
@pytest.mark.parametrize("values", [{"NO_COLOR": "1"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}])
def test_no_color_takes_colours_away(values):
    told = on_terminal(sys.executable, "-c", PROGRAM, **values)
    assert not re.findall(r"\x1b\[[0-9;]*3[0-7]m", told)
    assert "warning: told" in told


def test_force_color_keeps_colours_in_a_pipe():
    told = piped(sys.executable, "-c", PROGRAM, FORCE_COLOR="1")
    assert f"{ESCAPE}33mwarning:{ESCAPE}0m" in told
    assert ESCAPE not in piped(sys.executable, "-c", PROGRAM, FORCE_COLOR="1", NO_COLOR="1")


def test_an_empty_no_color_does_not_count():
    assert ESCAPE in piped(sys.executable, "-c", PROGRAM, FORCE_COLOR="1", NO_COLOR="")


@needs_terminal
def test_the_help_fits_a_screen():
    told = on_terminal(sys.executable, "-m", "volumen.cli.main", "--help")
    lines = told.rstrip("\n").splitlines()
    assert len(lines) <= 23, "24 lines with the prompt"
    assert max(map(len, lines)) <= 80
    for code in ("0 ", "1 ", "2 ", "130", "143"):
        assert code in told.partition("exit codes")[2]
