"""Prepares labels for the losses: foreground or background, or a class index within the configured classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import Transform

from volumen.data.validity import binary_truth, class_truth, refuse_negative
from volumen.transforms.deferred import RawPatch
from volumen.utils.sample_keys import DEFERRED, mask_key


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
        if DEFERRED in sample:
            self._check_raw(sample[DEFERRED], sample["volume_name"])
        for target, classes in self.classes.items():
            if DEFERRED in sample and target not in sample:
                continue
            valid, volume = sample.get(mask_key(target)), sample["volume_name"]
            if classes is None:
                sample[target] = binary_truth(sample[target], valid, target, volume)
            else:
                sample[target] = class_truth(sample[target], valid, target, classes, volume)
        return sample

    def _check_raw(self, patch: RawPatch, volume: str) -> None:
        """Check the stored voxels of a patch, whose labels the training device converts."""
        for target, classes in self.classes.items():
            raw = patch.labels[target]
            if raw.lies_within(0, None if classes is None else classes - 1):
                continue
            values, known = raw.for_checks()
            if classes is None:
                refuse_negative(values, known, target, volume)
            else:
                class_truth(values, known, target, classes, volume)
