"""The parent of a training's processes on one machine: starts them, waits, and reports once why they ended.

python -m volumen.cli.running.processes COUNT WORDS...      runs `volumen WORDS...` in COUNT processes
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from volumen.cli.running.execution import EXIT_DEFECT, EXIT_INTERRUPT, MESSAGE_FOLDER, print_error

#: Seconds after a signal in which processes must finish their step and save; a second signal ends them at once.
GRACE = 600


class LastMessage(NamedTuple):
    """The last message of a process before it ended."""

    time: float
    code: int
    line: str


def main(words: Sequence[str]) -> int:
    """Run a command in several processes that can train together.

    Args:
        words: the number of processes, then the command line after `volumen`.

    Returns:
        The exit code that the command would have in one process.
    """
    # Torch's launcher logs a table of every process that ended, which is reported here in one line.
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    with tempfile.TemporaryDirectory(prefix="volumen-") as folder:
        os.environ[MESSAGE_FOLDER] = folder
        try:
            code, codes = 0, _run(int(words[0]), words[1:])
        except KeyboardInterrupt:
            code, codes = EXIT_INTERRUPT, {}
        except _Signalled as stop:
            code, codes = 128 + stop.number, {}
        messages = _read(Path(folder))
    found, line = conclude(codes, messages)
    if line:
        print_error(line)
    return code or found


def conclude(codes: Mapping[int, int], messages: Mapping[int, LastMessage]) -> tuple[int, str]:
    """Find the process that failed first, since the other processes fail as a consequence.

    Args:
        codes: exit code of each process that failed, by its number; negative for the signal that ended it.
        messages: last message of each process, by its number.

    Returns:
        The exit code for all of them, and the line to report, which is empty if there is nothing to add.
    """
    by_time = sorted(messages.values())
    for entry in by_time:
        if entry.code not in (EXIT_DEFECT, 0):
            return entry.code, entry.line
    # The launcher ends the other processes with SIGTERM, and those that hang with SIGKILL.
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if killed:
        rank, number = min(killed.items())
        line = (
            f"process {rank} was ended by {signal.Signals(number).name}, perhaps for want of memory; "
            "go on with --resume"
        )
        return EXIT_DEFECT, line + (f" (process {min(messages)}: {by_time[0].line})" if messages else "")
    if by_time:
        return by_time[0].code, by_time[0].line
    ended = [128 - code if code < 0 else code for _, code in sorted(codes.items())]
    return max(ended, default=0), ""


class _Signalled(Exception):
    """The launcher received a signal and forwarded it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _run(count: int, words: Sequence[str]) -> dict[int, int]:
    """Run the processes; return the exit codes of those that failed."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from volumen.utils.threads import cores

    # The cores are divided among the processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "volumen.cli.main", *words)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as stop:
        raise _Signalled(int(stop.sigval)) from None
    return {}


def _read(folder: Path) -> dict[int, LastMessage]:
    return {int(path.name): LastMessage(*json.loads(path.read_text())) for path in folder.iterdir()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
