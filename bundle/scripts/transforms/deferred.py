"""What a worker reads of a patch if the training device augments it: stored voxels, and what was drawn for them.

With `tr_config.augment_on_device` the workers draw every random number and read the stored voxels, but change none.
`volumen.transforms.device` then does the work of the transforms for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from monai.data import list_data_collate
from torch import Tensor

from volumen.data.validity import known_voxels
from volumen.transforms.kernels.grid import Grid, Region
from volumen.utils.sample_keys import DEFERRED, RAW_VIEWS, STRONG, WEAK


@dataclass(frozen=True)
class Change:
    """A change of the intensities of one channel.

    Args:
        channel: the image channel.
        values: the numbers that the transform drew, see its `draw`.
        noise: float32 (*patch), standard normal numbers, for a transform that adds noise.
    """

    channel: int
    values: tuple[float, ...]
    noise: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """What one intensity transform does with a patch: its kind, its settings, and at most one change per channel."""

    kind: str
    settings: tuple[Any, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class RawLabel:
    """The stored voxels of a label.

    Args:
        values: (Ct, *region), of a type that torch computes with; None if the volume has no such label.
        mask: uint8 (1, *region), 0 where the label is not known; None if there is no mask.
        ignore: value that means unknown, or None.
        channels: number of channels Ct.
        extremes: the smallest and the largest known stored value, if `values` may hold other numbers instead of them.
    """

    values: Tensor | None
    mask: Tensor | None
    ignore: int | None
    channels: int
    extremes: tuple[int, int] | None = None

    def lies_within(self, low: int, high: int | None) -> bool:
        """Return whether all stored values, also those that are not known, lie within two values (None: no limit)."""
        values, extremes = self.values, self.extremes
        if extremes is None and (values is None or not values.numel()):
            return True
        if extremes is None:
            assert values is not None
            if high is None and low <= 0 and values.dtype == torch.uint8:
                return True
            least, most = values.aminmax()
            extremes = int(least), int(most)
        return low <= extremes[0] and (high is None or extremes[1] <= high)

    def for_checks(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return stored values (Ct, ...) and where they are known, bool (...), None for everywhere."""
        if self.values is None:
            return np.zeros((self.channels, 0), np.uint8), None
        if self.extremes is not None:
            return np.array([self.extremes]), None
        mask = None if self.mask is None else self.mask.numpy()
        values = self.values.numpy()
        return values, known_voxels(values, mask, self.ignore)


@dataclass
class RawPatch:
    """A patch as it is stored, with the transforms that were drawn for it.

    Args:
        worker_targets: labelled targets that the worker itself must also augment, since it derives others from them.
        patch: positions of the image's voxels in the volume.
        wide: positions of the labels' voxels, which include the halo.
        image: (C, *image_region), uint8, int16, int32 or float32; None if the patch lies outside of the bounds.
        image_region: region of the volume in `image`.
        coefficients: (C, 4) float32, see `Normalizer.coefficients`.
        labels: target to its stored voxels in `label_region`.
        label_region: region of the volume in every label.
        volume_shape: voxels per axis of the volume.
        spacing: voxel size per axis.
        stages: the intensity transforms in their order.
    """

    worker_targets: tuple[str, ...] = ()
    patch: Grid | None = None
    wide: Grid | None = None
    image: Tensor | None = None
    image_region: Region = ()
    coefficients: np.ndarray | None = None
    labels: dict[str, RawLabel] = field(default_factory=dict)
    label_region: Region = ()
    volume_shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    stages: list[Stage] = field(default_factory=list)

    @property
    def channels(self) -> int:
        """The number of image channels."""
        assert self.coefficients is not None
        return len(self.coefficients)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The voxels per axis of the patch."""
        assert self.patch is not None
        return self.patch.patch_shape

    def mapped(self, change: Callable[[Tensor], Tensor]) -> RawPatch:
        """Return this patch with `change` applied to all tensors."""
        labels = {
            target: replace(
                raw,
                values=None if raw.values is None else change(raw.values),
                mask=None if raw.mask is None else change(raw.mask),
            )
            for target, raw in self.labels.items()
        }
        stages = [
            replace(
                stage,
                changes=tuple(
                    replace(one, noise=None if one.noise is None else change(one.noise))
                    for one in stage.changes
                ),
            )
            for stage in self.stages
        ]
        image = None if self.image is None else change(self.image)
        return replace(self, image=image, labels=labels, stages=stages)


@dataclass
class DeferredBatch:
    """The raw patches of a batch, of different sizes; in a batch they are under the key `DEFERRED`."""

    patches: list[RawPatch]

    def pin_memory(self) -> DeferredBatch:
        """Return the batch in pinned memory; torch's data loader calls this."""
        return self.mapped(lambda tensor: tensor.pin_memory())

    def to(self, device: str | torch.device, non_blocking: bool = False) -> DeferredBatch:
        """Return the batch on a device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> DeferredBatch:
        """Return the batch with `change` applied to all tensors."""
        return DeferredBatch([patch.mapped(change) for patch in self.patches])

    def __len__(self) -> int:
        return len(self.patches)


def collate_patches(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate samples like MONAI's `list_data_collate`; raw patches become a `DeferredBatch`.

    Samples of unlabelled patches become entries of their own, see `volumen.utils.sample_keys.UNLABELLED`.
    """
    views = [sample for sample in samples if WEAK in sample or RAW_VIEWS in sample]
    if not views:
        return _collate_labelled(samples)
    batch = _collate_labelled(
        [sample for sample in samples if WEAK not in sample and RAW_VIEWS not in sample]
    )
    if RAW_VIEWS in views[0]:
        return {**batch, RAW_VIEWS: DeferredBatch([sample[RAW_VIEWS] for sample in views])}
    return {**batch, **{key: torch.stack([sample[key] for sample in views]) for key in (WEAK, STRONG)}}


def _collate_labelled(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    patches = [sample[DEFERRED] for sample in samples if DEFERRED in sample]
    if not patches:
        return list_data_collate(samples)
    plain = [{key: value for key, value in sample.items() if key != DEFERRED} for sample in samples]
    return {**list_data_collate(plain), DEFERRED: DeferredBatch(patches)}


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor with the values of an array, of a type with which torch computes on every device.

    Booleans become uint8, uint16 becomes int32, and types of more than 32 bits and float16 become float32; so integers
    of 32 unsigned or 64 bits must be converted before, unless float32 holds them.
    """
    name = array.dtype.name
    if name == "bool":
        array = array.view(np.uint8)
    elif name == "uint16":
        array = array.astype(np.int32)
    elif name not in ("uint8", "int8", "int16", "int32", "float32") or not array.dtype.isnative:
        array = array.astype(np.float32)
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_int32(values: np.ndarray) -> np.ndarray:
    """Return labels as int32; numbers too large for it are renumbered, and the background stays 0."""
    if values.dtype.itemsize >= 4 and values.size and values.max() > np.iinfo(np.int32).max:
        numbers, compact = np.unique(np.where(values > 0, values, 0), return_inverse=True)
        return (compact.reshape(values.shape) + int(numbers[0] > 0)).astype(np.int32)
    return values.astype(np.int32, copy=False)
