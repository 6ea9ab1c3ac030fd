"""Finds the checkpoint from which a run resumes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from volumen.checkpoints.comparison import differences
from volumen.checkpoints.file import DamagedCheckpoint, load_checkpoint, read_file
from volumen.handlers.records.run_directory import RunDirectory
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


def find_resumable(directory: RunDirectory) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest complete checkpoint of a run and its content; None when the run has no checkpoint.

    Damaged files are skipped with a warning. A checkpoint of an interrupted epoch is compared by its iteration.

    Raises:
        VolumenError: checkpoints exist, and all of them are damaged.
    """
    candidates = [path for _, path in reversed(directory.checkpoints())]
    damaged: list[str] = []
    interrupted = _load_or_warn(directory.interrupted, damaged) if directory.interrupted.is_file() else None
    for path in candidates:
        content = _load_or_warn(path, damaged)
        if content is not None:
            if interrupted is not None and interrupted["iteration"] > content["iteration"]:
                return directory.interrupted, interrupted
            return path, content
    if interrupted is not None:
        return directory.interrupted, interrupted
    if damaged:
        raise VolumenError(
            directory.path,
            f"every checkpoint is damaged ({', '.join(damaged)})",
            remedy="start anew with another --model-name",
        )
    return None


def check_resumable(
    directory: RunDirectory,
    resume: bool | str | os.PathLike,
    network: torch.nn.Module,
    data: Mapping[str, str],
) -> None:
    """Refuse a checkpoint of another architecture or data set before the data are searched, which can take minutes.

    It reads no weights. A file that cannot be read raises its error later, when the run starts.

    Args:
        directory: the run's folder.
        resume: the argument `resume` of `Checkpointer`.
        network: the network, which may be on the "meta" device.
        data: a digest of each volume by name.

    Raises:
        VolumenError: the file does not exist, or the architecture or the data set differs.
    """
    newest = resume is True or resume == "latest"
    path = newest_checkpoint(directory) if newest else Path(resume)  # type: ignore[arg-type]
    if path is None:
        return
    if not path.is_file():
        raise VolumenError(path, "there is no such checkpoint")
    try:
        content = read_file(path, map_location="meta", mmap=True)
    except DamagedCheckpoint as error:
        logger.debug("%s cannot be looked at: %s", path, error)
        return
    if not isinstance(content, Mapping) or "model_config" not in content:
        return
    differences(content, network, data, path)


def newest_checkpoint(directory: RunDirectory) -> Path | None:
    """Return the checkpoint of the highest epoch number (not the newest file time); None if there is none."""
    saved = directory.checkpoints()
    if saved:
        return saved[-1][1]
    return directory.interrupted if directory.interrupted.is_file() else None


def _load_or_warn(path: Path, damaged: list[str]) -> dict[str, Any] | None:
    try:
        return load_checkpoint(path)
    except DamagedCheckpoint as error:
        logger.warning("%s; it is skipped", error)
        damaged.append(path.name)
        return None
