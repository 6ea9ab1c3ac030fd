"""The loss of masked reconstruction: squared error on hidden voxels against blocks normalised one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from volumen.utils.sample_keys import HIDDEN, RECONSTRUCTION, mask_key

EPSILON = 1e-6
"""Added to a block's variance, as He et al. 2022 (arXiv:2111.06377, their code) do."""


class MaskedReconstructionLoss(nn.Module):
    """Mean squared error over the voxels that are hidden and inside the volume.

    The target of a voxel is its value minus the mean of its block and channel, divided by the block's standard
    deviation (He et al. 2022, arXiv:2111.06377, section 4.1: "per-patch normalisation"; SparK uses it too). Mean and
    variance are over the block's voxels inside the volume. The mean of the loss is over all counted voxels and
    channels of the batch; a batch without one has the loss 0.

    Args:
        block: voxels per axis of a block; the image's size is a multiple of it.
    """

    def __init__(self, block: Sequence[int]) -> None:
        super().__init__()
        self.block = tuple(int(size) for size in block)
        #: Value of the last call by the name of its target, for logs.
        self.components: dict[str, Tensor] = {}

    def forward(self, predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch.

        Args:
            predictions: "reconstruction": (B, C, *spatial).
            batch: "reconstruction": the image (B, C, *spatial); "reconstruction_mask": bool (B, 1, *spatial), inside
                the volume; "hidden": bool (B, 1, *blocks).
        """
        image, inside = batch[RECONSTRUCTION], batch[mask_key(RECONSTRUCTION)]
        counted = inside & hidden_voxels(batch[HIDDEN], self.block)
        target = normalised_blocks(image, inside, self.block)[0]
        error = (predictions[RECONSTRUCTION].float() - target).square()
        total = error.masked_fill(~counted, 0.0).sum()
        loss = total / (counted.sum() * image.shape[1]).clamp(min=1)
        self.components = {RECONSTRUCTION: loss.detach()}
        return loss


def hidden_voxels(hidden: Tensor, block: Sequence[int]) -> Tensor:
    """Return which voxels are hidden, (B, 1, *spatial), from which blocks are, (B, 1, *blocks)."""
    for axis, size in enumerate(block):
        hidden = hidden.repeat_interleave(int(size), dim=axis + 2)
    return hidden


def normalised_blocks(image: Tensor, inside: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image whose blocks have mean 0 and standard deviation 1, and what turns it back.

    Args:
        image: (B, C, *spatial).
        inside: bool (B, 1, *spatial), the voxels over which mean and standard deviation are computed. A block without
            one has mean 0 and standard deviation 1.
        block: voxels per axis of a block.

    Returns:
        The normalised image, and the mean and the standard deviation of each voxel's block: `image = normalised *
        deviation + mean`. All are float32 (B, C, *spatial).
    """
    shown, values = inside.float(), image.float().masked_fill(~inside, 0.0)
    count = _block_sums(shown, block)
    mean = _spread(_block_sums(values, block) / count.clamp(min=1), block)
    centred = (values - mean).masked_fill(~inside, 0.0)
    variance = _block_sums(centred.square(), block) / count.clamp(min=1)
    deviation = _spread(torch.where(count > 0, (variance + EPSILON).sqrt(), 1.0), block)
    return (image.float() - mean) / deviation, mean, deviation


def _block_sums(values: Tensor, block: Sequence[int]) -> Tensor:
    pool = functional.avg_pool3d if len(block) == 3 else functional.avg_pool2d
    return pool(values, tuple(block)) * math.prod(block)


def _spread(values: Tensor, block: Sequence[int]) -> Tensor:
    return hidden_voxels(values, block)
