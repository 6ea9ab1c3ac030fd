"""Writes the resolved experiment to a file that can train the same model again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml
from ignite.engine import Engine, Events

from volumen.checkpoints.file import plain, write_run_file
from volumen.handlers.records.run_directory import RunDirectory
from volumen.utils import distributed


class ConfigSnapshot:
    """Write `<model_name>_config.yaml` when training starts; it replaces an earlier file.

    It stands after the `Checkpointer` in the list, so that a run that is refused does not change the file.

    Args:
        directory: the run's folder.
        config: the sections, or a function that returns them when training starts.
    """

    def __init__(
        self, directory: RunDirectory, config: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    ) -> None:
        self.directory = directory
        self.config = config

    def attach(self, engine: Engine) -> None:
        """Write when the trainer starts, in the first process."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the file."""
        if not distributed.is_main():
            return
        config = plain(self.config() if callable(self.config) else self.config)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110)
        write_run_file(self.directory.file("config.yaml"), text.encode())
