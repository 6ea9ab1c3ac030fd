"""Writes the configs of a released model: those of the bundle, with the experiment and the network inserted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from volumen.config.experiment_file import SECTION_NAMES
from volumen.sharing.config_text import ConfigText
from volumen.sharing.metadata import without_paths


def write_configs(
    source: Path,
    folder: Path,
    *,
    network: Mapping[str, Any],
    experiment: Mapping[str, Any],
) -> None:
    """Write every config of the bundle, for one model, as YAML and as JSON.

    MONAI's `load` reads JSON only; YAML is for readers, since it has comments.

    Args:
        source: the bundle's `configs`.
        folder: destination folder, which exists.
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
        json_text = json.dumps(yaml.safe_load(text), indent=2, ensure_ascii=False) + "\n"
        (folder / path.with_suffix(".json").name).write_text(json_text, encoding="utf-8")


def training_config(text: str, network: Mapping[str, Any], experiment: Mapping[str, Any]) -> str:
    """Return `train.yaml` with a model's settings as its sections.

    Without data the network is that of the model, so that tools can load it; with data it is planned from them and the
    settings, as always. The format of the data is not fixed, since later training may use other data.
    """
    config = ConfigText(text)
    for name in SECTION_NAMES:
        if name in experiment:
            section = without_paths(experiment[name])
            config.update(name, {**section, "format": None} if name == "dataset_config" else section)
    config.insert("network_config", dict(network), before="network_def")
    config.update(
        "network_def",
        {"final_config": "$@config.network_config if @config.has_data else @network_config"},
    )
    return config.text()


def inference_config(text: str, network: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return `inference.yaml` for a model: its settings, and a network that can be built without a file.

    Tools such as MONAI's `load` and `ckpt_export` build the network first and then load weights.
    """
    config = ConfigText(text)
    config.update("inference_config", without_paths(settings), only_known=True)
    built = {
        "_target_": "volumen.networks.multihead.MultiHeadDynUNet.from_config",
        "final_config": "@network_config",
    }
    # Not named "network": the Deploy SDK would use that instead of network_def, whose output is one tensor.
    config.insert("network_config", dict(network), before="predictor")
    config.insert("architecture", built, before="predictor")
    config.update("predictor", {"network": "@architecture"})
    config.update("network_def", {"network": "@architecture"})
    return config.text()
