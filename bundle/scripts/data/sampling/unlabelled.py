"""Puts unlabelled patches into the batches of labelled ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Sampler

from volumen.data.sampling.dataset import PatchDataset
from volumen.data.sampling.sampler import PatchSampler


class UnlabelledKey(NamedTuple):
    """The key of an unlabelled patch: a pure function of the epoch and the number, like the key of a labelled one."""

    epoch: int
    number: int


@dataclass(frozen=True)
class UnlabelledStream:
    """The unlabelled patches that belong to labelled batches.

    Args:
        patches: the patches; its `samples_per_epoch` is at least that of all batches of an epoch.
        per_batch: patches that a batch of one process gets.
    """

    patches: PatchDataset
    per_batch: int


class JoinedPatches(Dataset):
    """Labelled and unlabelled patches in one data set: `UnlabelledKey` is the key of the latter.

    Args:
        labelled: the labelled patches.
        unlabelled: the unlabelled patches.
    """

    def __init__(self, labelled: Any, unlabelled: PatchDataset) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, UnlabelledKey):
            return self.unlabelled[(key.epoch, key.number)]
        return self.labelled[key]

    def set_random_state(self, seed: int | None = None, state: Any = None) -> JoinedPatches:
        """Do nothing, see `PatchDataset.set_random_state`."""
        return self


class JoinedBatches(Sampler):
    """Batches of labelled patches, each followed by its unlabelled ones.

    Batch n of process r of w has the unlabelled patches (n w + r) u to (n w + r) u + u - 1 of the epoch, whatever the
    workers are; a last incomplete batch has as many as the others.

    Args:
        sampler: yields the keys of labelled patches, and has the epoch and the number of the process.
        batch_size: labelled patches of a batch.
        per_batch: unlabelled patches of a batch, u.
    """

    def __init__(self, sampler: PatchSampler, batch_size: int, per_batch: int) -> None:
        self.sampler, self.batch_size, self.per_batch = sampler, batch_size, per_batch

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        numbers = count(self.sampler.rank, self.sampler.num_replicas)
        for keys, number in zip(_batches(self.sampler, self.batch_size), numbers):
            first = number * self.per_batch
            yield [*keys, *(UnlabelledKey(self.sampler.epoch, first + i) for i in range(self.per_batch))]


def samples_needed(sampler: PatchSampler, per_batch: int) -> int:
    """Return the unlabelled patches of an epoch, over all processes.

    Args:
        sampler: of the labelled patches, with its batch size.
        per_batch: unlabelled patches of a batch of one process.
    """
    return max(1, sampler.steps * sampler.num_replicas * per_batch)


def _batches(keys: Iterable[Any], size: int) -> Iterator[Sequence[Any]]:
    batch: list[Any] = []
    for key in keys:
        batch.append(key)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
