"""Write docs/configuration.md from the dataclasses of the configuration."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

from scripts.sections import ALIASES, RETIRED, SECTIONS, LossSpec, TargetConfig  # noqa: E402

INTRODUCTION = """# Configuration

An experiment is a YAML file with any part of the sections below; what it leaves out takes the default.
A value on the command line goes before the file, the file before the defaults. The file is data: an expression
(`$...`), a reference (`@...`, `%...`) or a `_target_` in it is refused.

Every run writes `<model_name>_config.yaml` with all values settled; given with `--config-path`, it trains the
same model again.

*This page is generated from the program's own definitions by `docs/make_configuration.py`.*
"""

TASKS = """
## `auxiliary_tasks`

Targets derived from labels, by name. Each has `type` and `source_target`, a list of `losses` as above, and
optionally `loss_weight` (1.0), `ds_interpolation` (linear) and `separate_decoder`. The keys of each type:

| type | channels 2D / 3D | keys with their defaults |
| --- | --- | --- |
"""


def main() -> None:
    """Write the page, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the page is not up to date"
    )
    options = parser.parse_args()
    path, text = ROOT / "docs" / "configuration.md", page()
    if options.check:
        sys.exit(0 if path.is_file() and path.read_text(encoding="utf-8") == text else 1)
    path.write_text(text, encoding="utf-8")


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    parts += [section(f"`{name}`", cls, name) for name, cls in SECTIONS.items()]
    parts.append(section("A target", TargetConfig))
    parts.append(section("A loss of a target", LossSpec))
    parts.append(tasks())
    return "\n".join(parts)


def section(title: str, cls: type, name: str = "") -> str:
    """Return a section's heading, its one-line description and the table of its keys."""
    said = (cls.__doc__ or "").strip().splitlines()[0]
    lines = [f"## {title}", "", said, "", "| key | type | default | effect |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        type_text, effect = describe(hints[item.name])
        lines.append(f"| `{item.name}` | {type_text} | {default(item)} | {effect} |")
    for old, new in ALIASES.get(name, {}).items():
        lines.append(f"| `{old}` | | | The same as `{new}`. |")
    for old, advice in RETIRED.get(name, {}).items():
        lines.append(f"| `{old}` | | | Loads with a warning, without effect: {advice}. |")
    return "\n".join(lines) + "\n"


def describe(hint: Any) -> tuple[str, str]:
    """Return a key's type and range, and its effect."""
    if get_origin(hint) is Annotated:
        base, *extras = get_args(hint)
        ranges = [text for extra in extras for text in limits(extra)]
        effect = next(
            (extra.description for extra in extras if isinstance(extra, FieldInfo) and extra.description), ""
        )
        text, inner = describe(base)
        return ", ".join([text, *ranges]), effect or inner
    return type_text(hint), ""


def type_text(hint: Any) -> str:
    """Return a type as a reader of YAML says it."""
    origin = get_origin(hint)
    if origin is Annotated:
        return describe(hint)[0]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in get_args(hint))
    if origin is list:
        return f"list of {type_text(get_args(hint)[0])}"
    if origin is dict or hint is dict:
        return "mapping"
    names = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        Any: "value",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def limits(extra: Any) -> list[str]:
    """Return the bounds that an annotation sets."""
    said = []
    for constraint in getattr(extra, "metadata", []):
        for name, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            value = getattr(constraint, name, None)
            if value is not None:
                said.append(f"{text} {value:g}")
    return said


def default(item: Any) -> str:
    """Return a key's default as YAML writes it."""
    if item.default is not MISSING:
        value = item.default
    elif item.default_factory is not MISSING:
        value = item.default_factory()
    else:
        return "required"
    # By identity: 0 and 1 equal False and True.
    names = {id(None): "null", id(True): "true", id(False): "false"}
    return f"`{names.get(id(value), value)}`"


def tasks() -> str:
    """Return the table of derived targets."""
    from scripts.transforms.task_registry import get_task, task_out_channels, task_types

    rows = []
    for name in task_types():
        keys = ", ".join(f"`{key}: {value}`" for key, value in get_task(name).defaults.items())
        rows.append(f"| `{name}` | {task_out_channels(name, 2)} / {task_out_channels(name, 3)} | {keys} |")
    return TASKS + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
