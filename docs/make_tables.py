"""Write the tables inside the pages that are known to the program: tasks, losses, schedules, metrics, flags.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; everything else of a page is prose.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bundle"))

PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def main() -> None:
    """Write the tables, or with --check report whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a table is out of date"
    )
    options = parser.parse_args()
    stale = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = PLACE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)
        if new != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def code(values: Iterable[Any]) -> str:
    """Return values as inline code, by commas."""
    return ", ".join(f"`{value}`" for value in values)


def yaml_value(value: Any) -> str:
    """Return a default as YAML writes it."""
    return {id(None): "null", id(True): "true", id(False): "false"}.get(id(value), str(value))


def tasks() -> str:
    """The derived targets, and the halo that each needs around a patch at equal spacing."""
    from volumen.derived.registry import (
        complete_params,
        derive_halo,
        get_task,
        task_kind,
        task_out_channels,
        task_types,
    )

    rows = []
    for name in task_types():
        task = get_task(name)
        halo = derive_halo({"task": {"type": name, **complete_params(task, {})}}, (1.0, 1.0, 1.0))[0]
        keys = code(f"{key}: {yaml_value(value)}" for key, value in task.defaults.items())
        channels = f"{task_out_channels(name, 2)} / {task_out_channels(name, 3)}"
        rows.append((f"[`{name}`](#{name})", task_kind(name), channels, keys, halo))
    return table(("type", "kind", "channels 2D / 3D", "keys with defaults", "halo, voxels"), rows)


def losses() -> str:
    """The losses of this project: the kinds of target they take and their keys."""
    from volumen.losses.base import KINDS, LABEL_KINDS, VALUE_KINDS
    from volumen.losses.registry import CONTEXT, loss_class, loss_names

    names = {frozenset(KINDS): "any", frozenset(LABEL_KINDS): "labels", frozenset(VALUE_KINDS): "values"}
    rows = []
    for name in loss_names():
        cls: Any = loss_class(name)
        shown = names.get(cls.kinds) or ", ".join(sorted(cls.kinds))
        if LABEL_KINDS < cls.kinds < KINDS:
            shown = "labels, " + ", ".join(sorted(cls.kinds - LABEL_KINDS))
        keys = [
            f"{parameter.name}: {yaml_value(parameter.default)}"
            for parameter in inspect.signature(cls).parameters.values()
            if parameter.name not in CONTEXT[:2]
        ]
        rows.append((f"[`{name}`](#{name.lower()})", shown, code(keys) or "none"))
    return table(("loss", "kinds", "keys with defaults"), rows)


def loss_definitions() -> str:
    """The definition of every loss (formula, reduction, source): its docstring up to the arguments, and its chart."""
    from volumen.losses.registry import loss_class, loss_names

    parts = []
    for name in loss_names():
        text = inspect.cleandoc(loss_class(name).__doc__ or "")
        text = re.split(r"\n\n?(?:Args|Raises|Example):", text)[0].strip()
        parts.append(f"### {name}\n\n{text}\n\n![{name}, drawn](images/losses/{name}.png)\n\n")
    return "".join(parts)


def schedules() -> str:
    """The schedules and their arguments."""
    from volumen.engines.schedules import CURVES

    rows = []
    for name, curve in CURVES.items():
        keys = [f"{p.name}: {yaml_value(p.default)}" for p in inspect.signature(curve).parameters.values()]
        rows.append(
            (
                f"`{name}`",
                (curve.__doc__ or "").strip().splitlines()[0].replace("`", ""),
                code(keys) or "none",
            )
        )
    return table(("scheduler", "learning rate", "arguments"), rows)


def metrics() -> str:
    """The metrics by kind of target: at every validation, and those of `volumen evaluate`."""
    from volumen.losses.base import KINDS
    from volumen.metrics.target_metrics import CHEAP_METRICS, metrics_of

    groups: dict[tuple[str, ...], list[str]] = {}
    for kind in sorted(KINDS):
        groups.setdefault(metrics_of(kind), []).append(kind)
    rows = [
        (
            code(kinds),
            code(name for name in found if name in CHEAP_METRICS),
            code(found) if len(found) < 10 else f"{len(found)} [scores](scores.md)",
        )
        for found, kinds in groups.items()
    ]
    return table(("kinds", "every validation", "`volumen evaluate`"), rows)


def scores() -> str:
    """The scores: of which targets, unit, direction, range, and what is measured unasked."""
    import math

    from volumen.metrics.score_names import SCORES

    words = {True: "smaller", False: "larger", None: "neither"}
    rows = []
    for name, score in SCORES.items():
        unasked = code(score.names) if score.parameter else "yes"
        rows.append(
            (
                f"`{name}X`" if score.parameter else f"`{name}`",
                ", ".join(score.families),
                score.unit or "–",
                words[score.smaller],
                f"from 0 {'on' if score.top == math.inf else f'to {score.top:g}'}",
                unasked if score.default else "no",
            )
        )
    return table(("name", "targets", "unit", "better", "range", "unasked"), rows)


def flags() -> str:
    """The flags of `volumen train` that set a key."""
    from volumen.cli.train import _FLAGS

    rows = [
        (f"`--{flag.replace('_', '-')}`", f"`{section}.{key}`") for flag, (section, key) in _FLAGS.items()
    ]
    rows.append(("`--patch-size`", "`tr_config.patch_size`"))
    rows.append(("`--loss`", "`tr_config.losses`, and the losses of every labelled target"))
    rows.append(("`--resume`", "`tr_setup.resume: true`; with FILE also `tr_setup.checkpoint_path`"))
    rows.append(("`--finetune FILE`", "`tr_setup.checkpoint_path`, `tr_setup.load_weights_only: true`"))
    return table(("flag", "key"), rows)


def old_keys() -> str:
    """Keys of earlier files that have another name here, have no effect, or are refused."""
    from volumen.config.sections import ALIASES, RETIRED
    from volumen.losses.arguments import OLDER_KEYS

    rows = [
        (f"`{section}.{old}`", f"`{section}.{new}`")
        for section, names in ALIASES.items()
        for old, new in names.items()
    ]
    rows += [
        (f"`{section}.{old}`", f"no effect, with a warning: {advice}")
        for section, names in RETIRED.items()
        for old, advice in names.items()
    ]
    rows += [(f"`losses: kwargs: {old}`", f"refused: {advice}") for old, advice in OLDER_KEYS.items()]
    return table(("key", "here"), rows)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (tasks, losses, loss_definitions, schedules, metrics, scores, flags, old_keys)
}

if __name__ == "__main__":
    main()
