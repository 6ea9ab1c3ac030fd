"""Reads and writes durations in the form `35m`, `12h`, `1h30m`."""

from __future__ import annotations

import re

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([dhms])")


def parse_duration(text: str) -> float:
    """Read a duration such as `35m`, `12h`, `1h30m` or `90s`.

    Args:
        text: numbers, each followed by d, h, m or s.

    Returns:
        Seconds, above 0.

    Raises:
        ValueError: the text is not a duration, or the duration is 0.
    """
    words = str(text).strip().lower()
    parts = _PART.findall(words)
    if not parts or _PART.sub("", words).strip():
        raise ValueError(f"expected a duration such as 35m, 12h or 1h30m, got {text!r}")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ValueError(f"expected a duration above 0, got {text!r}")
    return seconds


def format_duration(seconds: float) -> str:
    """Format seconds in the two largest suitable units: `2h05m`, `35m00s`, `12.3s`."""
    if seconds < 60:
        return f"{seconds:.3g}s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}m{rest:02d}s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours}h{rest:02d}m"
