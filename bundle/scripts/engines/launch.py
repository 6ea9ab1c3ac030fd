"""Running the processes of one training from a parent that only waits and passes signals on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
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
    process = subprocess.Popen(command, start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        passed = signal.SIGTERM if number == signal.SIGHUP else number
        try:
            if len(received) == 1:
                process.send_signal(passed)
            else:
                os.killpg(process.pid, passed)
        except ProcessLookupError:
            pass  # it has just ended

    # Under nohup a closed terminal is to be ignored.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    former = {number: signal.signal(number, pass_on) for number in heard}
    try:
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code
