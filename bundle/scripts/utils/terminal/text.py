"""Formats sizes, counts and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def by(values: Iterable[object]) -> str:
    """Format sizes as people write them: 8x256x256."""
    return "x".join(map(str, values))


def counted(count: int, noun: str) -> str:
    """Format a number with its noun: "1 region", "2 patches"."""
    ending = "es" if noun.endswith("tch") else "s"
    return f"{count} {noun}{'' if count == 1 else ending}"


def aligned(rows: Sequence[Sequence[str]], *, ruled: bool = False) -> list[str]:
    """Return a table's lines; the cells of each column are as wide as its widest one.

    Args:
        rows: the header and the other rows, with the same number of cells in each.
        ruled: whether a line of dashes follows the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if ruled:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
