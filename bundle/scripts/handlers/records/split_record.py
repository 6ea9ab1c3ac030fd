"""Writes the run's split to a file, so that a resumed run never validates on regions it was trained on."""

from __future__ import annotations

from collections.abc import Callable

from ignite.engine import Engine, Events

from volumen.checkpoints.file import write_run_file
from volumen.handlers.records.run_directory import RunDirectory
from volumen.utils import distributed


class SplitRecord:
    """Write `<model_name>_split.json` when training starts: volumes, regions, the data's fingerprint.

    It stands after the `Checkpointer` in the list, so that a run that is refused does not change the file.

    Args:
        directory: the run's folder.
        text: returns the file's text when training starts.
    """

    def __init__(self, directory: RunDirectory, text: Callable[[], str]) -> None:
        self.directory = directory
        self.text = text

    def attach(self, engine: Engine) -> None:
        """Write when the trainer starts, in the first process."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the file."""
        if distributed.is_main():
            content = self.text().encode()
            write_run_file(self.directory.file("split.json"), content)
