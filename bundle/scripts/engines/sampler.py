"""A sampler that can start in the middle of an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class ResumableSampler(Sampler[Any]):
    """The samples of another sampler, without the first batches of an epoch that was interrupted after them.

    Args:
        sampler: yields the same samples each time it is iterated over in one epoch; has `set_epoch(epoch)`.
        batch_size: samples per batch of the data loader.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self._skip = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch (from 0) and the first batch of it that the next iteration yields."""
        self.sampler.set_epoch(epoch)
        self._skip = first_batch * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.sampler), self._skip, None)

    def __len__(self) -> int:
        """Samples of a whole epoch, so that the number of batches per epoch does not change."""
        return len(self.sampler)
