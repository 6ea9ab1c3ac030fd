"""Names of cases whose files carry nnU-Net's number of the channel: CASE of CASE_0000.nii.gz.

A case was once called by its file, CASE_0000, where it has one channel; split files and settings of that time still
name the same cases.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TypeVar

FIRST_CHANNEL = "_0000"
_NUMBERED = re.compile(rf"{FIRST_CHANNEL}(?=(_\d+)?$)")
Value = TypeVar("Value")


def case_of(stem: str, label_stem: str) -> str:
    """Return the name of a case from the names of its files: that of the label, if only the number is more.

    >>> case_of("liver_001_0000", "liver_001"), case_of("liver_001_0000", "tumour_7")
    ('liver_001', 'liver_001_0000')
    """
    return label_stem if stem == label_stem + FIRST_CHANNEL else stem


def known_name(name: str, known: Container[str]) -> str:
    """Return a name as the cases are called now: without the number of the channel, where only that is known."""
    short = _NUMBERED.sub("", name)
    return short if name not in known and short in known else name


def with_known_names(parts: Mapping[str, Value], known: Container[str]) -> dict[str, Value]:
    """Return a mapping by case with its names as the cases are called now."""
    return {known_name(name, known): part for name, part in parts.items()}
