"""The commented experiment file that `volumen new` writes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from volumen.utils.terminal.text import by, counted
from volumen.version import __version__

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager
    from volumen.config.targets import Target

_SUGGESTED = """\
# {name}_distance:               # signed distance to the boundary, negative inside
#   type: distance_transform
#   source_target: {source}
#   loss_weight: 0.1
#   losses: [{{name: SignedDistanceLoss, kwargs: {{rho: 6, beta: 1}}}}]
# {name}_normals:                # unit vectors across the surface
#   type: surface_normals
#   source_target: {source}
#   loss_weight: 0.1
#   losses: [{{name: CosineSimilarityLoss, kwargs: {{dim: 1}}}}]
"""


def experiment_text(
    config: ConfigManager, path: Path, inputs: list[str], given: Sequence[tuple[list[str], Any]] = ()
) -> str:
    """Return the experiment file as text: what was found and planned as values, choices as comments.

    Args:
        config: the settings and the data.
        path: where the file will lie.
        inputs: the data folders as the user gave them.
        given: section and key with their value, which the file has beside those found.
    """
    return _with_given(
        [
            f"# Written by volumen {__version__} for {', '.join(inputs)}: {_found(config)}.",
            f"#   volumen train {input_flags(inputs)} -o OUT --config-path {path.name}",
            "# Every key may be left out; docs/configuration.md has all of them. What is commented out is a choice.",
            "tr_setup:",
            f"  model_name: {_scalar(path.stem)}",
            "  # seed: 0                      # of split, weights and sampling",
            "",
            "dataset_config:",
            f"  # Voxel size: {_spacing(config)}.",
            "  # spacing: [1.0, 1.0, 1.0]     # if the files state a wrong one or none"
            if config.spatial_dims == 3
            else "  # spacing: [1.0, 1.0]          # if the files state a wrong one or none",
            f"  # Validated on: {_validated(config)}.",
            "  # val_volumes: [NAME]           # images that validate instead",
            "  targets:",
            *_targets(config),
            "",
            "tr_config:",
            f"  # patch_size: {list(config.patch_size)}  # voxels; what is planned from shapes and voxel size",
            "  # time_budget: 35m              # chooses network, patch and schedule for this long",
            "  # batch_size: 2",
            "  # max_epoch: 1000               # of max_steps_per_epoch: 250 each",
            "",
            "# Targets that are derived from a label while training, learned by the same network.",
            "auxiliary_tasks:",
            *(
                textwrap.indent(_SUGGESTED.format(name=name, source=_scalar(name)), "  ").rstrip()
                for name in _derivable(config)
            ),
        ],
        given,
    )


def _with_given(lines: list[str], given: Sequence[tuple[list[str], Any]]) -> str:
    """Return the lines as text, with the given keys at the start of their sections."""
    lines = list(lines)
    for (section, key), value in given:
        if f"{section}:" not in lines:
            lines += ["", f"{section}:"]
        written = yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]
        lines.insert(lines.index(f"{section}:") + 1, f"  {key}: {written}")
    return "\n".join([*lines, ""])


def input_flags(inputs: list[str]) -> str:
    """Return the data folders as the flags of a command."""
    return " ".join(f"-i {word}" for word in inputs)


def _found(config: ConfigManager) -> str:
    count = len(config.cases)
    shapes = sorted({by(case.image.shape) for case in config.cases})
    voxels = ", ".join(shapes[:3]) + (" and others" if len(shapes) > 3 else "")
    return f"{counted(count, 'image')} ({config.layout.format}), voxels: {voxels}"


def _spacing(config: ConfigManager) -> str:
    sizes = by(f"{side:g}" for side in config.spacing)
    if all(case.image.spacing is None for case in config.cases):
        return f"{sizes}, assumed, as no file states one"
    return f"{sizes} {config.length_unit}".strip()


def _validated(config: ConfigManager) -> str:
    names = [name for name, boxes in config.split.val.items() if boxes]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    shared = [name for name in names if config.split.train.get(name)]
    return (shown or "nothing") + (" (a part that training does not see)" if shared else "")


def _targets(config: ConfigManager) -> Iterator[str]:
    for name, target in config.primary_targets.items():
        labelled = sum(name in case.labels for case in config.cases)
        masked = sum(name in case.masks for case in config.cases)
        masks = f", masks in {masked}" if masked else ""
        yield f"    {_scalar(name)}:  # {_kind(target)}; labels in {labelled} of {len(config.cases)}{masks}"
        yield "      weight: 1.0                 # of its loss among all targets"
        if target.instances is not None:
            yield f"      instances: {target.instances}       # learned; or boundary, interior, distance"
        elif target.kind == "multiclass":
            yield "      # instances: foreground     # if the numbers count objects rather than name classes"
        if config.ignore_labels.get(name) is None and not masked:
            yield "      # ignore_label: 255         # a value that means unknown"


def _kind(target: Target) -> str:
    if target.instances is not None:
        return f"instances, {target.instances}"
    if target.classes:
        return f"classes {', '.join(target.classes)}"
    return {"binary": "foreground is all but 0", "multiclass": f"classes 0 to {target.out_channels - 1}"}.get(
        target.kind, f"{target.out_channels} channels that may overlap"
    )


def _derivable(config: ConfigManager) -> list[str]:
    return [name for name, target in config.primary_targets.items() if target.kind == "binary"]


def _scalar(text: str) -> str:
    """Return a text as YAML writes it: quoted where it would be read as something else."""
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).split("\n")[0]
