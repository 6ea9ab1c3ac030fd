"""Formats the output of commands: tables with lines and colours on a terminal, plain columns in a pipe or a file.

`NO_COLOR` (https://no-color.org) disables the colours, `FORCE_COLOR` enables them without a terminal; `NO_COLOR` takes
precedence over `FORCE_COLOR`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Width of output to a file, where no text needs to be cut.
_FILE_WIDTH = 10_000

_CODES = {"red": "31", "yellow": "33", "bold red": "1;31"}


def has_colours(stream: TextIO) -> bool:
    """Return whether output to a stream may be coloured."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str, stream: TextIO) -> str:
    """Return a text in a colour, or unchanged if the stream has no colours.

    Args:
        text: one line.
        colour: "red", "yellow" or "bold red".
        stream: the output stream.
    """
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if has_colours(stream) else text


def make_console(stream: TextIO | None = None) -> Console:
    """Return a console for tables; it does not interpret paths and names as markup.

    Args:
        stream: standard output by default.
    """
    from rich.console import Console

    stream = stream or sys.stdout
    shown = has_colours(stream)
    return Console(
        file=stream,
        width=None if stream.isatty() else _FILE_WIDTH,
        force_terminal=shown or stream.isatty(),
        no_color=not shown,
        color_system="auto" if shown else None,
        markup=False,
        highlight=False,
        emoji=False,
    )


def make_table(title: str, columns: Sequence[str], stream: TextIO | None = None) -> Table:
    """Return an empty table: with lines on a terminal, columns alone elsewhere. It breaks no word.

    Args:
        title: text above the table.
        columns: headings.
        stream: the output stream; standard output by default.
    """
    from rich import box

    from volumen.utils.terminal.console_table import WholeWordTable

    terminal = (stream or sys.stdout).isatty()
    style: dict[str, Any] = (
        {"box": box.ROUNDED, "header_style": "bold cyan", "border_style": "dim", "title_style": "bold"}
        if terminal
        else {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    )
    table = WholeWordTable(title=title, title_justify="left", **style)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
