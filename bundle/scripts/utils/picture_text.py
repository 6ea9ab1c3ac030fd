"""Text for pictures, in the font that Pillow brings, which lacks many letters."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

_INSTEAD = {"µ": "u", "μ": "u", "Å": "angstrom", "×": "x", "–": "-", "²": "2", "³": "3", "ß": "ss", "ø": "o"}
# No font without Chinese has this letter, so that it is drawn as the sign of a missing one.
_MISSING = "\u4e00"


@cache
def picture_font(size: int) -> Any:
    """Return Pillow's own font of a size in pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def drawable(text: str) -> str:
    """Return a text in letters that the font has: "um" for "µm", "e" for "é", "?" for what has no substitute.

    >>> drawable("5 µm")
    '5 um'
    """
    return "".join(_letter(letter) for letter in text)


@cache
def _letter(letter: str) -> str:
    if _has(letter):
        return letter
    plain = unicodedata.normalize("NFC", letter)
    if plain in _INSTEAD:
        return _INSTEAD[plain]
    base = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    return base if base and all(_has(part) for part in base) else "?"


def _has(letter: str) -> bool:
    if letter.isascii():
        return True
    font = picture_font(16)
    return bytes(font.getmask(letter)) != bytes(font.getmask(_MISSING))
