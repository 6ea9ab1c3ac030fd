"""Chooses the patch of each sample: a pure function of the seed, the epoch and the sample's index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data.distributed import DistributedSampler

from volumen.data.index.patch_index import PatchIndex

_PLAN, _SAMPLE = 0, 1


@dataclass(frozen=True)
class EpochPlan:
    """The patches of one training epoch.

    Args:
        row: (S,) row of the foreground or background table.
        background: (S,) bool; True means the background table.
        class_row: (S,) row of `PatchIndex.classes`, a class that the patch must contain, or -1.
    """

    row: np.ndarray
    background: np.ndarray
    class_row: np.ndarray


def plan_epoch(
    index: PatchIndex,
    *,
    seed: int,
    epoch: int,
    samples: int,
    bg_to_fg_ratio: float = 0.0,
    class_oversampling: float = 0.0,
    class_shares: Sequence[float] | None = None,
) -> EpochPlan:
    """Choose the patches of an epoch.

    Foreground patches are drawn without replacement until all have been drawn, then again in another order; background
    patches likewise.

    Args:
        index: the valid patches.
        seed, epoch: seed of the order.
        samples: number of samples in the epoch, over all processes.
        bg_to_fg_ratio: background patches per foreground patch; 0, or an index without background: none.
        class_oversampling: share of the foreground samples, 0 to 1, that are drawn by class: each class of
            `index.classes` in turn, from the patches that contain it.
        class_shares: share of the foreground samples for each of `index.classes`, at most 1 together, in place of
            `class_oversampling`.

    Returns:
        The plan, in random order.
    """
    if bg_to_fg_ratio < 0:
        raise ValueError(f"bg_to_fg_ratio must not be negative, got {bg_to_fg_ratio}")
    if not 0 <= class_oversampling <= 1:
        raise ValueError(f"class_oversampling must be a share between 0 and 1, got {class_oversampling}")
    if not len(index):
        raise ValueError("the index holds no patch to draw")
    rng = np.random.default_rng([_PLAN, seed, epoch])
    empty = round(samples * bg_to_fg_ratio / (1 + bg_to_fg_ratio)) if len(index.background) else 0
    by_class = [np.flatnonzero(bits) for bits in index.foreground.class_shifts]
    drawable = [k for k, rows in enumerate(by_class) if len(rows)]
    if class_shares is None:
        oversampled = round((samples - empty) * class_oversampling) if drawable else 0
        drawn = np.resize(drawable, oversampled) if oversampled else np.zeros(0, np.int64)
    else:
        drawn = _by_shares(class_shares, drawable, samples - empty)
        oversampled = len(drawn)
    class_row = np.full(samples, -1, np.int64)
    class_row[:oversampled] = drawn
    row = np.empty(samples, np.int64)
    for k in drawable if oversampled else []:
        chosen = class_row[:oversampled] == k
        row[:oversampled][chosen] = by_class[k][_cycled(rng, len(by_class[k]), int(chosen.sum()))]
    row[oversampled : samples - empty] = _cycled(rng, len(index), samples - empty - oversampled)
    row[samples - empty :] = _cycled(rng, len(index.background), empty)
    background = np.arange(samples) >= samples - empty
    order = rng.permutation(samples)
    return EpochPlan(row[order], background[order], class_row[order])


def _by_shares(shares: Sequence[float], drawable: Sequence[int], samples: int) -> np.ndarray:
    """Return the row of a class for each sample that is drawn by class, each class as often as its share says."""
    counts = [int(samples * shares[k]) for k in drawable]
    return np.repeat(np.asarray(drawable, np.int64), counts)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random number generator of one sample."""
    return np.random.default_rng([_SAMPLE, seed, epoch, index])


def _cycled(rng: np.random.Generator, population: int, count: int) -> np.ndarray:
    """Draw `count` of `population` without replacement, starting over when all are drawn."""
    rounds = -(-count // population) if count else 0
    drawn = [rng.permutation(population) for _ in range(rounds)]
    return np.concatenate(drawn)[:count] if drawn else np.zeros(0, np.int64)


class PatchSampler(DistributedSampler):
    """Yields the (epoch, index) pairs of one process, or (epoch, index, class shares) once shares are set.

    Process r of w gets the indices r, r + w, r + 2w, ... All processes together get every index once, except the
    remainder of a division by w; so w processes with batches of b use the same samples as one process with batches of
    w * b. The class is a `DistributedSampler` because MONAI's engines call `set_epoch` on these at the start of every
    epoch.

    Args:
        dataset_length: samples per epoch over all processes, or an object with that length.
        batch_size: samples per batch and process, for `steps`.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self, dataset_length: int | Sized, *, batch_size: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        length = dataset_length if isinstance(dataset_length, int) else len(dataset_length)
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0 to {world_size - 1}, got {rank}")
        self.dataset: Any = range(length)
        self.num_replicas = world_size
        self.rank = rank
        self.epoch = 0
        self.batch_size = batch_size
        self.drop_last = False
        self.shuffle = False
        self.seed = 0
        # Equal for every process: otherwise the others would wait for the gradients of a process that has fewer.
        self.class_shares: tuple[float, ...] | None = None
        self._indices = range(rank, length - length % world_size, world_size)
        self.num_samples = len(self._indices)
        self.total_size = length

    def __iter__(self) -> Iterator[Any]:
        shares = () if self.class_shares is None else (self.class_shares,)
        return iter([(self.epoch, index, *shares) for index in self._indices])

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def steps(self) -> int:
        """Number of batches, a last incomplete one included."""
        return -(-len(self) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose samples the next iteration yields."""
        self.epoch = int(epoch)
