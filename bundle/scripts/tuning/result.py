"""What tuning leaves: a checkpoint with the chosen settings, and a table of all trials."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.checkpoints.file import save_checkpoint, write_run_file
from volumen.inference.predictor import read_checkpoint

if TYPE_CHECKING:
    from volumen.tuning.grid import Trial
    from volumen.tuning.subject import Subject

RECORD = "tuning"
"""Key of a checkpoint under which it is recorded how its settings were chosen."""


def store(best: Trial, default: Trial, subject: Subject, path: Path) -> None:
    """Write the checkpoint of a trial with its settings in `inference_config`, whole or not at all.

    Args:
        best: the chosen trial.
        default: the trial with the default settings.
        subject: what was tuned.
        path: the file.

    Raises:
        VolumenError: the trial's checkpoint is damaged, or the file cannot be written.
    """
    content = read_checkpoint(Path(best.checkpoint))
    config = dict(content.get("config") or {})
    config["inference_config"] = {
        **config.get("inference_config", {}),
        **subject.as_config(best.settings),
    }
    record = {
        "from": Path(best.checkpoint).name,
        "score": subject.key,
        "value": best.value,
        "default": _known(default.value),
        "default_from": Path(default.checkpoint).name,
        "default_settings": dict(default.settings),
        "settings": dict(best.settings),
    }
    save_checkpoint({**content, "config": config, RECORD: record}, path)


def write_trials(trials: Sequence[Trial], subject: Subject, path: Path) -> None:
    """Write a CSV with a row per trial; an undefined score is an empty cell.

    Raises:
        VolumenError: the file cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["checkpoint", *subject.default, subject.key])
    for trial in trials:
        values = [f"{value:g}" for value in trial.settings.values()]
        table.writerow([Path(trial.checkpoint).name, *values, _cell(trial.value)])
    write_run_file(path, text.getvalue().encode())


def _known(value: float) -> Any:
    return None if math.isnan(value) else value


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"
