"""Writes the README of a model for the BioImage Model Zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volumen.inference.predictor import Predictor
from volumen.sharing.metadata import channel_names, meaning
from volumen.sharing.model_card import data_section, performance_section, training_section


def zoo_card(predictor: Predictor, metadata: Mapping[str, Any]) -> str:
    """Return the text of `README.md`.

    Args:
        predictor: the network and its settings.
        metadata: result of `build_metadata`.
    """
    facts = metadata["inference"]
    rows = "\n".join(
        f"| {head.name} | {meaning(head, predictor.config)} | {', '.join(channel_names(head, predictor.config))} |"
        for head in predictor.targets.values()
    )
    count = sum(weight.numel() for weight in predictor.network.parameters())
    parts = [
        f"# {metadata['name']}",
        metadata["description"],
        "## Input",
        f"One raw image, {predictor.in_channels} channel(s), axes {', '.join(facts['axes'].upper())}. The description's"
        f" steps normalise it (scheme `{facts['normalization_scheme']}` of the training). Best at the training's patch,"
        f" {' x '.join(map(str, predictor.patch_size))}: the network normalises features over the tile that it sees."
        " A smaller image wants the smallest input that holds it, extended by reflection and never by zeros.",
        "## Output",
        "Probabilities after the description's steps; directions have unit length; distances and tensors are values."
        f"\n\n| target | what | channels of the network |\n| --- | --- | --- |\n{rows}",
        "## Training",
        data_section(metadata["training"]),
        training_section(predictor, metadata["training"], count),
        "## Validation",
        performance_section(metadata["eval_metrics"], predictor.epoch),
        "Score it on labelled images of your own: predict them, then compare by Dice and surface Dice.",
        "## References",
        "\n".join(f"{number}. {text}" for number, text in enumerate(metadata["references"], 1)),
    ]
    return "\n\n".join(parts) + "\n"
