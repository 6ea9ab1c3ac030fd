"""A PyTorch dataset of patches whose samples do not depend on the number of workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from monai.transforms import Randomizable
from torch.utils.data import Dataset

from volumen.data.caching.block_cache import BLOCKS
from volumen.data.index.patch_index import PatchIndex, PatchLocation
from volumen.data.sampling.sampler import EpochPlan, plan_epoch, sample_rng
from volumen.utils.errors import VolumenError, is_defect
from volumen.utils.memory import keep_in_worker


class SampleError(VolumenError):
    """A sample cannot be made; the message names the volume and the place, in one line also from a worker process."""

    def __init__(self, where: object, problem: str = "", **details: Any) -> None:
        # DataLoader rebuilds a worker's exception from the text of its traceback; our message is its last line.
        if not problem and "Original Traceback" in str(where):
            last = str(where).strip().splitlines()[-1]
            where, _, problem = last.partition(f"{type(self).__name__}: ")[2].partition(": ")
        super().__init__(where, problem, **details)


class PatchDataset(Dataset):
    """Samples of patches; `dataset[(epoch, index)]` is a pure function of the seed, the epoch and the index.

    `dataset[(epoch, index, shares)]` draws classes by these shares, see `plan_epoch`; it is pure as well. Patches are
    drawn by `plan_epoch` and moved off the grid. Validation reads whole regions, see `RegionDataset`.

    Args:
        data: the cases in MONAI's list form; only opened cases (`OpenCase`) in it can be read.
        index: the valid patches of these cases.
        transform: called with {"case": OpenCase, "location": PatchLocation}; reads and transforms the patch.
            A MONAI `Randomizable` is seeded for each sample. None returns that dictionary.
        seed: seed of all random choices.
        samples_per_epoch: steps * batch size * processes; None for one sample per foreground patch.
        bg_to_fg_ratio: background patches per foreground patch (`bg_sampling_enabled`).
        class_oversampling: share of foreground samples drawn by class; "auto": by the shares of the keys.
        chunk_cache_mib: size of the cache of decoded chunks in each process that loads samples, in MiB; None does
            not change it. It affects speed, not values.
        cases: the opened cases, whose volumes are read lazily and can be pickled; None: `data` contains them.
    """

    def __init__(
        self,
        data: Sequence[Any],
        index: PatchIndex,
        transform: Callable[[dict], Any] | None,
        *,
        seed: int,
        samples_per_epoch: int | None = None,
        bg_to_fg_ratio: float = 0.0,
        class_oversampling: float | Literal["auto"] = 0.0,
        chunk_cache_mib: int | None = None,
        cases: Sequence[Any] | None = None,
    ) -> None:
        if samples_per_epoch is not None and samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch must be positive, got {samples_per_epoch}")
        self.cases = list(data if cases is None else cases)
        self.index = index
        self.transform = transform
        self.seed = int(seed)
        self.bg_to_fg_ratio = bg_to_fg_ratio
        # By `auto` the sampler's shares decide; without them no class is preferred.
        self.class_oversampling = 0.0 if class_oversampling == "auto" else float(class_oversampling)
        self.chunk_cache_mib = chunk_cache_mib
        self._cached_by: int | None = None
        self._plan: tuple[tuple[int, tuple[float, ...] | None], EpochPlan] | None = None
        self.samples_per_epoch = samples_per_epoch or len(index)

    def __len__(self) -> int:
        return self.samples_per_epoch

    def location(
        self, epoch: int, index: int, class_shares: tuple[float, ...] | None = None
    ) -> PatchLocation:
        """Return the location of a sample's patch."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        plan = self._epoch_plan(epoch, class_shares)
        class_row = int(plan.class_row[index])
        return self.index.random_location(
            int(plan.row[index]),
            sample_rng(self.seed, epoch, index),
            background=bool(plan.background[index]),
            class_row=None if class_row < 0 else class_row,
        )

    def __getitem__(self, key: int | tuple[int, int] | tuple[int, int, tuple[float, ...]]) -> Any:
        epoch, index, *shares = key if isinstance(key, tuple) else (0, key)
        epoch, index = int(epoch), int(index)
        self._bound_cache()
        keep_in_worker()
        location = self.location(epoch, index, tuple(shares[0]) if shares else None)
        case = self.cases[location.case]
        sample = {"case": case, "location": location}
        if self.transform is None:
            return sample
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=sample_seed(self.seed, epoch, index))
        try:
            return self.transform(sample)
        except Exception as error:
            if is_defect(innermost(error)):
                raise
            raise SampleError(
                case.image.path,
                f"the patch at {location.start} of size {location.size} failed ({root_cause(error)})",
            ) from error

    def _bound_cache(self) -> None:
        # Set here, since a spawned worker does not inherit the settings of the process that created the dataset.
        if self.chunk_cache_mib is not None and self._cached_by != os.getpid():
            BLOCKS.resize(self.chunk_cache_mib * 2**20)
            self._cached_by = os.getpid()

    def set_random_state(self, seed: int | None = None, state: Any = None) -> PatchDataset:
        """Do nothing, since every sample has its own seed.

        MONAI's DataLoader calls this method in each worker. Without it, MONAI would search every attribute for
        transforms to seed, through the cases into their open files, and recurse without end.
        """
        return self

    def _epoch_plan(self, epoch: int, class_shares: tuple[float, ...] | None) -> EpochPlan:
        if self._plan is None or self._plan[0] != (epoch, class_shares):
            plan = plan_epoch(
                self.index,
                seed=self.seed,
                epoch=epoch,
                samples=self.samples_per_epoch,
                bg_to_fg_ratio=self.bg_to_fg_ratio,
                class_oversampling=self.class_oversampling,
                class_shares=class_shares,
            )
            self._plan = ((epoch, class_shares), plan)
        return self._plan[1]


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the 32-bit seed of a sample's transforms."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


def innermost(error: BaseException) -> BaseException:
    """Return the innermost cause of an error, since MONAI's Compose wraps the error of a transform."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def root_cause(error: BaseException) -> str:
    """Return the message of the innermost cause."""
    error = innermost(error)
    return str(error) if isinstance(error, VolumenError) else f"{type(error).__name__}: {error}"
