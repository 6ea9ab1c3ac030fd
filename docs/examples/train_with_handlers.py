"""Trains with handlers that are Python objects, by a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from volumen.config.experiment_file import merge, shipped_sections
from volumen.utils.bundle_root import configs_dir


def train(
    data: str | Path,
    output: str | Path,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    handlers: Sequence[Any] = (),
    device: str = "auto",
) -> Path:
    """Train, and return the run's folder.

    Args:
        data: folder with images/ and labels/.
        output: folder for the run.
        settings: any part of the experiment's sections.
        handlers: objects with `attach(engine)`, which come after the trainer's own.
        device: auto, cpu, cuda or cuda:N.
    """
    workflow = ConfigWorkflow(
        config_file=str(configs_dir() / "train.yaml"),
        meta_file=str(configs_dir() / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        dataset_dir=str(data),
        output_dir=str(output),
        device_name=device,
        **merge(shipped_sections(), settings or {}),
    )
    # Before `initialize` the parser contains the plain config; its lists may also contain objects.
    workflow.parser["train#handlers"].extend(handlers)
    workflow.initialize()
    workflow.run()
    run = workflow.parser.get_parsed_content("config").run_dir
    workflow.finalize()
    return run
