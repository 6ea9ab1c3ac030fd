"""A table that breaks no word: where the terminal is too narrow for its columns, each row is a list of its own."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

_INDENT, _GAP = 2, 2


class WholeWordTable(Table):
    """A table of texts. Its first column names the rows."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw columns where the longest word of each fits beside the others, else the rows one by one."""
        least = [_longest_word(column) for column in self.columns]
        beside = self._extra_width + sum(self._get_padding_width(index) for index in range(len(least)))
        room = options.max_width - beside - sum(least)
        if room < 0:
            yield from self._rows_one_by_one(options.max_width)
            return
        for column, width in zip(self.columns, least, strict=True):
            column.width = width + min(room, _whole(column) - width)
            room -= column.width - width
        yield from super().__rich_console__(console, options)

    def _rows_one_by_one(self, columns: int) -> Iterable[Text]:
        if self.title:
            yield Text(str(self.title), style="bold", overflow="fold")
        headers = [str(column.header) for column in self.columns]
        left = _INDENT + max(map(cell_len, headers[1:]), default=0) + _GAP
        for cells in zip(*(list(column.cells) for column in self.columns), strict=True):
            yield Text(f"{headers[0]} {cells[0]}", style="bold cyan", overflow="fold")
            for header, cell in zip(headers[1:], cells[1:], strict=True):
                if str(cell):
                    yield from _entry(header, str(cell), left, columns)


def _entry(header: str, text: str, left: int, columns: int) -> Iterable[Text]:
    lines = textwrap.wrap(text, max(columns - left, 1), break_long_words=False, break_on_hyphens=False)
    if any(cell_len(line) > columns - left for line in lines):
        # Not even one word fits beside the heading.
        lines = textwrap.wrap(
            f"{header}  {text}", columns - _INDENT, break_long_words=False, break_on_hyphens=False
        )
        for line in lines:
            yield Text(" " * _INDENT + line, overflow="fold")
        return
    for number, line in enumerate(lines):
        beginning = " " * _INDENT + header if number == 0 else ""
        yield Text(beginning.ljust(left) + line, overflow="fold")


def _longest_word(column: Column) -> int:
    return max((cell_len(word) for text in _texts(column) for word in text.split()), default=1)


def _whole(column: Column) -> int:
    return max((cell_len(line) for text in _texts(column) for line in text.splitlines()), default=1)


def _texts(column: Column) -> list[str]:
    return [str(column.header), *map(str, column.cells)]
