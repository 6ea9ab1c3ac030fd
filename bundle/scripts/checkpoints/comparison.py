"""Compares a checkpoint with the run that resumes from it: architecture, data, settings, versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from volumen.checkpoints.file import plain
from volumen.utils.errors import VolumenError
from volumen.version import __version__


def differences(
    content: Mapping[str, Any], network: torch.nn.Module, data: Mapping[str, str], path: Path
) -> list[str]:
    """Compare a checkpoint with the run that resumes from it.

    Returns:
        Lines about harmless differences.

    Raises:
        VolumenError: the architecture or the data set differs.
    """
    # A fusion is no part of what is trained; checkpoints of older versions have no such key.
    mine = {**plain(getattr(network, "final_config", {})), "fusion": None}
    saved_config = {**content["model_config"], "fusion": None}
    if mine != saved_config:
        key, expected, found = first_difference(saved_config, mine)
        raise VolumenError(
            path,
            f"is of another architecture: model_config.{key}",
            expected=expected,
            found=found,
            remedy="resume with the run's own configuration, or load weights alone with --finetune",
        )
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    saved = {name: list(value.shape) for name, value in content["model"].items()}
    if shapes != saved:
        key, expected, found = first_difference(saved, shapes)
        raise VolumenError(
            path,
            f"is of another architecture: weight {key}",
            expected=expected,
            found=found,
            remedy="load what fits with --finetune",
        )
    changed = changed_data(content.get("data", {}), data)
    if changed:
        raise VolumenError(
            path,
            f"was trained on other data: {changed}",
            remedy="give the same data, or load weights alone with --finetune",
        )
    return [
        f"{path}: was saved by {name} {version}, this is {name} {now}; the result may differ in the last bits"
        for name, version, now in (
            ("torch", content["versions"]["torch"], str(torch.__version__)),
            ("volumen", content["versions"]["volumen"], __version__),
        )
        if version != now
    ]


def changed_data(old: Mapping[str, str], new: Mapping[str, str], names: int = 3) -> str:
    """Name the volumes that changed, are missing or are new; empty if none did or one side has no digests."""
    if not old or not new:
        return ""
    parts = []
    for what, found in (
        ("of other content", [name for name in old if name in new and old[name] != new[name]]),
        ("missing", [name for name in old if name not in new]),
        ("new", [name for name in new if name not in old]),
    ):
        if found:
            more = f" and {len(found) - names} more" if len(found) > names else ""
            parts.append(f"{', '.join(found[:names])}{more} {what}")
    return "; ".join(parts)


def first_difference(old: Any, new: Any, prefix: str = "") -> tuple[str, Any, Any]:
    """Return the first key at which two nested mappings differ, with both values ("absent" for a missing key)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            here = f"{prefix}.{key}" if prefix else str(key)
            if key not in old or key not in new:
                return here, old.get(key, "absent"), new.get(key, "absent")
            if old[key] != new[key]:
                return first_difference(old[key], new[key], here)
    return prefix, old, new


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line for every setting that differs, such as "tr_config.batch_size: 2, now 4"."""
    lines: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += changed_settings(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: {before}, now {now}")
    return lines
