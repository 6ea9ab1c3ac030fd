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

from volumen.config.described import Described, setting_fields  # noqa: E402
from volumen.config.parts.targets import AuxiliaryTaskConfig, LossSpec, TargetConfig  # noqa: E402
from volumen.config.parts.unlabelled import UnlabelledConfig  # noqa: E402
from volumen.config.sections import ALIASES, RETIRED, SECTIONS  # noqa: E402

INTRODUCTION = """# Configuration

An experiment is a YAML file with any part of the sections below; missing keys have their default.
A value on the command line takes precedence over the file, and the file over the defaults. The file is data: an
expression (`$...`), a reference (`@...`, `%...`) or a `_target_` in it is refused.

Every run writes `<model_name>_config.yaml` with all resolved values; passed to `--config-path`, it trains the
same model again.

*This page is generated from the program's own definitions by `docs/make_configuration.py`.*
"""

TASKS = """
## `auxiliary_tasks`

Derived targets by name; [Derived targets](targets.md) defines each type. Keys of every derived target:

{common}

Keys of the types:

| type | channels 2D / 3D | key | type | default | effect |
| --- | --- | --- | --- | --- | --- |
"""

LENGTH, SIGMA = "number, above 0", "number, at least 0"
TASK_KEYS = {
    "reach": (
        f"{LENGTH}; or null",
        "Largest distance, in the smallest voxel size; null: 16. It determines the halo, so smaller is faster.",
    ),
    "grad_sigma": (SIGMA, "Width of the Gaussian before the gradient, in voxels of the smallest spacing."),
    "tensor_sigma": (SIGMA, "Width of the Gaussian over the products of the gradient, in the same unit."),
    "sigma": (LENGTH, "Width of the Gaussian window, in voxels of the smallest spacing."),
    "angle": ("number, 0 to 180 degrees", "Smallest angle between the directions of two nearest surfaces."),
    "offsets": (
        "list of lists of integer, auto or null",
        "Offsets in voxels, in the order of the axes, one channel each; auto: the previous voxel along each axis, and"
        " long ones by voxel size and object size; null: the previous voxel along each axis.",
    ),
    "radius": ("integer, 0 to 16", "Voxels per axis by which critical voxels are widened."),
    "compute_from": ("", "The signed distance, or the 0/1 mask."),
    "distance_type": (
        "",
        "d, negative inside; its depth inside, 0 outside; or its distance outside, 0 inside.",
    ),
    "side": ("", "Which voxels at a boundary are 1: on both sides, of labels above 0, or of the background."),
}
"""Type and effect of the keys of derived targets; an empty type stands for the key's set of values."""

REQUESTS = """
## `evaluate_config`

These keys of `bundle/configs/evaluate.yaml` configure the scores. `volumen evaluate` has a flag for each.

| key | type | default | effect |
| --- | --- | --- | --- |
{evaluate}

## Further keys of `inference_config` in `inference.yaml`

`bundle/configs/inference.yaml` has the keys of [`inference_config`](#inference_config) except `checkpoint_path` and
`load_strict` (`checkpoint` names the network), and these keys:

| key | type | default | effect |
| --- | --- | --- | --- |
{predict}

## A request of a prediction

The fields of `PredictRequest` in Python that `inference_config` does not have, or has under another key or in another
type. The other keys of [`inference_config`](#inference_config) but `load_strict` are fields too. `volumen predict` has
a flag for each field.

| field | key | type | default | effect |
| --- | --- | --- | --- | --- |
{request}
"""


def main() -> None:
    """Write the page, or with --check report whether it is up to date."""
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
    parts.append(section("`unlabelled`", UnlabelledConfig))
    parts.append(tasks())
    parts.append(requests())
    return "\n".join(parts)


def section(title: str, cls: type, name: str = "") -> str:
    """Return a section's heading, its one-line description and the table of its keys."""
    said = (cls.__doc__ or "").strip().splitlines()[0]
    lines = [f"## {title}", "", said, "", *table(cls)]
    for old, new in ALIASES.get(name, {}).items():
        lines.append(f"| `{old}` | | | The same as `{new}`. |")
    for old, advice in RETIRED.get(name, {}).items():
        lines.append(f"| `{old}` | | | Loads with a warning, without effect: {advice}. |")
    return "\n".join(lines) + "\n"


def table(cls: type) -> list[str]:
    """Return the lines of the table of a dataclass's keys."""
    lines = ["| key | type | default | effect |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        type_text, effect = describe(hints[item.name])
        lines.append(f"| `{item.name}` | {type_text} | {default(item)} | {effect} |")
    return lines


def describe(hint: Any) -> tuple[str, str]:
    """Return a key's type and range, and its effect."""
    if get_origin(hint) is Annotated:
        base, *extras = get_args(hint)
        ranges = [text for extra in extras for text in limits(extra)]
        effect = next(filter(None, map(description, extras)), "")
        text, inner = describe(base)
        return ", ".join([text, *ranges]), effect or inner
    return type_text(hint), ""


def description(extra: Any) -> str:
    """Return what something beside a type says of the field; empty where it is something else."""
    if isinstance(extra, FieldInfo):
        return extra.description or ""
    return extra.text if isinstance(extra, Described) else ""


def type_text(hint: Any) -> str:
    """Return a type in words for readers of YAML."""
    origin = get_origin(hint)
    if origin is Annotated:
        return describe(hint)[0]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in get_args(hint))
    if origin is tuple:
        return f"list of {type_text(get_args(hint)[0])}"
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
    for constraint in extra.metadata if isinstance(extra, FieldInfo) else [extra]:
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
    return f"`{names.get(id(value), list(value) if isinstance(value, tuple) else value)}`"


def tasks() -> str:
    """Return the tables of derived targets: the keys of all, and those of each type.

    Raises:
        KeyError: a key of a task is not described.
    """
    from volumen.derived.registry import get_task, task_out_channels, task_types

    rows = []
    for name in task_types():
        task, first = (
            get_task(name),
            f"`{name}` | {task_out_channels(name, 2)} / {task_out_channels(name, 3)}",
        )
        for key, value in task.defaults.items():
            kind, effect = TASK_KEYS[key]
            kind = ", ".join(f"`{choice}`" for choice in task.choices.get(key, ())) or kind
            rows.append(f"| {first} | `{key}` | {kind} | `{'null' if value is None else value}` | {effect} |")
            first = " | "
    return TASKS.format(common="\n".join(table(AuxiliaryTaskConfig))) + "\n".join(rows) + "\n"


def requests() -> str:
    """Return the tables of the keys that the bundle's other configs have beyond the sections of an experiment."""
    import yaml

    from volumen.config.prediction import InferenceConfig, PredictionSettings
    from volumen.evaluation.request import EvaluateRequest
    from volumen.inference.request import PredictRequest

    def keys(name: str) -> list[str]:
        config = yaml.safe_load((ROOT / "bundle" / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        return list(config[f"{name}_config"])

    known = {item.name for item in fields(InferenceConfig)}
    shared = {item.name for item in fields(PredictionSettings)}
    return REQUESTS.format(
        evaluate=rows(EvaluateRequest, keys("evaluate")),
        predict=rows(PredictRequest, [key for key in keys("inference") if key not in known]),
        request=request_rows(PredictRequest, shared),
    )


def rows(cls: type, names: list[str]) -> str:
    """Return the rows of some of a dataclass's fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    lines = []
    for item in fields(cls):
        if item.name in names:
            kind, effect = describe(hints[item.name])
            lines.append(f"| `{item.name}` | {kind} | {default(item)} | {effect} |")
    return "\n".join(lines)


def request_rows(cls: type, left_out: set[str]) -> str:
    """Return the rows of a request's fields, with the key by which YAML gives each."""
    hints, items = typing.get_type_hints(cls), {item.name: item for item in fields(cls)}
    return "\n".join(
        f"| `{item.name}` | {f'`{item.key}`' if item.key != item.name else ''} | {type_text(hints[item.name])} "
        f"| {default(items[item.name])} | {item.described.text} |"
        for item in setting_fields(cls)
        if item.name not in left_out
    )


if __name__ == "__main__":
    main()
