"""Averages the blocks of an ensemble as soon as every member has finished them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumen.inference.windows.blending import SpillFile, axis_weight_sums, divide_by_weights
from volumen.inference.windows.plan import PredictPlan

Empty = list[tuple[slice, ...]]


class BlockJoiner:
    """Averages the blended blocks of an ensemble's members.

    Members finish their blocks in about the same order, so that few blocks wait for another member; beyond `budget`
    bytes they wait in a file. The mean is summed in the order of the members, like `numpy.mean` over their stacked
    float32 results, so that it is bitwise the same for any order in which they finish.

    Args:
        plans: windows of each member; all have the same region and blocks.
        channels: blended channels.
        budget: bytes of waiting blocks in memory.
        folder: folder of the file.
    """

    def __init__(self, plans: Sequence[PredictPlan], channels: int, budget: int, folder: Path) -> None:
        self._plans = list(plans)
        self._weights = [axis_weight_sums(plan) for plan in plans]
        self._shape = (channels, *plans[0].block_shape)
        self._limit = max(1, budget // (4 * int(np.prod(self._shape))))
        self._folder = folder
        self._spill: SpillFile | None = None
        self._waiting: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self._arrived: dict[tuple[int, ...], set[int]] = {}
        self._empty: dict[tuple[int, ...], Empty] = {}
        self._blank: set[tuple[int, ...]] = set()

    def close(self) -> None:
        """Remove the file."""
        if self._spill is not None:
            self._spill.close()

    def add(
        self, member: int, block: tuple[int, ...], sums: np.ndarray | None, empty: Empty
    ) -> tuple[tuple[int, ...], np.ndarray | None, Empty] | None:
        """Add a member's block; return the mean if it was the last member.

        Args:
            member: number of the member.
            block: number of the block.
            sums: weighted sums (channels, *block_shape), which are modified; None if the whole block is empty.
            empty: empty parts of the block.

        Returns:
            Block, blended mean (channels, *block_shape) or None if the block is empty for a member, and the parts that
            are empty for a member; None while members are missing.
        """
        if sums is None:
            self._blank.add(block)
        else:
            self._keep(member, block, sums)
        arrived = self._arrived.setdefault(block, set())
        arrived.add(member)
        self._empty.setdefault(block, []).extend(empty)
        if len(arrived) < len(self._plans):
            return None
        del self._arrived[block]
        parts = self._empty.pop(block)
        # If the block is empty for one member it is 0, but the values of the other members must be removed.
        found = [self._take((number, *block)) for number in range(len(self._plans))]
        if block in self._blank:
            self._blank.discard(block)
            return block, None, parts
        return block, _mean([values for values in found if values is not None]), parts

    def _keep(self, member: int, block: tuple[int, ...], sums: np.ndarray) -> None:
        box = self._plans[member].block_box(block)
        inside = (slice(None), *(slice(0, part.stop - part.start) for part in box))
        divide_by_weights(sums[inside], self._weights[member], box)
        while len(self._waiting) >= self._limit:
            key, values = self._waiting.popitem(last=False)
            if self._spill is None:
                self._spill = SpillFile(self._folder, self._shape)
            self._spill.put(key, values)
        self._waiting[(member, *block)] = sums

    def _take(self, key: tuple[int, ...]) -> np.ndarray | None:
        if key in self._waiting:
            return self._waiting.pop(key)
        return self._spill.take(key) if self._spill is not None and key in self._spill else None


def _mean(members: list[np.ndarray]) -> np.ndarray:
    total = members[0]
    for values in members[1:]:
        total += values
    total /= np.float32(len(members))
    return total
