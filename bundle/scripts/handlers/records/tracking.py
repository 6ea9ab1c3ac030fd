"""Adapts MONAI's experiment tracking (`--tracking mlflow`) to the outputs of this program."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from volumen.handlers.records.run_directory import RunDirectory


def stay_local() -> None:
    """Disable MLflow's usage statistics, unless the environment variable is set already.

    MLflow reads the variable at every event, so this also works after MLflow is imported.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def adapt_tracking(trainer: Sequence[Any], evaluator: Sequence[Any], directory: RunDirectory) -> None:
    """Adapt the MONAI `MLFlowHandler`s among some handlers to this program's runs; other handlers are not changed.

    MONAI's defaults expect outputs that are lists, mix the validation's loss with the training's, and continue any
    unfinished run. Here every loss is logged at every step, validation has its own metric names, a run has the
    model's name, so that a resumed run continues its own record, and the stored artifact is the experiment's resolved
    configuration.

    Args:
        trainer: the trainer's handlers, before it starts.
        evaluator: the evaluator's handlers.
        directory: the run's folder.
    """
    from monai.handlers import MLFlowHandler

    for handler in (*trainer, *evaluator):
        if isinstance(handler, MLFlowHandler):
            handler.output_transform = step_numbers
            handler.run_name = handler.run_name or directory.model_name
            if any(handler.artifacts):
                handler.artifacts = (str(directory.file("config.yaml")),)
    for handler in evaluator:
        if isinstance(handler, MLFlowHandler):
            # The trainer's metrics hold the evaluator's, under "val/...".
            handler.epoch_logger = _nothing


def _nothing(engine: Any) -> None:
    """Log nothing."""


def step_numbers(output: Mapping[str, Any]) -> dict[str, float]:
    """Return a step's losses and gradient norm under their TensorBoard names.

    Args:
        output: the output of `TrainStep`.
    """
    numbers = {f"iteration/{name}": value for name, value in output["losses"].items()}
    if output.get("gradient_norm") is not None:
        numbers["iteration/gradient_norm"] = output["gradient_norm"]
    return numbers
