"""Prediction by several processes through Dask: a local cluster, or the workers of a scheduler.

The process that the user started writes the block log and sends shards to the workers. A worker owns the blocks of its
shard and writes their chunks itself, so that no locks are needed and no voxels are sent between processes. All
processes must have access to the same files. If a worker dies, another one computes its unfinished blocks.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import torch

from volumen.inference.distributed.partition import partition_blocks
from volumen.inference.distributed.worker import (
    Made,
    Network,
    StoppedError,
    compute_part,
    compute_shard,
    describe_worker,
)
from volumen.inference.gain import add_overlaps
from volumen.inference.output.block_log import OutputState
from volumen.inference.postprocess.passes import BlockPass, ProgressCallback, Run, run_here
from volumen.inference.predictor import Predictor
from volumen.inference.progress import Progress
from volumen.inference.record.machine import Machine
from volumen.inference.request import PredictRequest
from volumen.inference.volume_work import VolumeWork
from volumen.inference.windows.stream import StreamCounts
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from distributed import Client, Future

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
CONNECT_SECONDS = 20
WARNING_SECONDS = 60
"""Seconds between two warnings that no worker is connected."""
PARTS_PER_WORKER = 4
FEW_BLOCKS = 32
"""A light pass over at most this many blocks runs in this process, since sending it would take longer."""


class Cluster:
    """Workers that predict; open one with `open_cluster`.

    Args:
        client: client that is connected to the scheduler.
        machine: device, precision and versions of the workers.
        device: the device that the user requested.
        threads: computing threads per worker; None: not changed.
        local: whether this process started the workers; then nobody replaces them if all die.

    Attributes:
        volumes_at_once: volumes that are predicted at the same time.
    """

    def __init__(
        self, client: Client, machine: Machine, device: str, threads: int | None, *, local: bool = False
    ) -> None:
        self.machine = machine
        self.volumes_at_once = 1
        self._local = local
        self._client, self._device, self._threads = client, device, threads
        self._stopped = threading.Event()

    @property
    def workers(self) -> int:
        """Number of connected workers."""
        return len(_addresses(self._client))

    def stop(self) -> None:
        """End every wait in other threads with `StoppedError`."""
        self._stopped.set()

    def make(
        self,
        work: VolumeWork,
        predictor: Predictor,
        state: OutputState,
        token: str,
        progress: Progress | None,
    ) -> StreamCounts:
        """Compute every unfinished block of a volume on the workers.

        Args:
            work: the volume's prediction.
            predictor: the network, which workers load from its checkpoint.
            state: state of the output folder, after `begin`.
            token: see `OutputState.token`.
            progress: counts finished windows.

        Raises:
            VolumenError: an error that the user can correct.
        """
        for member in predictor.networks:
            if not Path(member.path).is_file():
                raise VolumenError(
                    member.path, "workers load the network from its checkpoint, and there is none"
                )
        network = Network(
            tuple(str(Path(member.path).absolute()) for member in predictor.networks),
            predictor.checksum,
            self._device,
            self._threads,
            predictor.strict,
            bool(predictor.fused),
        )
        workers = max(1, math.ceil(self.workers / self.volumes_at_once))
        shards = partition_blocks(work.window_plan, workers, state.done)
        windows = sum(shard.windows for shard in shards)
        logger.info(
            "%s: %d pieces for %d workers, %d windows of which %.0f %% are computed twice or more where pieces meet",
            work.job.shown,
            len(shards),
            workers,
            windows,
            100 * max(0.0, 1 - len(work.window_plan) / max(windows, 1)),
        )
        meter = _Meter(state, windows, progress)
        counts = StreamCounts()
        sent = work.with_absolute_paths()
        jobs = [
            (sent, network, self.machine, token, shard, state.done[shard.slices].copy()) for shard in shards
        ]
        for number, made in self._run(compute_shard, jobs, meter.update):
            _add(counts, made)
            state.record_box(shards[number].blocks)
            for box in made.corrupt:
                state.note_corrupt(box)
            meter.update()
        return counts

    def runner(self, token: str, callback: ProgressCallback | None = None) -> Run:
        """Return a function that runs passes on the workers, and light passes over few blocks in this process.

        Args:
            token: see `OutputState.token`.
            callback: called with the progress of a pass.
        """

        def run(blocks: BlockPass) -> None:
            if blocks.is_light and blocks.count <= FEW_BLOCKS:
                run_here(blocks.work.request.workers, callback)(blocks)
                return
            sent = replace(cast(Any, blocks), work=blocks.work.with_absolute_paths())
            parts = min(blocks.count, PARTS_PER_WORKER * max(1, self.workers))
            made = self._run(compute_part, [(sent, token, part, parts) for part in range(parts)])
            for count, _ in enumerate(made, start=1):
                if callback is not None:
                    callback(blocks.title, blocks.count * count // parts, blocks.count)

        return run

    def _run(
        self, function: Callable[..., Any], jobs: Iterable[tuple], poll: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number and the result of every job as it ends; on an error, cancel the other jobs."""
        mark = uuid4().hex
        ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        numbers: dict[Future, int] = {}
        for number, job in enumerate(jobs):
            future = self._client.submit(function, *job, key=f"volumen-{mark}-{number}", pure=False)
            numbers[future] = number
            future.add_done_callback(ended.put)
        warned = time.monotonic()
        try:
            while numbers:
                if self._stopped.is_set():
                    raise StoppedError
                try:
                    future = ended.get(timeout=POLL_SECONDS)
                    yield numbers.pop(future), self._result(future)
                except queue.Empty:
                    if self._client.status not in ("running", "connecting"):
                        raise _lost(self._client) from None
                poll()
                if self.workers:
                    warned = time.monotonic()
                elif time.monotonic() - warned > WARNING_SECONDS:
                    if self._local:
                        raise VolumenError(
                            "--nworkers",
                            "all workers are gone",
                            remedy="see what they told; the same command goes on from here",
                        )
                    warned = time.monotonic()
                    logger.warning("no worker is connected to the scheduler: waiting for one")
        finally:
            if numbers:
                self._client.cancel(list(numbers), force=True)

    def _result(self, future: Future) -> Any:
        from distributed import CancelledError, KilledWorker

        try:
            return future.result()
        except KilledWorker as error:
            raise VolumenError(
                f"worker {error.last_worker.address}",
                "it and others before it died at the same piece",
                remedy="see their logs (often they ran out of memory); the same command goes on from here",
            ) from None
        except CancelledError:
            raise _lost(self._client) from None


def _lost(client: Client) -> VolumenError:
    return VolumenError(
        client.scheduler.address if client.scheduler else "scheduler",
        "the Dask scheduler is gone",
        remedy="start it and give the same command again: it goes on from here",
    )


class _Meter:
    """Converts the finished blocks in the workers' logs into a count of windows."""

    def __init__(self, state: OutputState, windows: int, progress: Progress | None) -> None:
        self._state, self._windows, self._progress = state, windows, progress
        self._before = int(state.done.sum())
        self._reported = 0
        if progress is not None:
            progress.expect(windows)

    def update(self) -> None:
        self._state.absorb()
        if self._progress is None:
            return
        todo = max(1, self._state.done.size - self._before)
        count = self._windows * (int(self._state.done.sum()) - self._before) // todo
        self._progress(count - self._reported)
        self._reported = count


def _add(counts: StreamCounts, made: Made) -> None:
    counts.windows += made.counts.windows
    counts.skipped += made.counts.skipped
    counts.blocks += made.counts.blocks
    plain, every = made.counts.seconds
    counts.seconds = (counts.seconds[0] + plain, counts.seconds[1] + every)
    add_overlaps(counts.overlaps, made.counts.overlaps)


@contextmanager
def open_cluster(request: PredictRequest) -> Iterator[Cluster]:
    """Connect to the scheduler of a request, or start its workers on this machine.

    Raises:
        VolumenError: Dask is not installed, no scheduler answers, or the workers cannot predict.
    """
    try:
        import distributed
    except ImportError:
        raise VolumenError(
            "--scheduler" if request.scheduler else "--nworkers",
            "needs the package distributed (Dask)",
            remedy="pip install 'volumen[dask]'",
        ) from None
    logging.getLogger("distributed").setLevel(logging.ERROR)
    if request.scheduler is None:
        threads = max(1, torch.get_num_threads() // request.nworkers)
        with (
            distributed.LocalCluster(
                n_workers=request.nworkers,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            ) as local,
            distributed.Client(local) as client,
        ):
            yield _ready(client, request, threads)
        return
    try:
        client = distributed.Client(request.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise VolumenError(
            request.scheduler,
            f"no Dask scheduler answers ({type(error).__name__})",
            remedy="start one with dask scheduler, and give its address",
        ) from None
    with client:
        yield _ready(client, request, None)


def _ready(client: Client, request: PredictRequest, threads: int | None) -> Cluster:
    """Wait for the workers and query their devices, precisions and versions."""
    required = max(1, request.nworkers)
    machines: dict[str, Machine] = {}
    while len(machines) < required:
        try:
            client.wait_for_workers(required, timeout=WARNING_SECONDS)
        except TimeoutError:
            logger.warning("waiting for %d workers at %s", required, request.scheduler or "this machine")
            continue
        machines = _describe(client, request, threads)
    machine = common_machine(machines)
    return Cluster(client, machine, request.device, threads, local=request.scheduler is None)


def _addresses(client: Client) -> set[str]:
    return set(client.scheduler_info(n_workers=-1)["workers"])


def _describe(client: Client, request: PredictRequest, threads: int | None) -> dict[str, Machine]:
    """Return device, precision and versions of each worker by address, without workers that leave meanwhile.

    The query uses tasks and not `Client.run`, which would block a worker's heartbeat while it imports torch.
    """
    futures = {
        address: client.submit(
            describe_worker, request.device, request.amp, threads, workers=[address], pure=False
        )
        for address in _addresses(client)
    }
    machines = {}
    for address, future in futures.items():
        while address in _addresses(client):
            try:
                machines[address] = future.result(timeout=POLL_SECONDS)
                break
            except TimeoutError:
                continue
            except ImportError as error:
                raise VolumenError(
                    f"worker {address}",
                    f"cannot import this program ({error})",
                    remedy="install the same version on its machine",
                ) from None
    return machines


def common_machine(machines: dict[str, Machine]) -> Machine:
    """Return the device, precision and versions that all workers have in common.

    Args:
        machines: description of each worker by address.

    Raises:
        VolumenError: they compute on different devices or in different precisions.
    """
    (first, machine), *others = machines.items()
    for address, other in others:
        if (other.device, other.precision) != (machine.device, machine.precision):
            raise VolumenError(
                "workers",
                f"{first} computes on {machine.device} in {machine.precision}, {address} on {other.device} in "
                f"{other.precision}",
                remedy="start workers of one kind, or say --device and --amp",
            )
    for key in ("name", "threads", "versions"):
        if any(getattr(other, key) != getattr(machine, key) for _, other in others):
            logger.warning("workers differ in %s: the last bits of their blocks may differ", key)
    return replace(machine, versions=dict(machine.versions))
