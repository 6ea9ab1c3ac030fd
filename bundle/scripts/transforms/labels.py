"""Labels as the losses read them: foreground or not, or a class index within the configured classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import Transform

from volumen.data.validity import binary_truth, class_truth
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
            known, volume = sample.get(mask_key(target)), sample["volume_name"]
            if classes is None:
                sample[target] = binary_truth(sample[target], known, target, volume)
            else:
                sample[target] = class_truth(sample[target], known, target, classes, volume)
        return sample
