"""Labels as the losses read them: foreground or not, or a class index within the configured classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.transforms import Transform

from scripts.errors import VolumenError


class PrepareLabelsd(Transform):
    """Makes binary labels 0 or 1 and checks that class indices lie within the classes.

    Args:
        classes: labelled target to its number of classes (background included) where its values are exclusive
            classes, or to None where every value but 0 means foreground.

    Raises:
        VolumenError: a voxel has a class beyond the configured ones.
    """

    def __init__(self, classes: Mapping[str, int | None]) -> None:
        self.classes = dict(classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for target, classes in self.classes.items():
            if classes is None:
                sample[target] = (sample[target] != 0).view(np.uint8)
            else:
                _check(sample[target], target, classes, sample["volume_name"])
        return sample


def _check(label: np.ndarray, target: str, classes: int, volume: str) -> None:
    low, high = (int(label.min()), int(label.max())) if label.size else (0, 0)
    if low < 0 or high >= classes:
        raise VolumenError(
            f"label {target!r} of {volume}",
            expected=f"classes 0 to {classes - 1}",
            found=high if high >= classes else low,
            remedy=f"set targets.{target}.ignore_label, or out_channels to the number of classes",
        )
