"""Prepares a batch of patches with hidden blocks for a masked autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from volumen.engines.batch import prepare_batch
from volumen.losses.reconstruction import hidden_voxels
from volumen.networks.placement import memory_format
from volumen.utils.sample_keys import HIDDEN


class PrepareMaskedBatch:
    """Copy a batch to the device, and add the channel that tells the network which voxels are visible.

    Args:
        block: voxels per axis of a hidden block.
        channels_last: store the network's input with the channel axis innermost.
    """

    def __init__(self, block: Sequence[int], channels_last: bool = False) -> None:
        self.block = tuple(int(side) for side in block)
        self.channels_last = channels_last

    def __call__(
        self,
        batch: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the input of the network and what its loss reads, on the device.

        Args:
            batch: collated results of `FinalizeMaskedPatchd`.
            device: the device to copy to.
            non_blocking: do not wait for copies from pinned memory.

        Returns:
            (B, C + 1, *spatial), the image and a channel that is 1 where a voxel is visible; the other tensors by name.
        """
        image, tensors = prepare_batch(batch, device, non_blocking)
        visible = ~hidden_voxels(tensors[HIDDEN], self.block)
        joined = torch.cat((image, visible.to(image.dtype)), dim=1)
        if self.channels_last:
            joined = joined.to(memory_format=memory_format(image.ndim - 2))
        return joined, tensors
