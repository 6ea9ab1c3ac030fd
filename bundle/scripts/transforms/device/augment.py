"""Augments a batch of raw patches on the training device: images, labels with masks, and what derivation needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from volumen.transforms.deferred import DeferredBatch, RawPatch
from volumen.transforms.derive_batch import (
    KNOWN,
    OUTSIDE,
    SPACING_KEY,
    UNKNOWN,
    DeriveBatch,
    packed_keys,
)
from volumen.transforms.device.intensity import change_intensities
from volumen.transforms.device.labels import PatchLabel, instance_part, sampled_label, truth
from volumen.transforms.device.sampling import NearestSamples, sample_image
from volumen.utils.device import sent
from volumen.utils.sample_keys import mask_key


class AugmentBatch:
    """Do what the transforms of a worker do, for the patches of a batch: the results are equal.

    Args:
        classes: as for `PrepareLabelsd`.
        instances: as for `InstancesToTargetd`.
        halo: voxels per axis by which labels extend beyond the patch on every side.
        labelled_only: restrict masks to labelled voxels, like `RestrictToLabelledd`.
        sources: labelled targets from which `DeriveBatch` derives others.
    """

    def __init__(
        self,
        classes: Mapping[str, int | None],
        instances: Mapping[str, str] | None = None,
        halo: Sequence[int] | int = 0,
        labelled_only: bool = False,
        sources: Sequence[str] = (),
    ) -> None:
        self.classes, self.instances = dict(classes), dict(instances or {})
        self.halo, self.labelled_only = halo, labelled_only
        self.sources = tuple(sources)
        distances = {name: mode for name, mode in self.instances.items() if mode == "distance"}
        self._distances = DeriveBatch(
            {name: {"type": "distance_transform", "source_target": name} for name in distances},
            halo,
            unit="voxel",
            instances=list(distances),
            labelled_only=labelled_only,
        )

    @torch.no_grad()
    def __call__(
        self, batch: DeferredBatch, device: str | torch.device
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Augment the patches of a batch, whose tensors lie on `device`.

        Returns:
            The image float32 (B, C, *patch); for every labelled target int16 or float32 (B, Ct, *patch) and its mask
            bool (B, 1, *patch), and packed entries for `DeriveBatch`; and its facts.
        """
        device = torch.device(device)
        image = torch.stack([_image(patch, device) for patch in batch.patches])
        image = change_intensities(image, [patch.stages for patch in batch.patches])
        samples = [NearestSamples(_wide(patch), patch.label_region, device) for patch in batch.patches]
        in_volume = [
            sample.within([(0, size) for size in patch.volume_shape])
            for sample, patch in zip(samples, batch.patches)
        ]
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {SPACING_KEY: [patch.spacing for patch in batch.patches]}
        for target in (*self.classes, *self.instances):
            labels = [
                self._label(target, sampled_label(patch.labels[target], sample))
                for patch, sample in zip(batch.patches, samples)
            ]
            tensors.update(self._target(target, labels, in_volume))
            if target in self.sources or self.instances.get(target) == "distance":
                packed, facts[target] = _pack(target, labels, in_volume)
                tensors.update(packed)
        tensors = {**tensors, **self._derived_distances(tensors, facts)}
        return image, tensors, facts

    def _label(self, target: str, label: PatchLabel) -> PatchLabel:
        if target in self.instances:
            return label
        return label._replace(values=truth(label.values, self.classes[target]))

    def _target(
        self, target: str, labels: Sequence[PatchLabel], in_volume: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        """Return a target's values and masks on the patch."""
        mode = self.instances.get(target)
        if mode == "distance":
            return {}
        parts = (
            labels
            if mode is None
            else [
                instance_part(label.values, label.known, inside, mode)
                for label, inside in zip(labels, in_volume)
            ]
        )
        values = [self._cropped(part.values) for part in parts]
        masks = [self._cropped(part.known) for part in parts]
        if self.labelled_only:
            labelled = [(self._cropped(label.values) > 0).any(dim=0, keepdim=True) for label in labels]
            masks = [mask & one for mask, one in zip(masks, labelled)]
        stacked = torch.stack([value if value.is_floating_point() else value.short() for value in values])
        return {target: stacked, mask_key(target): torch.stack(masks)}

    def _derived_distances(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the distances of targets whose labels number instances."""
        names = self._distances.sources
        return self._distances({key: tensors[key] for name in names for key in packed_keys(name)[:2]}, facts)

    def _cropped(self, values: Tensor) -> Tensor:
        space = values.dim() - 1
        widths = (self.halo,) * space if isinstance(self.halo, int) else tuple(self.halo)
        spans = (slice(width, size - width) for width, size in zip(widths, values.shape[1:], strict=True))
        return values[(slice(None), *spans)]


@torch.no_grad()
def both_views(batch: DeferredBatch, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Return the views of unlabelled patches as `WeakAndStrongd` makes them in a worker: each float32 (U, C, *patch).

    Args:
        batch: the patches, whose tensors lie on `device`.
        device: the training device.
    """
    image = torch.stack([_image(patch, torch.device(device)) for patch in batch.patches])
    return image, change_intensities(image.clone(), [patch.stages for patch in batch.patches])


def _image(patch: RawPatch, device: torch.device) -> Tensor:
    if patch.image is None:
        return torch.zeros((patch.channels, *patch.image_shape), device=device)
    assert patch.patch is not None
    assert patch.coefficients is not None
    image = sample_image(patch.image, patch.image_region, patch.patch)
    low, high, shift, width = (
        column.reshape(-1, *(1,) * (image.dim() - 1))
        for column in sent(patch.coefficients, device, torch.float32).unbind(dim=1)
    )
    return (image.clamp(low, high) - shift) / width


def _pack(
    target: str, labels: Sequence[PatchLabel], in_volume: Sequence[Tensor | None]
) -> tuple[dict[str, Tensor], list[bool]]:
    """Return what `PackSourcesd` packs: labels and the state of voxels; and whether any is unknown, and any outside."""
    labels_key, state_key, _ = packed_keys(target)
    states = []
    for label, inside in zip(labels, in_volume):
        state = label.known.to(torch.uint8) * (KNOWN - UNKNOWN) + UNKNOWN
        states.append(state if inside is None else state.masked_fill(~inside, OUTSIDE))
    packed = {
        labels_key: torch.stack([label.values.to(torch.int32) for label in labels]),
        state_key: torch.stack(states),
    }
    some_outside = any(inside is not None for inside in in_volume)
    return packed, [not all(label.all_known for label in labels), some_outside]


def _wide(patch: RawPatch) -> Any:
    assert patch.wide is not None
    return patch.wide
