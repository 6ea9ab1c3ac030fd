"""The two files of a released model: MONAI wants the weights alone, prediction wants to know what they are.

`models/model.pt` holds the state_dict, as `monai.bundle.load` and `ckpt_export` read it. `models/model.json` beside it
holds the rest of a checkpoint that prediction needs: architecture, settings, epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scripts.errors import VolumenError
from scripts.handlers.checkpoint_file import write_atomically
from scripts.inference.predictor import Predictor
from scripts.sharing.metadata import to_json, without_paths

logger = logging.getLogger(__name__)

WEIGHTS, DESCRIPTION = "model.pt", "model.json"


def write_released(predictor: Predictor, folder: Path, *, versions: Mapping[str, str] | None = None) -> None:
    """Write the two files of a network.

    Args:
        predictor: the network and its settings.
        folder: where; it exists.
        versions: versions of what trained it.
    """
    # A copy of each weight, so that no file carries the storage that a view belongs to.
    weights = {name: value.detach().cpu().clone() for name, value in predictor.network.state_dict().items()}
    torch.save(weights, folder / WEIGHTS)
    description = {
        "model_config": getattr(predictor.network, "final_config", {}),
        "config": without_paths(predictor.config),
        "epoch": predictor.epoch,
        "versions": dict(versions or {}),
    }
    (folder / DESCRIPTION).write_text(to_json(description), encoding="utf-8")


def whole_checkpoint(weights: str) -> str:
    """Return the path of a checkpoint that unites a released model's two files.

    It is made once and kept in the user's cache under a name made of the files' content, so that the bundle may be
    read-only and a prediction that was interrupted finds the same file again.

    Args:
        weights: `model.pt`, with `model.json` beside it.

    Raises:
        VolumenError: one of the files is missing or cannot be read.
    """
    path = Path(weights)
    description = path.with_name(DESCRIPTION)
    for file in (path, description):
        if not file.is_file():
            raise VolumenError(
                file, "there is no such file", remedy="run from the bundle's folder, or give --bundle_root"
            )
    digest = hashlib.sha256()
    for file in (path, description):
        digest.update(file.read_bytes())
    folder = _cache_folder()
    whole = folder / f"{digest.hexdigest()}.pth"
    if not whole.is_file():
        content = {**_read_description(description), "model": _read_weights(path)}
        write_atomically(whole, lambda file: torch.save(content, file))
        logger.debug("%s: united with its description in %s", path, whole)
    return str(whole)


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises a dozen kinds for damaged files
        raise VolumenError(
            path, f"not readable ({type(error).__name__})", remedy="unzip the bundle again"
        ) from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise VolumenError(
            path, f"not readable ({type(error).__name__})", remedy="unzip the bundle again"
        ) from error


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "volumen" / "released"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.debug("%s: cannot be written (%s), a temporary folder is taken", folder, error)
        return Path(tempfile.mkdtemp(prefix="volumen-"))
