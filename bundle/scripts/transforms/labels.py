"""Labels as the losses read them: foreground or not, or a class index within the configured classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.transforms import Transform

from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import mask_key


class PrepareLabelsd(Transform):
    """Makes binary labels 0 or 1 and checks that class indices lie within the classes, negative ones nowhere.

    Args:
        classes: labelled target to its number of classes (background included) where its values are exclusive
            classes, or to None where every value but 0 means foreground. Others stay as they are, such as
            instance numbers.

    Raises:
        VolumenError: a known voxel has a class beyond the configured ones, or, in a binary label, a negative value,
            which is hardly ever meant as foreground.
    """

    def __init__(self, classes: Mapping[str, int | None]) -> None:
        self.classes = dict(classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for target, classes in self.classes.items():
            if classes is None:
                refuse_negative(sample[target], sample.get(mask_key(target)), target, sample["volume_name"])
                sample[target] = (sample[target] != 0).view(np.uint8)
            else:
                known = sample.get(mask_key(target))
                sample[target] = _within(sample[target], known, target, classes, sample["volume_name"])
        return sample


def refuse_negative(label: np.ndarray, known: np.ndarray | None, target: str, volume: str) -> None:
    """Refuse a label with a negative value at a known voxel.

    Raises:
        VolumenError: names target, volume and value.
    """
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


def _within(
    label: np.ndarray, known: np.ndarray | None, target: str, classes: int, volume: str
) -> np.ndarray:
    """Return the label with 0 for classes that do not exist, which only unknown voxels may hold."""
    if not label.size or (label.min() >= 0 and label.max() < classes):
        return label
    foreign = (label < 0) | (label >= classes)
    told = label[foreign if known is None else foreign & known]
    if told.size:
        low, high = int(told.min()), int(told.max())
        raise VolumenError(
            f"label {target!r} of {volume}",
            expected=f"classes 0 to {classes - 1}",
            found=high if high >= classes else low,
            remedy=f"set targets.{target}.ignore_label, or out_channels to the number of classes",
        )
    return np.where(foreign, np.zeros((), dtype=label.dtype), label)
