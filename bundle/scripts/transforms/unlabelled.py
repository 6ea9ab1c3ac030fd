"""Makes the two views of an unlabelled patch: one for a teacher, and one with changed intensities for its student."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose

from volumen.transforms.deferred import RawPatch
from volumen.transforms.intensity import RandIntensityd
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd
from volumen.utils.sample_keys import DEFERRED, RAW_VIEWS, STRONG, WEAK


class WeakAndStrongd(Compose):
    """Read an unlabelled patch once, with one spatial transform for both views, and change the intensities of one.

    Both views lie on the same grid, so predictions of them are compared voxel by voxel, exactly, and components of
    vectors and tensors need no turning.

    Args:
        spatial: draws the flips, quarter turns, rotation and scaling; None: none.
        read: reads the image; without targets.
        intensity: the changes of the second view, in their order.
        on_device: leave the work to the training device, as `TrainingTransforms` does.

    Returns:
        `WEAK` and `STRONG`: float32 (C, *patch); or `RAW_VIEWS`, a `RawPatch` with what was drawn.
    """

    def __init__(
        self,
        read: ReadPatchd,
        intensity: Sequence[RandIntensityd],
        spatial: RandSpatialTransformd | None = None,
        on_device: bool = False,
    ) -> None:
        super().__init__([*([] if spatial is None else [spatial]), read, *intensity])
        self.spatial, self.read, self.intensity = spatial, read, tuple(intensity)
        self.on_device = on_device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:  # type: ignore[override]
        sample: dict[Hashable, Any] = dict(data)
        if self.on_device:
            sample[DEFERRED] = RawPatch()
        if self.spatial is not None:
            sample = self.spatial(sample)
        sample = self.read(sample)
        weak = sample.get("image")
        for change in self.intensity:
            sample = change(sample)
        if self.on_device:
            return {RAW_VIEWS: sample[DEFERRED]}
        return {key: _tensor(image) for key, image in ((WEAK, weak), (STRONG, sample["image"]))}


def _tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
