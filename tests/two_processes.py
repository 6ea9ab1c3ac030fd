"""Runs work in two gloo processes, forked so that no module is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time

import torch

from volumen.utils import distributed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _enter(rank: int, port: int, work, arguments) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    distributed.initialize("cpu")
    work(rank, *arguments)
    distributed.finalize()


def in_two_processes(work, *arguments, timeout: float = 60) -> list[int]:
    """Run `work(rank, *arguments)` in two gloo processes; return their exit codes."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [context.Process(target=_enter, args=(rank, port, work, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    assert None not in codes, "a process hangs"
    return codes
