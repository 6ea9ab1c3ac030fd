"""Running the processes of one training from a parent that only waits and passes signals on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_passing_signals(command: Sequence[str]) -> int:
    """Run a launcher of processes and hand Ctrl-C and SIGTERM on to it; a terminal that closes counts as SIGTERM.

    It runs in a session of its own, so that a terminal's Ctrl-C reaches the training processes once, by way of the
    launcher, rather than twice: a second signal means to leave at once. That second one goes to all of them.

    Args:
        command: the program and its arguments.

    Returns:
        The launcher's exit code; 130, 143 or 129 (a closed terminal) after a signal.
    """
    process: subprocess.Popen | None = None
    received: list[int] = []
    waiting: deque[tuple[int, bool]] = deque()

    def receive(number: int, frame: FrameType | None) -> None:
        waiting.append((number, not received))
        received.append(number)
        pass_on()

    def pass_on() -> None:
        # A signal may come within this too, and then leave nothing for the rest of it.
        with suppress(IndexError):
            while process is not None:
                _send(process, *waiting.popleft())

    # Under nohup a closed terminal is to be ignored.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    # Before the launcher starts: what comes meanwhile is kept for it.
    former = {number: signal.signal(number, receive) for number in heard}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        pass_on()
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code


def _send(process: subprocess.Popen, number: int, first: bool) -> None:
    """Send a signal to the launcher if it is the first one, else to all of its processes."""
    passed = signal.SIGTERM if number == signal.SIGHUP else number
    with suppress(ProcessLookupError):  # it has just ended
        if first:
            process.send_signal(passed)
        else:
            os.killpg(process.pid, passed)
