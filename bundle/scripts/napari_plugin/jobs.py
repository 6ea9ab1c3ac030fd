"""Training and prediction in a process of their own, told of by one JSON object a line.

A process rather than a thread: the viewer keeps its time and memory, its unsaved labels outlive whatever happens to
the training, and a stopped training is saved by the same code that a signal in a terminal runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from volumen.napari_plugin.layers import LayerArray, store

Event = dict[str, Any]

_TAIL = 2000


class Job:
    """One training or prediction.

    The folder with the stored layers is removed by the process itself, so that it goes even when the viewer has
    gone before.

    Args:
        task: "train" or "predict".
        layers: what to store for the process.
        output: folder for what it makes; the layers are stored in it meanwhile.
        options: what the task takes besides, plain values.
    """

    def __init__(
        self, task: str, layers: Sequence[LayerArray], output: str | Path, options: Mapping[str, Any]
    ) -> None:
        self.task = task
        self.layers = list(layers)
        self.output = Path(output)
        self.options = dict(options)
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def events(self) -> Iterator[Event]:
        """Do it, and yield what happens: blocks, so it belongs into a thread.

        Yields:
            Events as `volumen.napari_plugin.worker` tells them; the last is "done", "stopped" or "failed".
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".layers-", dir=self.output))
        except OSError as error:
            yield {"event": "failed", "message": f"{self.output}: {error.strerror or error}"}
            return
        try:
            yield from self._prepare(folder)
            if self._stopped:
                yield {"event": "stopped"}
                return
            yield from self._run(folder)
        except (ValueError, OSError) as error:  # a VolumenError is a ValueError
            yield {"event": "failed", "message": str(error)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        """Ask it to save and end; asked again, end it at once."""
        process, again = self._process, self._stopped
        self._stopped = True
        if process is None:
            return
        if again:
            _kill(process)
        elif process.stdin is not None and not process.stdin.closed:
            process.stdin.close()

    def _prepare(self, folder: Path) -> Iterator[Event]:
        shares: list[tuple[str, float]] = []
        files = []
        for number, layer in enumerate(self.layers):
            if self._stopped:
                return
            yield {"event": "message", "text": f"reading layer {layer.name}"}
            files += store([layer], folder / str(number), progress=lambda *share: shares.append(share))
        job = {
            "task": self.task,
            "layers": [file.to_dict() for file in files],
            "output": str(self.output),
            **self.options,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")

    def _run(self, folder: Path) -> Iterator[Event]:
        ended = False
        with (folder / "errors.txt").open("w+", encoding="utf-8") as errors:
            self._process = start(folder, errors)
            assert self._process.stdout is not None
            if self._stopped:  # meanwhile
                self._close_input()
            for line in self._process.stdout:
                event = json.loads(line)
                ended = ended or event["event"] in ("done", "stopped", "failed")
                yield event
            code = self._process.wait()
            self._close_input()
            if not ended:
                errors.seek(0)
                yield {"event": "stopped"} if self._stopped else _crash(code, errors.read())

    def _close_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def start(folder: Path, errors: IO[str]) -> subprocess.Popen[str]:
    """Start the process of a job.

    Args:
        folder: holds `job.json`.
        errors: gets its standard error.
    """
    # -P: a folder `scripts` where the viewer was started is not ours.
    command = [sys.executable, "-P", "-m", "volumen.napari_plugin.worker", str(folder / "job.json")]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment,
        text=True,
        encoding="utf-8",
        # A Ctrl-C in the terminal of the viewer is the viewer's.
        start_new_session=os.name == "posix",
    )


def _kill(process: subprocess.Popen[str]) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers of its data loaders
    else:
        process.kill()


def _crash(code: int, errors: str) -> Event:
    lines = errors.strip()[-_TAIL:].splitlines()
    why = "it was ended, perhaps for want of memory" if code < 0 else (lines[-1] if lines else "no message")
    return {
        "event": "failed",
        "message": f"the process ended with code {code}: {why}",
        "details": "\n".join(lines),
    }


def free_name(folder: Path, name: str, *, suffix: str = "") -> str:
    """Return a name that nothing in a folder has yet: `name`, else `name_2`, `name_3` and so on."""
    number, candidate = 1, name
    while (folder / f"{candidate}{suffix}").exists():
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def follow(events: Iterator[Event], take: Callable[[Event], None]) -> Event:
    """Give every event to a function, in this thread, and return the last one."""
    last: Event = {"event": "failed", "message": "nothing happened"}
    for last in events:
        take(last)
    return last
