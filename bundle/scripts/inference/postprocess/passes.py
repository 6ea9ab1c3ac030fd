"""Passes over the blocks of a predicted volume: every block is made by itself, in this process or on workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from volumen.inference.arrays import final_arrays
from volumen.utils.threads import in_threads

if TYPE_CHECKING:
    from volumen.inference.volume_work import VolumeWork

MayWrite = Callable[[], None]


class BlockPass(Protocol):
    """One pass; a frozen dataclass, so that it can be sent to another process."""

    @property
    def work(self) -> VolumeWork:
        """The volume."""
        ...

    @property
    def count(self) -> int:
        """Blocks that there are."""
        ...

    @property
    def title(self) -> str:
        """What is done, as a progress bar tells it."""
        ...

    @property
    def is_light(self) -> bool:
        """Whether a few blocks are made faster than sent."""
        ...

    def make(self, number: int, may_write: MayWrite) -> None:
        """Make a block, by its place in the order of all.

        Args:
            number: which.
            may_write: called after all is read and before anything is written; raises what stops the work. What was
                read before it did not raise, was there: nobody removes it while the work is wanted.
        """
        ...


Run = Callable[[BlockPass], None]
"""Makes every block of a pass."""
Tell = Callable[[str, int, int], None]
"""Told a pass's title, the blocks of it that are made, and all of them."""


def run_here(workers: int, tell: Tell | None = None) -> Run:
    """Return what makes passes with threads of this process.

    Args:
        workers: threads.
        tell: told how far a pass is.
    """

    def run(blocks: BlockPass) -> None:
        made = in_threads(lambda number: blocks.make(number, _always), range(blocks.count), workers)
        for count, _ in enumerate(made, start=1):
            if tell is not None:
                tell(blocks.title, count, blocks.count)

    return run


def _always() -> None:
    """Let every block be written."""


@dataclass(frozen=True)
class LevelPass:
    """Makes a level of the pyramids from the level before it.

    Args:
        work: the volume.
        level: from 1.
        boxes: the chunks to make, by their place in the order of all; None: all.
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

    def make(self, number: int, may_write: MayWrite) -> None:
        arrays = final_arrays(self.work)
        name, box = arrays.box(self.level, number if self.boxes is None else self.boxes[number])
        values = arrays.coarsened(name, self.level, box)
        may_write()
        arrays.write(name, box, values, self.level)
