"""What MONAI's experiment tracking (`--tracking mlflow`) needs to read this program's outputs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from volumen.handlers.records.run_directory import RunDirectory


def stay_local() -> None:
    """Keep MLflow from sending usage statistics, unless the environment says otherwise.

    It asks at every event, so it is not too late when MLflow is imported already.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def adapt_tracking(trainer: Sequence[Any], evaluator: Sequence[Any], directory: RunDirectory) -> None:
    """Have MONAI's `MLFlowHandler`s among some handlers log this program's runs; others are left alone.

    MONAI's settings are made for outputs that are lists, mix the validation's loss with the training's, and take any
    unfinished run for the one to go on with. Here every loss is logged at every step, validation has names of its own,
    a run bears the model's name, so that a resumed one goes on where it was, and what is kept with it is the
    experiment's settled configuration.

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
    """Return a step's losses and gradient norm by the names that TensorBoard has.

    Args:
        output: what `TrainStep` leaves.
    """
    numbers = {f"iteration/{name}": value for name, value in output["losses"].items()}
    if output.get("gradient_norm") is not None:
        numbers["iteration/gradient_norm"] = output["gradient_norm"]
    return numbers
