"""Divides the validation part into blocks without overlap, for sliding-window validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from volumen.data.index.patch_index import PatchLocation
from volumen.data.sampling.dataset import SampleError, innermost, root_cause
from volumen.data.sampling.validation_blocks import (
    BlockTable,
    Draw,
    draw_blocks,
    find_blocks,
    fitting_size,
)
from volumen.utils.boxes import Box
from volumen.utils.errors import is_defect
from volumen.utils.memory import keep_in_worker
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

BLOCK_WEIGHT = "block_weight"
"""Key of a sample's weight: the number of blocks that it represents, float64 (1 without a limit)."""


class RegionDataset(Dataset):
    """Blocks of the validation regions, each voxel in one block at most, the same in every epoch.

    A block is up to two patches wide along every axis, as memory and the limit allow, so that windows overlap and are
    blended inside it. Background counts like labels: a block is excluded only if none of its voxels is known for any
    target. With a limit, blocks are drawn at random, see `draw_blocks`; a sample's `block_weight` is the number of
    blocks that it represents.

    Args:
        data: the cases in MONAI's list form; only opened cases (`OpenCase`) in it can be read.
        boxes: validation regions by case name.
        transform: called with {"case": OpenCase, "location": PatchLocation}; reads the whole location.
        patch_size: the network's window, voxels per axis.
        targets: labelled targets.
        ignore_labels: label value that means unknown, by target.
        most_windows: approximate limit of the number of windows in all blocks together; None: no limit.
        final_windows: the same limit for the last and the best epoch, see `final`.
        seed: seed of the draw.
        objects_only: only voxels with a label other than 0 are known (`compute_loss_on_labeled_only`).
        cases: the opened cases; None: `data` contains them.
    """

    def __init__(
        self,
        data: Sequence[Any],
        boxes: Mapping[str, Sequence[Box]],
        transform: Callable[[dict], Any],
        *,
        patch_size: Sequence[int],
        targets: Sequence[str],
        ignore_labels: Mapping[str, int | None] | None = None,
        most_windows: int | None = None,
        final_windows: int | None = None,
        seed: int = 0,
        objects_only: bool = False,
        cases: Sequence[Any] | None = None,
    ) -> None:
        self.cases = list(data if cases is None else cases)
        self.transform = transform
        #: Whether to use the blocks for the last and the best epoch.
        self.final = False
        more = None if most_windows is None or final_windows is None else max(most_windows, final_windows)
        limits = (most_windows, more)
        sizes = [fitting_size(boxes, patch_size, most) for most in limits]
        ways = list(dict.fromkeys(sizes))
        found = find_blocks(
            self.cases, boxes, ways, targets, ignore_labels=ignore_labels, objects_only=objects_only
        )
        self._tables, self._draws = [], []
        for size, most in zip(sizes, limits):
            known = found[ways.index(size)].with_known_voxels()
            self._tables.append(known)
            self._draws.append(draw_blocks(known, known.windows(patch_size), most, seed))
        self._log_blocks(len(found[0]))

    def _log_blocks(self, blocks: int) -> None:
        """Log the blocks that are scored, and warn if none can be."""
        unknown = blocks - len(self.table)
        logger.info(
            "validation: %s%s", self.describe(), f"; {unknown} more hold no known voxel" if unknown else ""
        )
        if blocks and not len(self.table):
            logger.warning("validation: no voxel of the validation part is known, so there will be no scores")
        elif blocks and not self.table.labelled.any():
            logger.warning(
                "validation: the validation part is all background, so no Dice can be above 0; choose another "
                "tr_setup.seed or tr_val_split"
            )

    def describe(self) -> str:
        """Describe the scored part, such as "12 of 40 blocks, 30 % of the labelled voxels"."""
        draw = self._chosen
        if len(draw) == len(self.table):
            return f"{counted(len(draw), 'block')}, all of the validation part"
        total = int(self.table.labelled.sum())
        share = int(self.table.labelled[draw.rows].sum()) / total if total else 0.0
        return (
            f"{len(draw)} of {counted(len(self.table), 'block')}, {share:.0%} of the labelled voxels".replace(
                "%", " %"
            )
        )

    @property
    def is_drawn(self) -> bool:
        """Whether the last and the best epoch are scored on more blocks than other epochs."""
        drawn, table = self._draws[0], self._tables[0]
        final, every = self._draws[1], self._tables[1]
        return len(drawn) < len(table) and len(final) / len(every) > len(drawn) / len(table)

    @property
    def locations(self) -> list[PatchLocation]:
        """Locations of the blocks that are currently scored."""
        return [self._location(row) for row in self._chosen.rows]

    @property
    def weights(self) -> np.ndarray:
        """Number of blocks that each of the locations represents."""
        return self._chosen.weights

    @property
    def table(self) -> BlockTable:
        """All blocks, from which the scored ones are chosen."""
        return self._tables[self.final]

    @property
    def _chosen(self) -> Draw:
        return self._draws[self.final]

    def _location(self, row: int) -> PatchLocation:
        case = int(self.table.places(np.array([row]))[0][0])
        return self.table.location(row, self.cases[case].image.shape)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        keep_in_worker()
        location = self._location(self._chosen.rows[index])
        case = self.cases[location.case]
        try:
            sample = self.transform({"case": case, "location": location})
        except Exception as error:
            if is_defect(innermost(error)):
                raise
            raise SampleError(
                case.image.path,
                f"the region at {location.start} of size {location.size} failed ({root_cause(error)})",
            ) from error
        if isinstance(sample, dict):
            sample[BLOCK_WEIGHT] = torch.tensor(self._chosen.weights[index], dtype=torch.float64)
        return sample

    def set_random_state(self, seed: int | None = None, state: Any = None) -> RegionDataset:
        """Do nothing, since nothing is random here; `PatchDataset.set_random_state` explains why this method exists."""
        return self


class RegionSampler(Sampler[int]):
    """Assigns every validation block to exactly one process, so that each is counted once.

    Process r of w gets the blocks r, r + w, r + 2w, ... The numbers of blocks of two processes may differ by one, so a
    computation per block must not wait for other processes. With fewer blocks than processes, each process takes all
    blocks: every sum over processes is then too large by the same factor, and ratios of sums are correct.

    Args:
        blocks: the dataset, which may change its blocks between two validations, or a number of blocks.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, blocks: int | Sized, *, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 to {world_size - 1}, got {rank}")
        self.blocks, self.rank, self.world_size = blocks, rank, world_size

    @property
    def indices(self) -> range:
        """The indices of this process's blocks."""
        count = self.blocks if isinstance(self.blocks, int) else len(self.blocks)
        return range(self.rank, count, self.world_size) if count >= self.world_size else range(count)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
