"""Sizes and tables the way people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def by(values: Iterable[object]) -> str:
    """Return sizes the way people write them: 8x256x256."""
    return "x".join(map(str, values))


def counted(count: int, noun: str) -> str:
    """Return a number of things: "1 region", "2 patches"."""
    ending = "es" if noun.endswith("tch") else "s"
    return f"{count} {noun}{'' if count == 1 else ending}"


def aligned(rows: Sequence[Sequence[str]], *, ruled: bool = False) -> list[str]:
    """Return a table's lines, the cells of each column as wide as its widest one.

    Args:
        rows: the header and the others, equally many cells in each.
        ruled: whether a line of dashes stands under the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if ruled:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
