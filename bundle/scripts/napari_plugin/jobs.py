"""Runs training and prediction in a separate process that reports events, one JSON object per line.

A process is used rather than a thread so that the viewer stays responsive and keeps its memory, a crash of the training
cannot lose unsaved labels, and a stopped training is saved by the same code as after a signal in a terminal.
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

    The process removes the folder of the stored layers, so that it is removed even if the viewer ends first.

    Args:
        task: "train" or "predict".
        layers: layers to store for the process.
        output: folder for the results; it also contains the stored layers while the process runs.
        options: further options of the task, plain values.
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
        """Run the job and yield its events; the call blocks, so use a thread.

        Yields:
            Events as described in `volumen.napari_plugin.worker`; the last is "done", "stopped" or "failed".
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
        """Let the process save and end; a second call ends it at once."""
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
        folder: folder of `job.json`.
        errors: file that receives its standard error.
    """
    # -P: modules in the viewer's working directory must not be imported.
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
        # Ctrl-C in the viewer's terminal must reach the viewer only.
        start_new_session=os.name == "posix",
    )


def _kill(process: subprocess.Popen[str]) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # includes the workers of its data loaders
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
    """Return a name that is not used in a folder: `name`, else `name_2`, `name_3` and so on."""
    number, candidate = 1, name
    while (folder / f"{candidate}{suffix}").exists():
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def follow(events: Iterator[Event], take: Callable[[Event], None]) -> Event:
    """Call a function with every event, in this thread, and return the last event."""
    last: Event = {"event": "failed", "message": "nothing happened"}
    for last in events:
        take(last)
    return last
