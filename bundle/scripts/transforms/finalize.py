"""The last steps of a sample: crop the halo, restrict masks, convert to tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform

from volumen.data.validity import labelled_voxels
from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import DEFERRED, PACKED, confidence_key, informed_keys, labelled_key, mask_key


class CropHalod(Transform):
    """Crop labels and masks (C, *(patch + 2 halo)) of labelled targets to the patch, and remove "in_volume".

    If `InstancesToTargetd` wrote `<target>_labelled`, that entry is cropped too.

    Args:
        targets: labelled targets, present with their masks.
        halo: voxels per axis to remove on every side.
    """

    def __init__(self, targets: Sequence[str], halo: Sequence[int] | int = 0) -> None:
        self.targets = tuple(targets)
        self.halo = halo

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        sample.pop("in_volume", None)
        for target in self.targets:
            for key in (target, mask_key(target), labelled_key(target)):
                if key in sample:
                    sample[key] = self._crop(sample[key])
        return sample

    def _crop(self, array: np.ndarray) -> np.ndarray:
        ndim = array.ndim - 1
        widths = (self.halo,) * ndim if isinstance(self.halo, int) else tuple(self.halo)
        spans = (slice(width, size - width) for width, size in zip(widths, array.shape[1:], strict=True))
        return array[(slice(None), *spans)]


class RestrictToLabelledd(Transform):
    """Restrict the masks to labelled voxels: those whose label is above 0 (`loss_on_label_only`).

    It must follow the derivation of targets, which needs the labels of all voxels.

    Args:
        targets: labelled targets.
        derived: derived target to its source, whose label restricts it as well.
    """

    def __init__(self, targets: Sequence[str], derived: Mapping[str, str] | None = None) -> None:
        self.sources = {**{target: target for target in targets}, **(derived or {})}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for target, source in self.sources.items():
            if DEFERRED in sample and mask_key(target) not in sample:
                continue
            labelled = labelled_voxels(sample.get(labelled_key(source), sample[source]))
            sample[mask_key(target)] = sample[mask_key(target)] & labelled
            if confidence_key(target) in sample:
                sample[confidence_key(target)] = sample[confidence_key(target)] * labelled
        return sample


class FinalizePatchd(Transform):
    """Convert a sample to plain tensors and remove all entries that a batch cannot hold.

    Args:
        targets: labelled targets: int16 class indices (Ct, *patch), or float32 if they are distances.
        derived: derived targets: float32 (C, *patch), with what is known of them if their validity is informed.

    Returns:
        image float32, targets and derived as above, their masks bool (1, *patch), "volume_name" str,
        "start" int64 (n,), "spacing" n floats (in a batch n tensors (B,)), and what is packed for the device. Of a
        patch that the device augments: its `RawPatch` instead of the image and the labelled targets.

    Raises:
        VolumenError: a label exceeds int16, as instance labels may.
    """

    def __init__(self, targets: Sequence[str], derived: Sequence[str] = ()) -> None:
        self.targets, self.derived = tuple(targets), tuple(derived)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        final: dict[Hashable, Any] = {}
        if DEFERRED in data:
            final[DEFERRED] = data[DEFERRED]
        else:
            final["image"] = _tensor(data["image"], np.float32)
        for target in () if DEFERRED in data else self.targets:
            final[target] = _label_tensor(data[target], target, data["volume_name"])
            final[mask_key(target)] = _tensor(data[mask_key(target)], np.bool_)
        for target in self.derived:
            final[target] = _tensor(data[target], np.float32)
            final[mask_key(target)] = _tensor(data[mask_key(target)], np.bool_)
            final.update(
                {key: _tensor(data[key], np.float32) for key in informed_keys(target) if key in data}
            )
        for key in data:
            if str(key).startswith(PACKED):
                final[key] = torch.from_numpy(np.ascontiguousarray(data[key]))
        final["volume_name"] = data["volume_name"]
        final["start"] = torch.tensor([int(first) for first in data["start"]], dtype=torch.int64)
        # No tensor, which would go to the device: some devices have no float64.
        final["spacing"] = tuple(float(side) for side in data["spacing"])
        return final


def _tensor(array: Any, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


def _label_tensor(label: np.ndarray, target: str, volume: str) -> torch.Tensor:
    if label.dtype.kind == "f":
        return _tensor(label, np.float32)
    limits = np.iinfo(np.int16)
    if label.dtype.itemsize > 1 and label.size and (label.max() > limits.max or label.min() < limits.min):
        raise VolumenError(
            f"label {target!r} of {volume}",
            expected=f"class indices up to {limits.max}",
            found=int(label.max()),
            remedy=f"set targets.{target}.instances if they number instances",
        )
    return _tensor(label, np.int16)
