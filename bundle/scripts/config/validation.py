"""Checks plain values against the dataclasses of the configuration; errors are one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from volumen.config.parts.targets import LossSpec
from volumen.config.parts.unlabelled import UnlabelledConfig
from volumen.config.sections import ALIASES, PATTERN_MEANINGS, RETIRED, SECTIONS, UNSET
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

# The expected value by pydantic's error type (https://docs.pydantic.dev/latest/errors/validation_errors/).
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
    """Return an instance of the dataclass `cls` from plain values.

    Args:
        cls: a dataclass whose annotations pydantic understands.
        values: the values by key; missing keys take their defaults.
        where: the file and section, for errors.

    Returns:
        An instance of `cls`.

    Raises:
        VolumenError: an unknown key (names the closest known one) or a value of the wrong type or range.
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
        raise _one_line_error(error, where) from None


def check_sections(sections: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Check the sections of an experiment.

    Args:
        sections: values by section, and key, or the section's dataclass, which is not checked again.
            `auxiliary_tasks` is checked later, with the targets from which it derives.
        origin: the file they come from, for errors.

    Returns:
        The dataclass of each section, with aliases of keys resolved and unset values filled in.

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
    """Return a line for every key of older files that has no effect here, with its replacement."""
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
    resolved = {key: value for key, value in values.items() if key not in RETIRED.get(name, {})}
    for old, new in ALIASES.get(name, {}).items():
        if old in resolved:
            if new in resolved and resolved[new] != resolved[old]:
                raise VolumenError(f"{origin}: {name}.{old}", f"contradicts {new}", remedy=f"keep {new}")
            resolved[new] = resolved.pop(old)
    checked = check_section(SECTIONS[name], resolved, f"{origin}: {name}")
    if (
        name == "model_config"
        and checked.strides
        and checked.pool_op_kernel_sizes not in (None, checked.strides)
    ):
        raise VolumenError(
            f"{origin}: model_config.pool_op_kernel_sizes", "contradicts strides", remedy="keep strides alone"
        )
    if name == "tr_config" and checked.average_last is not None:
        count = checked.average_last
        if count >= 1 and (count < 2 or count != int(count)):
            raise VolumenError(
                f"{origin}: {name}.average_last",
                expected="a whole number of epochs from 2, or a fraction below 1",
                found=f"{count:g}",
            )
    if name == "dataset_config":
        _refuse_two_splits(checked, f"{origin}: {name}")
        if checked.normalize_per_volume and not isinstance(checked.normalization_scheme, str):
            raise VolumenError(
                f"{origin}: {name}.normalize_per_volume",
                "does not go with a scheme for each channel, which takes the statistics of the training set",
                remedy="leave it out, or give one scheme for all channels",
            )
    return checked


def _refuse_two_splits(data: Any, where: str) -> None:
    """Refuse settings that choose the validation part in two ways."""
    ways = [
        key for key in ("val_volumes", "val_path", "split_path", "fold") if getattr(data, key) is not None
    ]
    if len(ways) > 1 and ways != ["split_path", "fold"]:
        raise VolumenError(f"{where}.{ways[1]}", f"contradicts {ways[0]}", remedy="keep one of them")
    if data.group_by is not None and ways not in ([], ["fold"]):
        raise VolumenError(
            f"{where}.group_by", f"has no effect beside {ways[0]}, which names what validates", remedy="leave it out"
        )  # fmt: skip
    if data.val_volumes is not None and not data.val_volumes:
        raise VolumenError(
            f"{where}.val_volumes", "names no image", remedy="leave it out, or set tr_setup.tr_val_split to 1"
        )
    if data.fold is not None:
        from volumen.data.sampling.folds import read_fold

        read_fold(data.fold)


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _refuse_truth_as_number(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse true and false for a number, since pydantic would convert them to 1 and 0."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        kinds = set(_plain_types(hints[key]))
        given = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise VolumenError(f"{where}.{key}", expected="a number", found=_as_yaml(value))


def _plain_types(hint: Any) -> Iterable[type]:
    inner = get_args(hint)
    return [kind for part in inner for kind in _plain_types(part)] if inner else [hint]


def _one_line_error(error: ValidationError, where: str) -> VolumenError:
    """Return pydantic's errors about the first wrong key as one `VolumenError`.

    For a key with several types, pydantic reports an error per type; the one with the deepest path is used.
    """
    details = error.errors(include_url=False)
    of_key = [detail for detail in details if detail["loc"][0] == details[0]["loc"][0]]
    first = max(of_key, key=lambda detail: len(_path(detail)))
    path = _path(first)
    key = f"{where}.{path[0]}" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path[1:])
    if first["type"] == "missing":
        return VolumenError(key, "is missing", remedy="add it")
    if first["type"] == "unexpected_keyword_argument":
        nested = UnlabelledConfig if path[0] == "unlabelled" else LossSpec
        remedy = closest(path[-1], [item.name for item in fields(nested)])
        return VolumenError(key, "unknown key", remedy=remedy or "remove it")
    expected = dict.fromkeys(_expected(detail) for detail in of_key if _path(detail) == path)
    return VolumenError(
        key, expected=" or ".join(expected), found=_as_yaml(first["input"]), remedy=_remedy(first)
    )


def _path(detail: Any) -> list[int | str]:
    return [part for part in detail["loc"] if isinstance(part, int) or not _is_type_label(part)]


def _expected(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERN_MEANINGS[context["pattern"]]
    if kind == "literal_error":
        names = context["expected"].replace("'", "")
        return f"one of {names}" if " or " in names else names
    if bounds := [f"a number {word} {context[name]:g}" for name, word in _BOUNDS.items() if name in context]:
        return bounds[0]
    return _KINDS.get(kind.partition("_")[0]) or detail["msg"][0].lower() + detail["msg"][1:]


def _remedy(detail: Any) -> str:
    given = detail["input"]
    if detail["type"] == "string_type" and isinstance(given, int | float):
        return f'put it in quotes: "{_as_yaml(given)}"'
    if detail["type"] == "literal_error":
        return closest(given, detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    return ""


def _as_yaml(value: Any) -> str:
    """Write a value as a YAML file does, so that the reader finds it there."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _is_type_label(part: str) -> bool:
    """Whether a part of pydantic's path names a member of a union rather than a key of ours."""
    return (
        part in {"int", "float", "str", "none", "bool", "constrained-int", "LossSpec", "UnlabelledConfig"}
        or "[" in part
    )
