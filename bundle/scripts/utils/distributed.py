"""Starts several processes from torchrun's environment and exchanges values; does nothing with a single process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

#: A rank that waits this long for another one assumes that it is dead. Torchrun ends the others at once when one dies;
#: this is for a rank that hangs.
TIMEOUT = timedelta(minutes=30)


def is_distributed() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return this process's number, 0 with a single process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def processes_here() -> int:
    """Return the number of processes on this machine, from torchrun's environment; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if is_distributed() else 1


def is_main() -> bool:
    """Return whether this process is the one that writes files."""
    return rank() == 0


def initialize(device: str | torch.device = "cpu", *, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group that torchrun's environment names, if it names one.

    Args:
        device: the requested device; "cuda" becomes this rank's own GPU.
        timeout: maximum time that a collective operation waits for another rank.

    Returns:
        The device on which this process trains.
    """
    device = torch.device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= there:
            raise VolumenError(
                "--nproc",
                expected=f"at most {there}, one process per GPU of this machine",
                found=os.environ.get("LOCAL_WORLD_SIZE", number + 1),
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        logger.info("process %d of %d on %s", rank(), world_size(), device)
    return device


def finalize() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has reached this call."""
    if is_distributed():
        dist.barrier()


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Return whether `flag` is true in at least one process."""
    return bool(_reduced(float(flag), dist.ReduceOp.MAX, device))


def sum_over_ranks(values: Mapping[str, float], device: torch.device | None = None) -> dict[str, float]:
    """Return each value's sum over all processes. Keys may differ between processes; a missing one counts as 0."""
    if not is_distributed():
        return dict(values)
    total: dict[str, float] = {}
    for part in gather(dict(values)):
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


def gather(value: Any) -> list[Any]:
    """Return every process's value in the order of their numbers, in every process; it must be picklable."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any) -> Any:
    """Return the first process's value in every process; it must be picklable."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def smallest(count: int, device: torch.device | None = None) -> int:
    """Return the minimum of a number over all processes."""
    return int(_reduced(count, dist.ReduceOp.MIN, device))


def largest(value: float, device: torch.device | None = None) -> float:
    """Return the maximum of a number over all processes, the same in all of them, such as the time of the slowest."""
    return _reduced(value, dist.ReduceOp.MAX, device)


def _reduced(value: float, how: Any, device: torch.device | None) -> float:
    if not is_distributed():
        return value
    reduced = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(reduced, op=how)
    return float(reduced.item())


def largest_on_device(value: torch.Tensor) -> torch.Tensor:
    """Return the maximum of a scalar tensor over all processes, without waiting for the device."""
    if is_distributed():
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def broadcast_buffers(network: torch.nn.Module) -> None:
    """Copy the first process's buffers, such as running means, to all processes; checkpoints hold these buffers."""
    if is_distributed():
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def without_gradient_sync(network: torch.nn.Module, active: bool) -> Iterator[None]:
    """Skip averaging gradients over processes while `active`, for micro-batches that are only accumulated."""
    if active and isinstance(network, torch.nn.parallel.DistributedDataParallel):
        with network.no_sync():
            yield
    else:
        yield
