"""The configs of a released model: the bundle's own, with the experiment and the network written into them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from volumen.config.experiment_file import SECTION_NAMES
from volumen.sharing.metadata import without_paths


def write_configs(
    source: Path,
    folder: Path,
    *,
    network: Mapping[str, Any],
    experiment: Mapping[str, Any],
) -> None:
    """Write every config of the bundle, for one model, as YAML and as JSON.

    MONAI's `load` reads JSON only; people read YAML, which has the comments.

    Args:
        source: the bundle's `configs`.
        folder: where they go; it exists.
        network: the architecture, `MultiHeadDynUNet.final_config`.
        experiment: the snapshot's sections.
    """
    for path in sorted(source.iterdir()):
        if path.suffix == ".conf":
            (folder / path.name).write_bytes(path.read_bytes())
        if path.suffix != ".yaml":
            continue
        text = path.read_text(encoding="utf-8")
        if path.name == "train.yaml":
            text = training_config(text, network, experiment)
        elif path.name == "inference.yaml":
            text = inference_config(text, network, experiment.get("inference_config") or {})
        (folder / path.name).write_text(text, encoding="utf-8")
        twin = json.dumps(yaml.safe_load(text), indent=2, ensure_ascii=False) + "\n"
        (folder / path.with_suffix(".json").name).write_text(twin, encoding="utf-8")


def training_config(text: str, network: Mapping[str, Any], experiment: Mapping[str, Any]) -> str:
    """Return `train.yaml` with a model's settings as its sections.

    Without data the network is the model's own, so that tools can load it; with data it is planned from them and the
    settings, as always. The format of the data is left open: whoever trains it on has others.
    """
    for name in SECTION_NAMES:
        if name in experiment:
            section = without_paths(experiment[name])
            text = replace_block(
                text, name, {**section, "format": None} if name == "dataset_config" else section
            )
    definition = yaml.safe_load(text)["network_def"]
    definition["final_config"] = "$@config.network_config if @config.dataset_dir else @network_config"
    return replace_block(text, "network_def", definition, {"network_config": dict(network)})


def inference_config(text: str, network: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return `inference.yaml` for a model: its settings, and a network that can be built without any file.

    Tools such as MONAI's `load` and `ckpt_export` build the network and then load weights of their own choice.
    """
    content = yaml.safe_load(text)
    for key, value in without_paths(settings).items():
        text = set_value(text, "inference_config", key, value)
    built = {
        "_target_": "volumen.networks.multihead.MultiHeadDynUNet.from_config",
        "final_config": "@network_config",
    }
    predictor = {**content["predictor"], "network": "@network"}
    text = replace_block(text, "predictor", predictor, {"network_config": dict(network), "network": built})
    return replace_block(text, "network_def", {**content["network_def"], "network": "@network"})


def set_value(text: str, section: str, key: str, value: Any) -> str:
    """Replace one value in a top-level section of a YAML text and keep its comment; no such key: no change."""
    block = _block(section).search(text)
    if block is None:
        raise ValueError(f"no entry {section!r} in the config")
    plain = yaml.safe_dump({key: value}, default_flow_style=True, width=1000).strip()[1:-1]
    line = re.compile(rf"^  {re.escape(key)}: [^#\n]*?(?P<comment> *#.*)?$", re.MULTILINE)
    changed = line.sub(lambda match: f"  {plain}{match['comment'] or ''}", block[0], count=1)
    return text[: block.start()] + changed + text[block.end() :]


def replace_block(text: str, key: str, value: Any, before: Mapping[str, Any] | None = None) -> str:
    """Replace a top-level entry of a YAML text and leave all other lines, comments included, as they are.

    Args:
        text: the YAML.
        key: the entry.
        value: its new value, plain data.
        before: entries to put in front of it.

    Raises:
        ValueError: the text has no such entry.
    """
    pattern = _block(key)
    if not pattern.search(text):
        raise ValueError(f"no entry {key!r} in the config")
    entries = {**(before or {}), key: value}
    block = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)
    return pattern.sub(lambda _: block, text, count=1)


def _block(key: str) -> re.Pattern[str]:
    """Match a top-level entry with all its lines."""
    return re.compile(rf"^{re.escape(key)}:.*\n(?:[ \t].*\n|\n(?=[ \t]))*", re.MULTILINE)
