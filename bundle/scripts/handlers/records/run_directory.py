"""Creates and locks the folder of one run, and removes it again after a failed start."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from ignite.engine import Events
from monai.engines import Workflow

from volumen.checkpoints.file import writing_failed
from volumen.handlers.faults import explain
from volumen.handlers.rounds import forget_failed_run
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import UNFINISHED
from volumen.utils.files.process_lock import LockHeldError, ProcessLock
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

LOCK = ".lock"

_locked_here: set[Path] = set()


class RunDirectory:
    """`<output_dir>/<model_name>`, which is created when training starts and not earlier.

    As the first handler of the trainer it makes the folder and locks it against a second writer. When the run
    fails before its first checkpoint, everything that it made is removed again. A trainer that runs again, as in a
    notebook or in the rounds of federated learning, opens the folder of its own run again.

    Args:
        output_dir: the folder for all runs.
        model_name: the run's name, also the beginning of its files' names.
        resume: whether to continue an existing run of this name; otherwise such a run is refused.
    """

    def __init__(self, output_dir: str | os.PathLike, model_name: str, *, resume: bool = False) -> None:
        if not re.fullmatch(r"[^/\\\0]+", model_name) or model_name in (".", ".."):
            raise VolumenError(
                "tr_setup.model_name", expected="a name usable for a folder", found=repr(model_name)
            )
        self.output_dir = Path(output_dir)
        self.model_name = model_name
        self.resume = resume
        self.path = self.output_dir / model_name
        self._created: list[Path] = []
        self._there_before: set[Path] = set()
        self._lock: ProcessLock | None = None
        self._is_own = False

    def file(self, suffix: str) -> Path:
        """Return the path of `<model_name>_<suffix>` in this folder."""
        return self.path / f"{self.model_name}_{suffix}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return the epoch checkpoints that exist, as (epoch, path), oldest first."""
        pattern = re.compile(re.escape(self.model_name) + r"_(\d+)\.pth")
        found = []
        if self.path.is_dir():
            for path in self.path.iterdir():
                match = pattern.fullmatch(path.name)
                if match:
                    found.append((int(match.group(1)), path))
        return sorted(found)

    @property
    def interrupted(self) -> Path:
        """The path of the checkpoint that is saved after a signal in the middle of an epoch."""
        return self.file("interrupted.pth")

    def has_checkpoint(self) -> bool:
        """Return whether a checkpoint to resume from exists."""
        return bool(self.checkpoints()) or self.interrupted.is_file()

    def check(self) -> None:
        """Raise if training must not write here; changes nothing on disk.

        Raises:
            VolumenError: the folder holds other files, or a run while `resume` is False.
        """
        for folder in (self.output_dir, self.path):
            if folder.exists() and not folder.is_dir():
                raise VolumenError(folder, expected="a folder", found="a file")
        if self.has_checkpoint():
            if not (self.resume or self._is_own):
                last = max((epoch for epoch, _ in self.checkpoints()), default=0)
                raise VolumenError(
                    self.path,
                    f"holds a run of {self.model_name!r} already ({counted(last, 'epoch')} done)",
                    remedy="go on with --resume, or choose another --model-name or output folder",
                )
            return
        foreign = [path.name for path in self._content() if not self._is_ours(path)]
        if foreign:
            raise VolumenError(
                self.path,
                expected=f"an empty folder or a run of {self.model_name!r}",
                found=", ".join(sorted(foreign)[:3]),
                remedy="choose another --model-name or output folder",
            )

    def open(self) -> None:
        """Create the folder and lock it, in the first process; the others wait.

        Raises:
            VolumenError: as in `check`, or another process writes here, or the folder cannot be created.
        """
        if self._lock is not None:
            return
        if distributed.is_main():
            self.check()
            try:
                self._create()
                self._lock = self._acquire()
                self._remove_half_written()
                self._is_own = True
            except OSError as error:
                self._remove_created()
                raise writing_failed(self.path, error) from error
        distributed.barrier()

    def close(self, *, failed: bool = False) -> None:
        """Release the lock; after a failure without any checkpoint, remove what this run created."""
        if self._lock is None:
            return
        keep = self.has_checkpoint() or not failed
        self._lock.release()
        self._lock = None
        _locked_here.discard(self.path.resolve())
        if not keep:
            self._remove_created()
            self._is_own = False

    def attach(self, engine: Workflow) -> None:
        """Open the folder when the trainer starts and close it when the trainer ends, also after an error."""
        engine.add_event_handler(Events.STARTED, self._on_start)
        engine.add_event_handler(Events.COMPLETED, self._on_end)

    def _on_start(self, engine: Workflow) -> None:
        # Added only now, so that it runs after the other handlers' clean-up: it ends the chain by raising. It is added
        # before opening, since ignite drops an exception if no handler of EXCEPTION_RAISED raises.
        if not engine.has_event_handler(self._on_exception, Events.EXCEPTION_RAISED):
            engine.add_event_handler(Events.EXCEPTION_RAISED, self._on_exception)
        self.open()

    def _on_end(self, engine: Workflow) -> None:
        self.close()

    def _on_exception(self, engine: Workflow, error: BaseException) -> None:
        self.close(failed=True)
        forget_failed_run(engine)
        explained = explain(error)
        if explained is error:
            raise error
        raise explained from error

    def _content(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _is_ours(self, path: Path) -> bool:
        name = path.name
        return (
            name == LOCK
            or path.match(UNFINISHED)
            or name.startswith(f"{self.model_name}_")
            or name in ("metrics.csv", "tensorboard", "split.json")
        )

    def _create(self) -> None:
        self._there_before = set(self._content())
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._created.append(folder)

    def _acquire(self) -> ProcessLock:
        if self.path.resolve() in _locked_here:
            raise self._in_use("this process")
        try:
            lock = ProcessLock(self.path / LOCK)
        except LockHeldError as error:
            raise self._in_use(str(error)) from error
        _locked_here.add(self.path.resolve())
        return lock

    def _remove_half_written(self) -> None:
        """Remove the unfinished files of a killed process; the lock ensures that no process writes now."""
        for path in self.path.glob(UNFINISHED):
            path.unlink(missing_ok=True)

    def _in_use(self, holder: str) -> VolumenError:
        return VolumenError(self.path, f"{holder} is training here", remedy="wait, or choose another name")

    def _remove_created(self) -> None:
        if self.path in self._created:
            shutil.rmtree(self.path, ignore_errors=True)
        for path in set(self._content()) - self._there_before:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for folder in reversed(self._created):
            try:
                folder.rmdir()
            except OSError as error:
                logger.debug("folder %s stays: %s", folder, error)
        self._created.clear()
