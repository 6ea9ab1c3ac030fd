"""Prepares a collated batch for the network and the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from monai.data import MetaTensor

from volumen.networks.placement import memory_format
from volumen.transforms.device.augment import both_views
from volumen.utils.sample_keys import DEFERRED, RAW_VIEWS, STRONG, WEAK

if TYPE_CHECKING:
    from volumen.transforms.derive_batch import DeriveBatch
    from volumen.transforms.device.augment import AugmentBatch

IMAGE = "image"


def prepare_batch(
    batch: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    *,
    channels_last: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Split a batch into the image and all tensors that losses use, and copy them to the device.

    Args:
        batch: "image" (B, C, *spatial), and per target its values (B, Ct, *spatial) and "<target>_mask"
            (B, 1, *spatial). Entries that are not tensors (names) stay in `engine.state.batch`.
        device: the device to copy to.
        non_blocking: do not wait for copies from pinned memory.
        channels_last: store the image with the channel axis innermost.

    Returns:
        The image (B, C, *spatial), and the targets and masks by name.
    """
    tensors = {
        key: _plain(value).to(device, non_blocking=non_blocking)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    image = tensors.pop(IMAGE)
    return _ordered(image, channels_last), tensors


class PrepareBatch:
    """Run `prepare_batch`, augment raw patches on the device, then derive targets there.

    Args:
        channels_last: store the image with the channel axis innermost.
        derive: derives targets from packed labels; None if the workers derive all targets.
        augment: augments the batches whose patches the workers only read; None if there are none.
    """

    def __init__(
        self,
        channels_last: bool = False,
        derive: DeriveBatch | None = None,
        augment: AugmentBatch | None = None,
    ) -> None:
        self.channels_last = channels_last
        self.derive, self.augment = derive, augment

    def __call__(
        self,
        batch: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return image and targets on the device; see `prepare_batch`."""
        image, targets = self._labelled(batch, device, non_blocking)
        if RAW_VIEWS in batch:
            weak, strong = both_views(batch[RAW_VIEWS].to(image.device, non_blocking), image.device)
            targets = {**targets, WEAK: weak, STRONG: strong}
        if self.channels_last:
            targets = {
                **targets,
                **{key: _ordered(targets[key], True) for key in (WEAK, STRONG) if key in targets},
            }
        return image, targets

    def _labelled(
        self, batch: Mapping[str, Any], device: str | torch.device | None, non_blocking: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if DEFERRED in batch:
            return self._augmented(batch, torch.device(device or "cpu"), non_blocking)
        image, tensors = prepare_batch(batch, device, non_blocking, channels_last=self.channels_last)
        return image, tensors if self.derive is None else self.derive(tensors, self.derive.host_facts(batch))

    def _augmented(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert self.augment is not None, "the workers read raw patches only if the device augments them"
        image, tensors, facts = self.augment(batch[DEFERRED].to(device, non_blocking), device)
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                tensors[key] = _plain(value).to(device, non_blocking=non_blocking)
        image = _ordered(image, self.channels_last)
        return image, tensors if self.derive is None else self.derive(tensors, facts)


def _ordered(image: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return image.to(memory_format=memory_format(image.ndim - 2)) if channels_last else image


def _plain(value: torch.Tensor) -> torch.Tensor:
    # A MetaTensor makes each operation ten times as expensive to launch.
    return value.as_tensor() if isinstance(value, MetaTensor) else value
