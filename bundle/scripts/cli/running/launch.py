"""Runs the processes of one training from a parent that only waits and forwards signals."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def run_passing_signals(command: Sequence[str], *, ends_with_parent: bool = False) -> int:
    """Run a launcher of processes and forward Ctrl-C and SIGTERM to it; a closed terminal counts as SIGTERM.

    The launcher runs in a separate session, so that Ctrl-C in a terminal reaches the training processes once, through
    the launcher, rather than twice: a second signal means to end at once. A second signal goes to all processes.

    Args:
        command: the program and its arguments.
        ends_with_parent: give the launcher a pipe as its standard input, which closes when this process dies.

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
        # A signal may interrupt this function too; the inner call then handles all pending signals.
        with suppress(IndexError):
            while process is not None:
                send(process, *waiting.popleft())

    # nohup requires that a closed terminal is ignored.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    # Before the launcher starts, so that earlier signals are stored and forwarded to it.
    former = {number: signal.signal(number, receive) for number in heard}
    try:
        pipe = subprocess.PIPE if ends_with_parent else None
        process = subprocess.Popen(command, stdin=pipe, start_new_session=True)
        pass_on()
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code


def send(process: subprocess.Popen, number: int, first: bool) -> None:
    """Send a signal to a launcher of processes if it is the first one, else to all of its processes.

    Args:
        process: started in a session of its own.
        number: the signal; a closed terminal counts as SIGTERM.
        first: whether no signal was sent before.
    """
    if not hasattr(os, "killpg"):
        # On Windows, Ctrl-C in a terminal reaches all of its processes anyway.
        if not first:
            process.kill()
        return
    passed = signal.SIGTERM if number == signal.SIGHUP else number
    with suppress(ProcessLookupError):  # the process has just ended
        if first:
            process.send_signal(passed)
        else:
            os.killpg(process.pid, passed)
