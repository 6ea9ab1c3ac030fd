"""The bar of a prediction: its line on a terminal, and nothing elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys

from volumen.cli.running.progress_bar import ProgressBar, shortened

NAME = "segment_20230702185753_surface_volume_of_a_scroll_with_a_long_name_and_more"


class Terminal(io.StringIO):
    """Keeps what is written to a terminal of 80 columns."""

    def isatty(self):
        return True


def shown(monkeypatch, stream):
    """Return what a prediction with a pass and a warning writes."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with ProgressBar() as bar:
        bar(NAME, 0, 12345)
        logging.getLogger("volumen").warning("something odd")
        bar(NAME, 12345, 12345)
        bar(f"{NAME}, finding components", 0, 4)
        bar(f"{NAME}, finding components", 4, 4)
        bar("b", 1, 1)
    return stream.getvalue()


def test_a_terminal_shows_volume_pass_and_unit_in_one_line_that_goes(monkeypatch):
    text = shown(monkeypatch, Terminal())
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    assert max(map(len, lines)) < 80
    assert all("%|" in line for line in lines if line != "something odd")
    assert any(re.match(r"segment_.+\.\.\..+_and_more: .* 0/12345 windows \[", line) for line in lines)
    assert any(re.match(r"seg.+\.\.\..+ore, finding components: .* 0/4 blocks \[", line) for line in lines)
    assert text.count("\n") == 1  # after the warning
    assert text.endswith("\r")
    assert not text.split("\r")[-2].strip()


def test_a_file_gets_the_messages_alone(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == "something odd\n"


def test_quiet_hides_the_bar(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar() as bar:
        bar("a", 1, 2)
    assert not stream.getvalue()


def test_a_long_name_loses_its_middle():
    assert shortened("short", 9) == "short"
    assert shortened("0123456789abcdef", 11) == "0123...cdef"
    assert len(shortened(NAME, -5)) == 9
