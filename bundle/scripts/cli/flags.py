"""Command-line flags, made of the described fields of a dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, get_args, get_origin

from volumen.config.described import SettingField, choices_of, plain_hint, setting_fields
from volumen.utils.errors import VolumenError


class Once(argparse.Action):
    """Stores a value and refuses a second one, because argparse would silently use the last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest, None)
        if earlier is not None:
            parser.error(f"{option_string} is given twice ({earlier}, then {values}); give one path")
        setattr(namespace, self.dest, values)


def add_field_flags(
    parser: argparse.ArgumentParser, cls: type, groups: Sequence[str] = (), optional: Sequence[str] = ()
) -> dict[str, argparse._ArgumentGroup]:
    """Add a flag for every described field of a dataclass. A flag that is left out gives None.

    Args:
        parser: the command's parser.
        cls: a dataclass; see `volumen.config.described`.
        groups: headings of the help, in their order.
        optional: fields without default that may be left out.

    Returns:
        The groups by their headings, to which a command can add flags of its own.
    """
    headings = {title: parser.add_argument_group(title) for title in groups}
    order = ["", *groups]
    # Headings in their order, and below each what is required before what is not.
    items = sorted(
        setting_fields(cls), key=lambda item: (order.index(item.described.group), item.default is not MISSING)
    )
    for item in items:
        place = headings[item.described.group] if item.described.group else parser
        action = place.add_argument(*_names(item), dest=item.name, **_value(item))
        action.required = item.default is MISSING and item.name not in optional
    return headings


def open_box(text: str, flag: str = "--region") -> tuple[tuple[int | None, int | None], ...]:
    """Return bounds per axis; None where a bound is left out.

    Raises:
        VolumenError: something else than start:stop per axis.
    """
    bounds = []
    for part in text.split(","):
        start, colon, stop = part.partition(":")
        try:
            if not colon:
                raise ValueError
            bounds.append((int(start) if start else None, int(stop) if stop else None))
        except ValueError:
            raise VolumenError(flag, expected="start:stop per axis, by commas", found=repr(text)) from None
    return tuple(bounds)


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


def given_fields(
    arguments: argparse.Namespace, cls: type, readers: Mapping[str, Callable[[str], Any]] | None = None
) -> dict[str, Any]:
    """Return the values of the fields whose flags were given.

    Args:
        arguments: the parsed flags of `add_field_flags`.
        cls: the dataclass.
        readers: for fields by name, what reads their text; tuples of text and of numbers need none.

    Raises:
        VolumenError: a text that is not what its field takes.
    """
    given = {}
    for item in setting_fields(cls):
        value = getattr(arguments, item.name, None)
        if value is not None:
            read = (readers or {}).get(item.name)
            given[item.name] = read(value) if read else _read(item, value)
    return given


def help_of(item: SettingField) -> str:
    """Return the help of a field's flag: what it does, and the default."""
    does, without = _in_sentence(item.described.does), item.described.without
    if get_args(item.hint)[:1] == (str,):
        does += ", by commas"
    if item.default is True:
        does, default = without, does
    else:
        unset = item.default is False or item.default in (None, (), "")
        default = without if unset else item.default
    shown = item.default is not MISSING and default != ""
    return (f"{does} (default: {default})" if shown else does).replace("%", "%%")


def _names(item: SettingField) -> list[str]:
    flag = f"--no-{item.name.replace('_', '-')}" if item.default is True else flag_of(item.name)
    return [item.described.short, flag] if item.described.short else [flag]


def _value(item: SettingField) -> dict[str, Any]:
    """Return what argparse needs to know of a flag's value."""
    said: dict[str, Any] = {"help": help_of(item), "default": None}
    if item.hint is bool:
        return {**said, "action": "store_false" if item.default is True else "store_true"}
    if item.described.metavar is not None:
        said["metavar"] = item.described.metavar
    if item.described.once:
        said["action"] = Once
    if item.described.several:
        said["action"] = "append"
    if item.described.alone is not None:
        said.update(nargs="?", const=item.described.alone)
    if item.hint in (int, float):
        said["type"] = item.hint
    return {**said, "choices": choices_of(item.hint)}


def _read(item: SettingField, value: Any) -> Any:
    """Return a flag's value as its field's type: names and numbers are given by commas."""
    if get_origin(item.hint) is not tuple or not isinstance(value, str):
        return value
    kind = plain_hint(get_args(item.hint)[0])
    if kind is str:
        return tuple(value.replace(",", " ").split())
    try:
        return tuple(kind(part) for part in value.split(","))
    except ValueError:
        expected = "whole numbers by commas" if kind is int else "numbers by commas"
        raise VolumenError(flag_of(item.name), expected=expected, found=repr(value)) from None


def _in_sentence(text: str) -> str:
    """Return a sentence with a small first letter, unless it begins with a name such as NaN or OME-Zarr."""
    return text[:1].lower() + text[1:] if text[1:].split(" ", 1)[0].islower() else text
