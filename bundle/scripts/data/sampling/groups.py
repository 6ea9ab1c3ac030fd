"""Groups of volumes that belong together, such as the scans of one patient: by a pattern or a table."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from volumen.data.case_names import known_name
from volumen.data.formats.detection import split_suffix
from volumen.utils.errors import VolumenError

KEY = "dataset_config.group_by"
_COLUMNS = ("volume", "group")


def find_groups(names: Sequence[str], rule: str) -> dict[str, str]:
    """Return the group of each volume.

    Args:
        names: names of the volumes.
        rule: a regular expression that is searched in each name (its first group in parentheses, else the whole match,
            names the group), or the path of a CSV file with the columns `volume` and `group`.

    Raises:
        VolumenError: a pattern or file that cannot be read, or a volume that it says nothing about.
    """
    return _of_table(names, rule) if rule.lower().endswith(".csv") else _of_pattern(names, rule)


def _of_pattern(names: Sequence[str], rule: str) -> dict[str, str]:
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise VolumenError(
            KEY, expected="a regular expression, or a .csv file", found=f"{rule!r} ({error})"
        ) from None
    groups = {}
    for name in names:
        match = pattern.search(name)
        group = (match[1] if pattern.groups else match[0]) if match else None
        if not group:
            raise VolumenError(
                KEY,
                expected=f"a pattern that finds a group in every name, also in {name!r}",
                found=repr(rule),
                remedy="widen the pattern, or give a .csv file with the columns volume and group",
            )
        groups[name] = group
    return groups


def _of_table(names: Sequence[str], rule: str) -> dict[str, str]:
    path = Path(rule)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except OSError as error:
        raise VolumenError(path, f"cannot be read ({error.strerror})", remedy=f"correct {KEY}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise VolumenError(path, expected="a table as CSV in UTF-8", found=str(error)) from None
    columns = list(rows[0]) if rows else []
    if any(column not in columns for column in _COLUMNS):
        raise VolumenError(
            path,
            expected="the columns volume and group",
            found=", ".join(map(str, columns)) or "no row",
            remedy="name them in the first line: volume,group",
        )
    table: dict[str, str] = {}
    for row in rows:
        volume, group = ((row[column] or "").strip() for column in _COLUMNS)
        name = volume if volume in names else known_name(split_suffix(volume)[0], names)
        if not group:
            raise VolumenError(path, expected=f"a group of {volume!r}", found="nothing")
        if table.setdefault(name, group) != group:
            raise VolumenError(path, f"puts {name!r} into two groups, {table[name]} and {group}")
    missing = [name for name in names if name not in table]
    if missing:
        raise VolumenError(
            path, expected=f"a row for every volume, also for {missing[0]!r}", found="none", remedy="add it"
        )
    return {name: table[name] for name in names}
