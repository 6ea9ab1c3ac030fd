"""Edits a YAML config and preserves its comments, its order and its other lines."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString


class ConfigText:
    """A YAML config that can be read, changed and written with its comments.

    Args:
        text: the YAML; its top level is a mapping.
    """

    def __init__(self, text: str) -> None:
        self._yaml = _round_trip()
        self._content: CommentedMap = self._yaml.load(text)

    def insert(self, key: str, value: Any, *, before: str) -> None:
        """Insert a new top-level entry before another one.

        Args:
            key: key of the new entry.
            value: plain data.
            before: key of the entry that follows it.
        """
        self._content.insert(list(self._content).index(before), key, _node(value))

    def update(self, key: str, values: Mapping[str, Any], *, only_known: bool = False) -> None:
        """Set keys of a top-level mapping and retain the comments beside them.

        Args:
            key: key of the mapping.
            values: plain data by key.
            only_known: whether to ignore keys that the mapping does not have.
        """
        section = self._content[key]
        for name, value in values.items():
            if name in section or not only_known:
                section[name] = _node(value)

    def text(self) -> str:
        """Return the YAML, which PyYAML reads as the same values."""
        stream = io.StringIO()
        self._yaml.dump(self._content, stream)
        return stream.getvalue()


def _round_trip() -> YAML:
    writer = YAML()
    writer.preserve_quotes = True
    writer.width = 1000
    writer.indent(mapping=2, sequence=4, offset=2)
    representer = writer.representer
    representer.add_representer(
        type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    # PyYAML reads YAML 1.1, in which 1e-05 is text and 1.0e-05 a number.
    representer.add_representer(
        float,
        lambda self, value: self.represent_scalar(
            "tag:yaml.org,2002:float", yaml.safe_dump(value).splitlines()[0]
        ),
    )
    return writer


def _node(value: Any) -> Any:
    """Return plain data as nodes of the writer: mappings over several lines, lists of plain values in one line."""
    if isinstance(value, Mapping):
        return CommentedMap((key, _node(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        items = CommentedSeq(_node(item) for item in value)
        if not any(isinstance(item, dict | list) for item in items):
            items.fa.set_flow_style()
        return items
    if isinstance(value, str) and _is_read_as_another_type(value):
        return DoubleQuotedScalarString(value)
    return value


def _is_read_as_another_type(text: str) -> bool:
    """Return whether PyYAML, which reads YAML 1.1, parses an unquoted word as a boolean, a number or null."""
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return str(tag) != "tag:yaml.org,2002:str"
