"""Computes the blocks of one volume: reads windows, runs the network, blends, and writes finished blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from volumen.inference.blocks.finish import BlockWriter
from volumen.inference.blocks.products import Outputs
from volumen.inference.gain import GainMeter
from volumen.inference.placing import Placing
from volumen.inference.predictor import Predictor, WindowNetwork
from volumen.inference.volume_work import State, VolumeWork
from volumen.inference.windows.blending import BlockAccumulator
from volumen.inference.windows.joining import BlockJoiner
from volumen.inference.windows.plan import Box
from volumen.inference.windows.reader import WindowReader, cache_bytes
from volumen.inference.windows.stream import Finished, Lane, StreamCounts, stream
from volumen.utils.memory import freed_memory_kept

PARTIAL_SUMS_BYTES = 1 << 23
"""Memory for partial sums, but at least the blocks of two windows; further blocks go to a temporary file."""
_SHARE_OF_GPU = 0.1
"""Share of a GPU's free memory for partial sums; the windows need the rest."""
LEAST_CACHE_BYTES = 1 << 24
MOST_CACHE_BYTES = 1 << 30
"""Smallest and largest memory for decoded input chunks; more is used for large chunks."""


def make_blocks(
    work: VolumeWork,
    predictor: Predictor,
    state: State,
    done: np.ndarray,
    *,
    scratch: Path,
    raise_if_cancelled: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] | None = None,
) -> StreamCounts:
    """Compute and write every block that is not done.

    Args:
        work: the volume's prediction.
        predictor: the network, or the ensemble.
        state: records finished blocks.
        done: blocks that are already finished, bool, shape `work.window_plan.blocks`.
        scratch: folder for partial sums that do not fit in memory.
        raise_if_cancelled: called before a block is written; raises an exception to stop the work.
        progress: called with the number of windows finished.
    """
    plan, request = work.window_plan, work.request
    heads = tuple(stored.head for stored in work.stored)
    gain = GainMeter(work.labels, work.stored, tuple(low for low, _ in plan.box)) if work.labels else None
    noted = _once(_note_of(work, state))
    readers = [
        WindowReader(
            work.window_image,
            member.plan,
            member.normalizer,
            mask=work.window_mask,
            skip_empty=request.skip_empty,
            on_corrupt=request.on_corrupt,
            on_note=noted,
            nonfinite=work.nonfinite,
        )
        for member in work.members
    ]
    # The means of an ensemble are computed in main memory.
    blends_there = blends_on_device(predictor.device) and len(work.members) == 1
    networks = [
        WindowNetwork(
            model,
            heads,
            member.plan.patch_size,
            tta=request.tta,
            precision=work.precision,
            compare=gain is not None,
            turn=member.turn,
            stays=blends_there,
            compile=request.compile,
        )
        for model, member in zip(predictor.networks, work.members, strict=True)
    ]
    reader, channels = readers[0], networks[0].channels
    outputs = Outputs(work)
    several = len(networks) > 1
    writer = BlockWriter(plan, heads, outputs.stored, reader, outputs.sinks, state, gain, joined=several)

    def finish(block: Finished) -> None:
        raise_if_cancelled()
        writer(block)

    patches = [member.plan.patch_size for member in work.members]
    budget = max(
        cache_bytes(reader.image.volume, patch, LEAST_CACHE_BYTES, MOST_CACHE_BYTES) for patch in set(patches)
    )
    placing = Placing(predictor.networks, predictor.device)
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept(predictor.device))
        stack.enter_context(block_cache_of(budget))
        lanes = [
            Lane(
                member.plan,
                own.window,
                placing.bring(number, network),
                stack.enter_context(
                    BlockAccumulator(
                        member.plan,
                        channels,
                        sums_bytes(predictor.device) if blends_there else PARTIAL_SUMS_BYTES,
                        scratch,
                        done,
                        predictor.device if blends_there else None,
                    )
                ),
            )
            for number, (member, own, network) in enumerate(zip(work.members, readers, networks, strict=True))
        ]
        join = None
        if several:
            join = BlockJoiner(
                [member.plan for member in work.members], channels, PARTIAL_SUMS_BYTES, scratch
            )
            stack.callback(join.close)
        counts = stream(
            lanes,
            finish,
            join=join,
            done=done if done.any() else None,
            workers=request.workers,
            run=placing.run,
            progress=progress,
        )
    counts.seconds = (
        sum(network.seconds[0] for network in networks),
        sum(network.seconds[1] for network in networks),
    )
    counts.overlaps = gain.overlaps if gain else {}
    return counts


def blends_on_device(device: torch.device) -> bool:
    """Whether windows are blended where the network computes them: on a GPU, so that only whole blocks leave it."""
    return device.type == "cuda"


def sums_bytes(device: torch.device) -> int:
    """Return the bytes of partial sums in the memory of a device."""
    if device.type != "cuda":
        return PARTIAL_SUMS_BYTES
    return max(PARTIAL_SUMS_BYTES, int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_GPU))


def _note_of(work: VolumeWork, state: State) -> Callable[[Box], None]:
    """Return what records boxes of the network's grid that cannot be read, as boxes of the image."""
    grid = work.resampling
    return state.note_corrupt if grid is None else lambda box: state.note_corrupt(grid.stored_box(box))


def _once(note: Callable[[Box], None]) -> Callable[[Box], None]:
    """Return a function that notes a box once, though the readers of several networks find it."""
    noted: set[Box] = set()
    lock = threading.Lock()

    def note_once(box: Box) -> None:
        with lock:
            if box in noted:
                return
            noted.add(box)
        note(box)

    return note_once


_budgets: list[int] = []
_budgets_lock = threading.Lock()


@contextmanager
def block_cache_of(budget: int) -> Iterator[None]:
    """Add memory to the cache of decoded input chunks within the context; volumes of this process share the cache."""
    from volumen.data.caching.block_cache import BLOCKS

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
