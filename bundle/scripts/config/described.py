"""Descriptions of fields, stored in their types; help, flags and documentation are generated from them.

A description is one sentence. After it, `; null: ...` explains None, `; false: ...` explains False, and
`; empty: ...` explains an empty list.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_MEANING = re.compile("; (?:null|false|empty): ")


@dataclass(frozen=True)
class Described:
    """The description of a field and the form of its flag.

    Args:
        text: the description; see the module.
        metavar: name of the value in the help; None: the choices, or the field's name.
        group: heading of the flag in the help; empty: none.
        short: a short flag, such as "-i"; empty: none.
        alone: value that the flag takes when the user gives none; None: a value is required.
        once: whether a second use of the flag is an error, since two paths contradict each other.
        several: whether the flag may be given several times; the command then receives a list.
    """

    text: str
    metavar: str | None = None
    group: str = ""
    short: str = ""
    alone: str | None = None
    once: bool = False
    several: bool = False

    @property
    def does(self) -> str:
        """The description without the meaning of None, False and an empty list."""
        return _MEANING.split(self.text)[0].removesuffix(".")

    @property
    def without(self) -> str:
        """The meaning of None, False or an empty list; empty if the description has none."""
        return "".join(_MEANING.split(self.text)[1:]).removesuffix(".")


@dataclass(frozen=True)
class FromKey:
    """Marks a field whose key in a YAML file has another name or type; that key also has its description.

    Args:
        section: the dataclass of the section.
        key: its key.
    """

    section: type
    key: str


@dataclass(frozen=True)
class SettingField:
    """A field with its description.

    Args:
        name: the field's name in Python, and of its flag.
        key: its key in a YAML file.
        hint: its type without None, ranges and descriptions.
        default: its default; `dataclasses.MISSING` where it has none.
        described: its description.
    """

    name: str
    key: str
    hint: Any
    default: Any
    described: Described


def setting_fields(cls: type) -> Iterator[SettingField]:
    """Yield the described fields of a dataclass, in their order."""
    hints = get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        extras = getattr(hints[item.name], "__metadata__", ())
        source = next((extra for extra in extras if isinstance(extra, FromKey)), None)
        if source is not None:
            section_hints = get_type_hints(source.section, include_extras=True)
            extras = (*extras, *section_hints[source.key].__metadata__)
        described = next((extra for extra in extras if isinstance(extra, Described)), None)
        if described is not None:
            key = item.name if source is None else source.key
            yield SettingField(item.name, key, plain_hint(hints[item.name]), default_of(item), described)


def document_fields(cls: type[T]) -> type[T]:
    """Add the described fields to a dataclass's docstring, for `help()`."""
    lines = [f"    {item.name}: {item.described.text}" for item in setting_fields(cls)]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines])
    return cls


def plain_hint(hint: Any) -> Any:
    """Return a type without None, ranges and descriptions; of several types the first."""
    if get_origin(hint) is Annotated:
        return plain_hint(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return plain_hint(next(part for part in get_args(hint) if part is not NoneType))
    return hint


def choices_of(hint: Any) -> tuple[Any, ...] | None:
    """Return the values of a `Literal`, or None for another type."""
    return get_args(hint) if get_origin(hint) is Literal else None


def default_of(item: Field) -> Any:
    """Return a field's default; `dataclasses.MISSING` where it has none."""
    return item.default_factory() if item.default_factory is not MISSING else item.default
