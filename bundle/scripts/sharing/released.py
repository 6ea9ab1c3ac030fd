"""Writes the two files of a released model: the weights for MONAI's tools, and their description for prediction.

`models/model.pt` contains the state_dict in the form that `monai.bundle.load` and `ckpt_export` read.
`models/model.json` beside it contains the other parts of a checkpoint that prediction needs: architecture, settings,
epoch. `load_predictor` reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from volumen.inference.predictor import Predictor
from volumen.sharing.metadata import to_json, without_paths

WEIGHTS, DESCRIPTION = "model.pt", "model.json"


def write_released(predictor: Predictor, folder: Path, *, versions: Mapping[str, str] | None = None) -> None:
    """Write the two files of a network.

    Args:
        predictor: the network and its settings.
        folder: destination folder, which exists.
        versions: versions of the software that trained it.
    """
    # A copy of each weight, so that the file does not contain the whole storage of a view.
    weights = {name: value.detach().cpu().clone() for name, value in predictor.network.state_dict().items()}
    torch.save(weights, folder / WEIGHTS)
    description = {
        "model_config": getattr(predictor.network, "final_config", {}),
        "config": without_paths(predictor.config),
        "epoch": predictor.epoch,
        "versions": dict(versions or {}),
    }
    (folder / DESCRIPTION).write_text(to_json(description), encoding="utf-8")
