"""The tasks of a Dask worker: describe its machine, compute a shard of blocks, compute a part of a pass."""

from __future__ import annotations

import logging
import re
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from volumen.inference.arrays import work_folder
from volumen.inference.blocks.block_maker import make_blocks
from volumen.inference.distributed.partition import Shard
from volumen.inference.ensemble import load_model
from volumen.inference.output.block_log import WorkerState
from volumen.inference.postprocess.passes import BlockPass
from volumen.inference.predictor import Predictor
from volumen.inference.record.machine import Machine, describe_machine
from volumen.inference.volume_work import VolumeWork
from volumen.inference.windows.plan import Box
from volumen.inference.windows.stream import StreamCounts
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

LOST_DEVICE: Any = getattr(torch, "AcceleratorError", ())
"""Type of CUDA's errors, which torch has since 2.8."""


class StoppedError(Exception):
    """The process that requested this work has cancelled it."""


@dataclass(frozen=True)
class Network:
    """The checkpoints that workers load: their absolute paths, their SHA-256, and the requested device.

    `threads` is the number of computing threads, None for the worker's own; `strict` and `fuse` are those of
    `load_predictor`.
    """

    paths: tuple[str, ...]
    checksum: str
    device: str
    threads: int | None = None
    strict: bool = True
    fuse: bool = True


@dataclass(frozen=True)
class Made:
    """The result of a shard: counts, and the boxes of the image that could not be read."""

    counts: StreamCounts
    corrupt: tuple[Box, ...]


def describe_worker(device: str, amp: str, threads: int | None) -> Machine:
    """Return this worker's device, precision and versions.

    Args:
        device, amp: the requested device and precision.
        threads: number of computing threads; None: not changed.

    Raises:
        VolumenError: the worker has no such device.
    """
    from distributed import get_worker

    _set_threads(threads)
    return describe_machine(_take_device(device, get_worker()), amp)


def _take_device(requested: str, worker: Any) -> torch.device:
    """Return the device of a worker, after setting it as the current one, so that no other GPU is used.

    Raises:
        VolumenError: there is no such device.
    """
    device = choose_device(worker_device(requested, worker.name, worker.address, gpu_count()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def worker_device(requested: str, name: object, address: str, gpus: int) -> str:
    """Return the device of a worker: the CPU if requested, else one of its machine's GPUs if there are any.

    The workers of a machine use its GPUs in turn, by the number at the end of their names (0, 1, ... of a local
    cluster, NODE-0, NODE-1, ... of `dask worker --nworkers`); without such a number, by the port of their address. If
    every worker sees a single GPU, as SLURM and dask-cuda arrange it, it uses that one. All workers share a GPU that is
    requested by number.

    Args:
        requested: "auto", "cpu", "cuda" or "cuda:N".
        name: the worker's name.
        address: the worker's address.
        gpus: number of GPUs that the worker sees.
    """
    if requested not in ("auto", "cuda") or gpus == 0:
        return requested
    number = re.search(r"(\d+)$", str(name)) or re.search(r"(\d+)$", address)
    return f"cuda:{int(number[1]) % gpus if number else 0}"


def gpu_count() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def compute_shard(
    work: VolumeWork, network: Network, machine: Machine, token: str, shard: Shard, done: np.ndarray
) -> Made:
    """Compute the blocks of a shard.

    Args:
        work: the volume's prediction.
        network: the network.
        machine: device and precision of the other workers.
        token: see `WorkerState`.
        shard: the shard.
        done: blocks of the shard that are already finished, bool, shape of the shard.

    Raises:
        StoppedError: the work was cancelled.
        Reschedule: the device failed, and this worker shuts down.
        VolumenError: this worker cannot compute the same bytes as the others, or an error that the user can correct.
    """
    from distributed import Reschedule, get_worker

    worker = get_worker()
    _set_threads(network.threads)
    device = _take_device(network.device, worker)
    own = describe_machine(device, work.request.amp)
    if (own.device, own.precision) != (machine.device, machine.precision):
        raise VolumenError(
            f"worker {worker.address}",
            expected=f"{machine.device} in {machine.precision}, as the other workers",
            found=f"{own.device} in {own.precision}",
            remedy="start workers of one kind, or say --device and --amp",
        )
    predictor = _load(network, str(device))
    others = np.ones(work.window_plan.blocks, dtype=bool)
    others[shard.slices] = done
    state = WorkerState(work.job.output, token, others, shard.blocks)

    def raise_if_cancelled() -> None:
        if not state.is_active:
            raise StoppedError

    raise_if_cancelled()
    try:
        counts = make_blocks(
            work, predictor, state, others, scratch=Path(worker.local_directory), raise_if_cancelled=raise_if_cancelled
        )  # fmt: skip
    except OSError:
        raise_if_cancelled()  # a cancelled output's folder no longer exists
        raise
    except LOST_DEVICE as error:
        # Without its device this process cannot continue: another worker computes the shard, and this one shuts down.
        logger.error("%s lost %s: %s", worker.address, device, str(error).partition("\n")[0])
        worker.loop.add_callback(worker.close, executor_wait=False, reason="device lost")
        raise Reschedule from None
    finally:
        state.close()
    return Made(counts, tuple(state.corrupt))


def compute_part(blocks: BlockPass, token: str, part: int, parts: int) -> None:
    """Compute every `parts`-th block of a pass, starting with block `part`.

    Args:
        blocks: the pass.
        token: name of the file that exists until the work is finished or cancelled.
        part, parts: number of this part, and of all parts.

    Raises:
        StoppedError: the work was cancelled.
    """
    token_file = work_folder(blocks.work) / token

    def raise_if_cancelled() -> None:
        if not token_file.exists():
            raise StoppedError

    for number in range(part, blocks.count, parts):
        raise_if_cancelled()
        try:
            blocks.make(number, raise_if_cancelled)
        except OSError:
            raise_if_cancelled()  # a cancelled output's folder no longer exists
            raise


@lru_cache(maxsize=2)
def _load(network: Network, device: str) -> Predictor:
    predictor = load_model(network.paths, device, strict=network.strict, fuse=network.fuse)
    if predictor.checksum != network.checksum:
        raise VolumenError(
            ", ".join(network.paths),
            expected=f"SHA-256 {network.checksum[:12]}..., as where the prediction was started",
            found=f"{predictor.checksum[:12]}... on {socket.gethostname()}",
            remedy="put the same checkpoint there",
        )
    return predictor


def _set_threads(threads: int | None) -> None:
    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
