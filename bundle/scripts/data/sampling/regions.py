"""The validation part as blocks that cover it without overlap, for sliding-window validation."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from volumen.data.index.patch_index import PatchLocation
from volumen.data.sampling.dataset import SampleError, root_cause
from volumen.utils.boxes import Box
from volumen.utils.memory import keep_in_worker
from volumen.utils.text import counted

logger = logging.getLogger(__name__)

# A block's outputs are held for all heads at once: 16 MiB a channel.
MOST_BLOCK_VOXELS = 1 << 22


class RegionDataset(Dataset):
    """Blocks of the validation regions, each voxel in one block, the same in every epoch.

    A block is up to two patches wide along every axis, as memory allows, so that a sliding window blends inside it.
    Blocks without any label that counts (no voxel of a mask above 0; without a mask, no label but 0 and the ignore
    label) are left out.

    Args:
        data: opened cases (`OpenCase`).
        boxes: validation regions by case name.
        transform: called with {"case": OpenCase, "location": PatchLocation}; reads the whole location.
        patch_size: the network's window, voxels per axis.
        targets: labelled targets.
        ignore_labels: label value that means unknown, by target.
        most_windows: about how many windows all blocks together may hold; None: no limit. Blocks are then chosen at
            random once, but at least one.
        seed: of that choice.
        objects_only: a mask alone does not make a block count, see `find_valid_patches`.
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
        seed: int = 0,
        objects_only: bool = False,
    ) -> None:
        self.cases = list(data)
        self.transform = transform
        self.objects_only = objects_only
        blocks = [
            PatchLocation(number, tuple(a for a, _ in block), tuple(b - a for a, b in block), box)
            for number, case in enumerate(self.cases)
            for box in boxes.get(case.name, ())
            for block in cut(box, block_size(patch_size))
        ]
        self.locations = self._choose(blocks, targets, ignore_labels or {}, patch_size, most_windows, seed)
        logger.info(
            "validation: %s, %d of them labelled and used",
            counted(len(blocks), "region"),
            len(self.locations),
        )
        if blocks and not self.locations:
            logger.warning("validation: no region holds a label, so there will be no scores")

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> Any:
        keep_in_worker()
        location = self.locations[index]
        case = self.cases[location.case]
        try:
            return self.transform({"case": case, "location": location})
        except Exception as error:
            raise SampleError(
                case.image.path,
                f"the region at {location.start} of size {location.size} failed ({root_cause(error)})",
            ) from error

    def set_random_state(self, seed: int | None = None, state: Any = None) -> RegionDataset:
        """Do nothing, as nothing is random here; see `PatchDataset.set_random_state` for why it must be there."""
        return self

    def _choose(
        self,
        blocks: Sequence[PatchLocation],
        targets: Sequence[str],
        ignore: Mapping[str, int | None],
        patch_size: Sequence[int],
        most: int | None,
        seed: int,
    ) -> list[PatchLocation]:
        """Keep labelled blocks, in random order, until they hold as many windows as allowed."""
        chosen: list[PatchLocation] = []
        windows = 0
        for number in np.random.default_rng(seed).permutation(len(blocks)):
            if most is not None and windows >= most:
                break
            block = blocks[number]
            case = self.cases[block.case]
            if any(is_labelled(case, block, name, ignore.get(name), self.objects_only) for name in targets):
                chosen.append(block)
                windows += window_count(block.size, patch_size)
        return chosen


class RegionSampler(Sampler[int]):
    """The blocks of one process: every block goes to exactly one of them, so none is left out or counted twice.

    Process r of w gets the blocks r, r + w, r + 2w, ...; the numbers of blocks differ by one at most, so whatever is
    done per block may not wait for the other processes. With fewer blocks than processes each process takes all of
    them: every sum over processes is then the same multiple of what it should be, and ratios of sums are right.

    Args:
        blocks: the data set, or its length.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, blocks: int | Sized, *, rank: int = 0, world_size: int = 1) -> None:
        count = blocks if isinstance(blocks, int) else len(blocks)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 to {world_size - 1}, got {rank}")
        self.indices = range(rank, count, world_size) if count >= world_size else range(count)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def block_size(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the largest block for a patch: two patches along as many axes, from the last, as memory allows."""
    size = [int(extent) for extent in patch_size]
    for axis in reversed(range(len(size))):
        if 2 * math.prod(size) <= MOST_BLOCK_VOXELS:
            size[axis] *= 2
    return tuple(size)


def cut(box: Box, largest: Sequence[int]) -> Iterator[Box]:
    """Cut a box into blocks of nearly equal size, none larger than `largest` along any axis."""
    spans = []
    for (start, stop), most in zip(box, largest, strict=True):
        pieces = max(1, math.ceil((stop - start) / most))
        edges = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
        spans.append(list(itertools.pairwise(edges)))
    yield from itertools.product(*spans)


def window_count(size: Sequence[int], patch_size: Sequence[int]) -> int:
    """Return how many windows, each half over the next, a block takes."""
    return math.prod(
        1 + math.ceil(max(0, extent - patch) / max(1, round(patch / 2)))
        for extent, patch in zip(size, patch_size)
    )


def is_labelled(
    case: Any, block: PatchLocation, target: str, ignore: int | None, objects_only: bool = False
) -> bool:
    """Whether any voxel of a block is labelled for a target; `objects_only` as for `find_valid_patches`."""
    region = tuple(slice(start, start + size) for start, size in zip(block.start, block.size))
    if target not in case.labels:
        return False
    inside: Any = True
    if target in case.masks:
        inside = case.masks[target].read(region) > 0
        if not objects_only or not inside.any():
            return bool(inside.any())
    label = case.labels[target].read(region)
    return bool(((label != 0) & (label != ignore) & inside).any())
