"""The transforms of a training patch, all in the worker, or with the work left to the training device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from monai.transforms import Compose

from volumen.transforms.deferred import RawPatch
from volumen.transforms.derive import DeriveTargetsd
from volumen.transforms.derive_batch import PackSourcesd
from volumen.transforms.finalize import CropHalod, FinalizePatchd, RestrictToLabelledd
from volumen.transforms.instances import InstancesToTargetd
from volumen.transforms.intensity import (
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandIntensityd,
    RandLowResolutiond,
    RandNoised,
)
from volumen.transforms.labels import PrepareLabelsd
from volumen.transforms.read import ReadPatchd
from volumen.transforms.spatial import RandSpatialTransformd
from volumen.utils.sample_keys import DEFERRED

_LOGGER = logging.getLogger(__name__)

DEFERRABLE = (
    CropHalod,
    DeriveTargetsd,
    FinalizePatchd,
    InstancesToTargetd,
    PackSourcesd,
    PrepareLabelsd,
    RandBlurd,
    RandBrightnessd,
    RandContrastd,
    RandGammad,
    RandLowResolutiond,
    RandNoised,
    RandSpatialTransformd,
    ReadPatchd,
    RestrictToLabelledd,
)
"""Transforms that can leave their work to the device. Subclasses do not count: they may change what is done."""


class TrainingTransforms(Compose):
    """Compose the transforms of a training patch; on request they draw and read only, and the device does the rest.

    Any other transform, such as a user's own, needs the augmented patch in the worker. With one of them in the list
    the worker does everything, and a warning names it.

    Args:
        transforms: the transforms in their order.
        on_device: leave the work to the training device, whose `PrepareBatch` has an `AugmentBatch`.
        worker_targets: labelled targets from which the worker derives others, because these cannot be derived on the
            device.
        arguments: further arguments of `Compose`.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        on_device: bool = False,
        worker_targets: Sequence[str] = (),
        **arguments: Any,
    ) -> None:
        super().__init__(transforms, **arguments)
        self.worker_targets = tuple(dict.fromkeys(worker_targets))
        foreign = [type(one).__name__ for one in self.transforms if not _is_deferrable(one)]
        if on_device and foreign:
            _LOGGER.warning(
                "tr_config.augment_on_device: %s needs augmented patches in the workers, so the workers augment them",
                ", ".join(foreign),
            )
        self.on_device = on_device and not foreign

    def __call__(self, input_: Any, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        """Transform a sample; with `on_device` its patch is a `RawPatch`."""
        if self.on_device:
            input_ = {**input_, DEFERRED: RawPatch(worker_targets=self.worker_targets)}
        return super().__call__(input_, *arguments, **options)


def _is_deferrable(transform: Any) -> bool:
    if type(transform) not in DEFERRABLE:
        return False
    if isinstance(transform, ReadPatchd):
        return transform.image_order == 1
    return not isinstance(transform, RandIntensityd) or transform.keys == ("image",)
