"""Reads from the snapshot of a resumed run what an earlier start chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager


def decided_settings(
    config: ConfigManager, mark: str, keys: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]] | None:
    """Return settings of the resumed run's snapshot that an earlier start chose.

    Args:
        config: the configuration of the resumed run.
        mark: key of `tr_config` that only a snapshot with such a choice holds.
        keys: the keys of each section.

    Returns:
        The values by section and key; None without a snapshot, or without the mark in it.
    """
    snapshot = config.resumed_file("config.yaml")
    if snapshot is None:
        return None
    content = yaml.safe_load(snapshot.read_text(encoding="utf-8"))
    if not content.get("tr_config", {}).get(mark):
        return None
    return {
        section: {key: content[section][key] for key in names if key in content[section]}
        for section, names in keys.items()
    }
