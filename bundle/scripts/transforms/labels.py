"""Labels as the losses read them: foreground or not, or a class index within the configured classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.transforms import Transform

from scripts.errors import VolumenError


class PrepareLabelsd(Transform):
    """Makes binary labels 0 or 1 and checks that class indices lie within the classes, negative ones nowhere.

    Args:
        classes: labelled target to its number of classes (background included) where its values are exclusive
            classes, or to None where every value but 0 means foreground.

    Raises:
        VolumenError: a voxel has a class beyond the configured ones, or a known voxel of a binary label a negative
            value: such a value is hardly ever meant as foreground.
    """

    def __init__(self, classes: Mapping[str, int | None]) -> None:
        self.classes = dict(classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for target, classes in self.classes.items():
            if classes is None:
                _refuse_negative(sample[target], sample.get(f"{target}_mask"), target, sample["volume_name"])
                sample[target] = (sample[target] != 0).view(np.uint8)
            else:
                _check(sample[target], target, classes, sample["volume_name"])
        return sample


def _refuse_negative(label: np.ndarray, known: np.ndarray | None, target: str, volume: str) -> None:
    if label.dtype.kind != "i" or not label.size or label.min() >= 0:
        return
    negative = label < 0 if known is None else (label < 0) & known
    if negative.any():
        value = int(label[negative].min())
        raise VolumenError(
            f"label {target!r} of {volume}",
            expected="0 for background and values above 0 for foreground",
            found=value,
            remedy=f"set targets.{target}.ignore_label: {value} if it means unknown",
        )


def _check(label: np.ndarray, target: str, classes: int, volume: str) -> None:
    low, high = (int(label.min()), int(label.max())) if label.size else (0, 0)
    if low < 0 or high >= classes:
        raise VolumenError(
            f"label {target!r} of {volume}",
            expected=f"classes 0 to {classes - 1}",
            found=high if high >= classes else low,
            remedy=f"set targets.{target}.ignore_label, or out_channels to the number of classes",
        )
