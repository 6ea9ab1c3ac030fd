"""Prepares labels for the losses: foreground or background, or a class index within the configured classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import Transform

from volumen.data.validity import binary_truth, class_truth
from volumen.utils.sample_keys import mask_key


class PrepareLabelsd(Transform):
    """Convert binary labels to 0 or 1, and check that class indices lie within the classes and are not negative.

    Args:
        classes: labelled target to its number of classes (including the background) if its values are exclusive
            classes, or to None if every value except 0 means foreground. Other labels are not changed, such as
            instance numbers.

    Raises:
        VolumenError: a valid voxel has a class beyond the configured ones, or, in a binary label, a negative value,
            which hardly ever means foreground.
    """

    def __init__(self, classes: Mapping[str, int | None]) -> None:
        self.classes = dict(classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for target, classes in self.classes.items():
            valid, volume = sample.get(mask_key(target)), sample["volume_name"]
            if classes is None:
                sample[target] = binary_truth(sample[target], valid, target, volume)
            else:
                sample[target] = class_truth(sample[target], valid, target, classes, volume)
        return sample
