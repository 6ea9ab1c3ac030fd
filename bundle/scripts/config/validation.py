"""Checks of plain values against the dataclasses of the configuration, with one-line errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from volumen.config.sections import (
    ALIASES,
    PATTERN_MEANINGS,
    RETIRED,
    SECTIONS,
    UNSET,
    LossSpec,
)
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

# What was expected, by pydantic's name of the complaint (https://docs.pydantic.dev/latest/errors/validation_errors/).
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping of keys to values",
    "dataclass": "a mapping of keys to values",
    "finite": "a finite number",
}
_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


def check_section(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make the dataclass `cls` of plain values.

    Args:
        cls: a dataclass whose annotations pydantic understands.
        values: the values by key; missing keys take their defaults.
        where: the file and section, for errors.

    Returns:
        An instance of `cls`.

    Raises:
        VolumenError: for an unknown key (with the closest known one) or a value of the wrong type or range.
    """
    if not isinstance(values, Mapping):
        raise VolumenError(where, expected="a mapping of keys to values", found=repr(values))
    known = [item.name for item in fields(cls)]
    for key in values:
        if key not in known:
            remedy = closest(str(key), known) or f"known keys: {', '.join(known)}"
            raise VolumenError(f"{where}.{key}", "unknown key", remedy=remedy)
    _refuse_truth_as_number(cls, values, where)
    try:
        return _adapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise _told(error, where) from None


def check_sections(sections: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Check the sections of an experiment.

    Args:
        sections: values by section, and key, or the section's dataclass, which is checked already; `auxiliary_tasks`
            is checked with the targets that it derives from.
        origin: the file they come from, for errors.

    Returns:
        The dataclass of each section, with the older names of keys settled and unset values filled in.

    Raises:
        VolumenError: an unknown key, a wrong value, or two keys that contradict each other.
    """
    return {name: _section(name, sections.get(name) or {}, origin) for name in SECTIONS}


def given_keys(sections: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Return the keys by section that are null by default and that have a value.

    Args:
        sections: values by section, and key, or the section's dataclass, before unset values are filled in.
    """
    found = {}
    for name, keys in UNSET.items():
        section = sections.get(name) or {}
        values = section if isinstance(section, Mapping) else vars(section)
        found[name] = frozenset(key for key in keys if values.get(key) is not None)
    return found


def retired_keys(sections: Mapping[str, Mapping[str, Any] | None], origin: str) -> list[str]:
    """Return a line for every key of older files that has no effect here, with what replaces it."""
    return [
        f"{origin}: {name}.{key} has no effect here: {advice}"
        for name, keys in RETIRED.items()
        for key, advice in keys.items()
        if key in (sections.get(name) or {})
    ]


def _section(name: str, values: Any, origin: str) -> Any:
    checked: Any = values if isinstance(values, SECTIONS[name]) else _checked(name, values, origin)
    unset = {key: value for key, value in UNSET.get(name, {}).items() if getattr(checked, key) is None}
    return replace(checked, **unset)


def _checked(name: str, values: Mapping[str, Any], origin: str) -> Any:
    settled = {key: value for key, value in values.items() if key not in RETIRED.get(name, {})}
    for old, new in ALIASES.get(name, {}).items():
        if old in settled:
            if new in settled and settled[new] != settled[old]:
                raise VolumenError(f"{origin}: {name}.{old}", f"contradicts {new}", remedy=f"keep {new}")
            settled[new] = settled.pop(old)
    checked = check_section(SECTIONS[name], settled, f"{origin}: {name}")
    if (
        name == "model_config"
        and checked.strides
        and checked.pool_op_kernel_sizes not in (None, checked.strides)
    ):
        raise VolumenError(
            f"{origin}: model_config.pool_op_kernel_sizes", "contradicts strides", remedy="keep strides alone"
        )
    return checked


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _refuse_truth_as_number(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse true and false where a number is due: pydantic would take them for 1 and 0."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        kinds = set(_plain_types(hints[key]))
        given = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise VolumenError(f"{where}.{key}", expected="a number", found=_as_yaml(value))


def _plain_types(hint: Any) -> Iterable[type]:
    inner = get_args(hint)
    return [kind for part in inner for kind in _plain_types(part)] if inner else [hint]


def _told(error: ValidationError, where: str) -> VolumenError:
    """Turn pydantic's complaints about the first wrong key into one of ours.

    Of a key that may be of several types, each complains: those that came furthest into the value count.
    """
    complaints = error.errors(include_url=False)
    of_key = [complaint for complaint in complaints if complaint["loc"][0] == complaints[0]["loc"][0]]
    first = max(of_key, key=lambda complaint: len(_path(complaint)))
    path = _path(first)
    key = f"{where}.{path[0]}" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path[1:])
    if first["type"] == "missing":
        return VolumenError(key, "is missing", remedy="add it")
    if first["type"] == "unexpected_keyword_argument":
        remedy = closest(path[-1], [item.name for item in fields(LossSpec)])
        return VolumenError(key, "unknown key", remedy=remedy or "remove it")
    expected = dict.fromkeys(_expected(complaint) for complaint in of_key if _path(complaint) == path)
    return VolumenError(
        key, expected=" or ".join(expected), found=_as_yaml(first["input"]), remedy=_remedy(first)
    )


def _path(complaint: Any) -> list[int | str]:
    return [part for part in complaint["loc"] if isinstance(part, int) or not _is_type_label(part)]


def _expected(complaint: Any) -> str:
    kind, context = complaint["type"], complaint.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERN_MEANINGS[context["pattern"]]
    if kind == "literal_error":
        names = context["expected"].replace("'", "")
        return f"one of {names}" if " or " in names else names
    if bounds := [f"a number {word} {context[name]:g}" for name, word in _BOUNDS.items() if name in context]:
        return bounds[0]
    return _KINDS.get(kind.partition("_")[0]) or complaint["msg"][0].lower() + complaint["msg"][1:]


def _remedy(complaint: Any) -> str:
    given = complaint["input"]
    if complaint["type"] == "string_type" and isinstance(given, int | float):
        return f'put it in quotes: "{_as_yaml(given)}"'
    if complaint["type"] == "literal_error":
        return closest(given, complaint["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    return ""


def _as_yaml(value: Any) -> str:
    """Say a value as a YAML file does, so that the reader finds it there."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _is_type_label(part: str) -> bool:
    """Whether a part of pydantic's path names a member of a union rather than a key of ours."""
    return part in {"int", "float", "str", "none", "bool", "constrained-int", "LossSpec"} or "[" in part
