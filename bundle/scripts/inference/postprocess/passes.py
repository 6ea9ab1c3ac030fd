"""Passes over the blocks of a predicted volume; blocks are independent and run in this process or on workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from volumen.inference.arrays import final_arrays
from volumen.utils.threads import in_threads

if TYPE_CHECKING:
    from volumen.inference.volume_work import VolumeWork

CancellationCheck = Callable[[], None]


class BlockPass(Protocol):
    """One pass; a frozen dataclass, so that it can be sent to another process."""

    @property
    def work(self) -> VolumeWork:
        """The volume."""
        ...

    @property
    def count(self) -> int:
        """Number of blocks."""
        ...

    @property
    def title(self) -> str:
        """Title of the pass in a progress bar."""
        ...

    @property
    def is_light(self) -> bool:
        """Whether a few blocks take less time than sending them to workers."""
        ...

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        """Compute the block with a number.

        Args:
            number: number of the block.
            raise_if_cancelled: called after everything is read and before anything is written; raises an exception
                if the work is cancelled. If it does not raise, the data that were read are valid, since they are
                only removed after a cancellation.
        """
        ...


Run = Callable[[BlockPass], None]
"""Computes every block of a pass."""
ProgressCallback = Callable[[str, int, int], None]
"""Called with the title of a pass, the number of its finished blocks, and the number of all its blocks."""


def run_here(workers: int, callback: ProgressCallback | None = None) -> Run:
    """Return a function that runs passes with threads of this process.

    Args:
        workers: number of threads.
        callback: called with the progress of a pass.
    """

    def run(blocks: BlockPass) -> None:
        made = in_threads(lambda number: blocks.make(number, _always), range(blocks.count), workers)
        for count, _ in enumerate(made, start=1):
            if callback is not None:
                callback(blocks.title, count, blocks.count)

    return run


def _always() -> None:
    """Allow every block to be written."""


@dataclass(frozen=True)
class LevelPass:
    """Computes a level of the pyramids from the previous level.

    Args:
        work: the volume's prediction.
        level: number of the level, from 1.
        boxes: numbers of the chunks to compute; None: all.
    """

    work: VolumeWork
    level: int
    boxes: tuple[int, ...] | None = None
    is_light = True

    @property
    def title(self) -> str:
        return f"level {self.level} of the pyramid"

    @property
    def count(self) -> int:
        return final_arrays(self.work).box_count(self.level) if self.boxes is None else len(self.boxes)

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        arrays = final_arrays(self.work)
        name, box = arrays.box(self.level, number if self.boxes is None else self.boxes[number])
        values = arrays.coarsened(name, self.level, box)
        raise_if_cancelled()
        arrays.write(name, box, values, self.level)
