"""One volume's prediction as a value: everything that decides its blocks, in this process or in another one."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from scripts.data.geometry import AxisTurn
from scripts.inference.blending import BlockAccumulator
from scripts.inference.finish import BlockFinisher
from scripts.inference.gain import GainMeter, Labels
from scripts.inference.jobs import Job
from scripts.inference.outputs import Outputs
from scripts.inference.postprocess import CleaningRules
from scripts.inference.predictor import Predictor, WindowNetwork
from scripts.inference.reader import WindowReader, cache_bytes
from scripts.inference.results import Stored
from scripts.inference.stream import Finished, StreamCounts, stream
from scripts.inference.windows import Box, PredictPlan
from scripts.memory import freed_memory_kept

if TYPE_CHECKING:
    from scripts.inference.predict import PredictRequest
    from scripts.transforms.normalize import Normalizer

PARTIAL_SUMS_BYTES = 1 << 23
"""Memory for partial sums, or twice what a window touches if that is more; the rest goes to a temporary file."""
LEAST_CACHE_BYTES = 1 << 24
MOST_CACHE_BYTES = 1 << 30
"""Memory for decoded input chunks: the least, and the most where chunks are large."""


class State(Protocol):
    """Where blocks go, and who is told of them: `OutputState` or `WorkerState`."""

    output: Path
    folder: Path
    corrupt: list[Box]

    def record(self, block: tuple[int, ...]) -> None: ...
    def note_corrupt(self, box: Box) -> None: ...


@dataclass(frozen=True)
class VolumeWork:
    """What is to be done for one volume; it can be sent to another process on a machine that sees the same files.

    Args:
        job: the volume, and where its prediction goes.
        request: how.
        plan: windows and blocks.
        stored: what is stored of each output.
        rules: what is done to label maps.
        normalizer: maps the volume's raw values to float32.
        precision: "float32", "bfloat16" or "float16".
        spacing: voxel size where the image has none, per axis of the image, or None.
        nonfinite: "zero" or "refuse", for NaN and infinity in the image.
        labels: the truth by target, with which an augmentation's gain is measured.
        turn: how windows are turned for the network, whose training volumes had their axes otherwise; None for not.
        classes: names of classes by target.
    """

    job: Job
    request: PredictRequest
    plan: PredictPlan
    stored: tuple[Stored, ...]
    rules: CleaningRules
    normalizer: Normalizer
    precision: str
    spacing: tuple[float, ...] | None
    nonfinite: str = "zero"
    labels: Mapping[str, Labels] = field(default_factory=dict)
    turn: AxisTurn | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def voxel_size(self) -> tuple[float, ...]:
        """Voxel size that computations use: the image's, else that of the training, else 1."""
        return self.job.image.spacing or self.spacing or (1.0,) * self.plan.ndim

    def with_absolute_paths(self) -> VolumeWork:
        """Return the same work for a process with another working directory."""
        job = self.job
        return replace(
            self,
            job=replace(
                job,
                image=_absolute(job.image),
                mask=None if job.mask is None else _absolute(job.mask),
                output=job.output.absolute(),
            ),
            labels={
                name: replace(
                    truth,
                    label=_absolute(truth.label),
                    mask=None if truth.mask is None else _absolute(truth.mask),
                )
                for name, truth in self.labels.items()
            },
        )


def _absolute(volume: Any) -> Any:
    if "://" in volume.path:
        return volume
    moved = copy.copy(volume)
    moved.path = os.path.abspath(volume.path)  # noqa: PTH100  (a path that does not exist stays as it is)
    return moved


def make_blocks(
    work: VolumeWork,
    predictor: Predictor,
    state: State,
    done: np.ndarray,
    *,
    scratch: Path,
    may_write: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] | None = None,
) -> StreamCounts:
    """Compute and write every block that is not done.

    Args:
        work: what is to be done.
        predictor: the network.
        state: told of finished blocks.
        done: blocks to leave alone, bool, shape `plan.blocks`.
        scratch: folder for partial sums beyond their memory.
        may_write: called before a block is written; raises what stops the work.
        progress: called with the number of windows settled.
    """
    plan, request = work.plan, work.request
    heads = tuple(stored.head for stored in work.stored)
    reader = WindowReader(
        work.job.image,
        plan,
        work.normalizer,
        mask=work.job.mask,
        skip_empty=request.skip_empty,
        on_corrupt=request.on_corrupt,
        on_note=state.note_corrupt,
        nonfinite=work.nonfinite,
    )
    gain = GainMeter(work.labels, work.stored, tuple(low for low, _ in plan.box)) if work.labels else None
    network = WindowNetwork(
        predictor,
        heads,
        plan.patch_size,
        tta=request.tta,
        precision=work.precision,
        compare=gain is not None,
        turn=work.turn,
    )
    outputs = Outputs(work)
    finisher = BlockFinisher(plan, heads, outputs.stored, reader, outputs.sinks, state, gain)

    def finish(block: Finished) -> None:
        may_write()
        finisher(block)

    budget = cache_bytes(reader.image.volume, plan.patch_size, LEAST_CACHE_BYTES, MOST_CACHE_BYTES)
    with (
        freed_memory_kept(predictor.device),
        block_cache_of(budget),
        BlockAccumulator(plan, network.channels, PARTIAL_SUMS_BYTES, scratch, done) as accumulator,
    ):
        counts = stream(
            plan,
            reader.window,
            network,
            accumulator,
            finish,
            done=done if done.any() else None,
            workers=request.workers,
            progress=progress,
        )
    counts.seconds = network.seconds
    counts.overlaps = gain.overlaps if gain else {}
    return counts


_budgets: list[int] = []
_budgets_lock = threading.Lock()


@contextmanager
def block_cache_of(budget: int) -> Iterator[None]:
    """Give decoded input chunks this much memory meanwhile, beside what other volumes of this process got."""
    from scripts.data.block_cache import BLOCKS

    with _budgets_lock:
        if not _budgets:
            _budgets.append(BLOCKS.max_bytes)
        _budgets.append(budget)
        BLOCKS.resize(sum(_budgets[1:]))
    try:
        yield
    finally:
        with _budgets_lock:
            _budgets.remove(budget)
            BLOCKS.resize(sum(_budgets[1:]) if len(_budgets) > 1 else _budgets.pop())
