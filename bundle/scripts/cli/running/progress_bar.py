"""The progress bar of `volumen predict`: current volume, current pass, and progress."""

from __future__ import annotations

import shutil
from typing import Any

from volumen.utils.terminal.progress import hidden

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]"
_BESIDE = 48
"""Columns for everything except the description, with a bar of about ten columns."""


class ProgressBar:
    """One line at the end of a terminal, which disappears at the end; nothing without a terminal.

    Messages that are logged meanwhile appear above it.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: str | None = None

    def __enter__(self) -> ProgressBar:
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._above = logging_redirect_tqdm()
        self._above.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()
        self._above.__exit__(*error)

    def __call__(self, name: str, count: int, total: int) -> None:
        """Show the progress; called by `volumen.inference.predict.predict`.

        Args:
            name: name of the volume, followed by a comma and the pass if blocks are counted rather than windows.
            count: number of finished windows or blocks.
            total: number of all windows or blocks.
        """
        if name != self._shown:
            self._close()
            self._bar, self._shown = _open(name, total), name
        self._bar.update(count - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _open(name: str, total: int) -> Any:
    from tqdm import tqdm

    volume, _, title = name.rpartition(", ")
    width = shutil.get_terminal_size().columns - _BESIDE
    shown = f"{shortened(volume, width - len(title) - 2)}, {title}" if volume else shortened(name, width)
    return tqdm(
        total=total,
        desc=shown,
        unit="blocks" if volume else "windows",
        bar_format=_FORMAT,
        dynamic_ncols=True,
        leave=False,
        disable=hidden(True),
    )


def shortened(name: str, width: int) -> str:
    """Return a name whose middle is replaced by dots if it is longer than `width` characters, at least 9."""
    width = max(width, 9)
    if len(name) <= width:
        return name
    end = (width - 3) // 2
    return f"{name[: width - 3 - end]}...{name[-end:]}"
