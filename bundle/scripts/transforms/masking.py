"""Draws the blocks of a patch that an encoder does not see, and prepares the patch for pretraining."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTransform

from volumen.utils.errors import VolumenError
from volumen.utils.sample_keys import HIDDEN, RECONSTRUCTION, mask_key

FEWEST_VISIBLE = 2
"""Blocks that stay visible at least: nothing can be normalised over a single position of the last stage."""


class HideBlocksd(RandomizableTransform):
    """Hide blocks of a patch at random, the same number in every patch.

    Args:
        patch_size: voxels per axis; a multiple of the block.
        block: voxels per axis of a block.
        ratio: share of the blocks to hide, above 0 and below 1.

    Adds "hidden": bool (1, *blocks).

    Raises:
        VolumenError: the patch has too few blocks.
    """

    def __init__(self, patch_size: Sequence[int], block: Sequence[int], ratio: float) -> None:
        super().__init__(prob=1.0)
        self.grid = blocks_of(patch_size, block)
        self.count = hidden_count(math.prod(self.grid), ratio)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        hidden = np.zeros(math.prod(self.grid), bool)
        hidden[self.R.permutation(hidden.size)[: self.count]] = True
        return {**data, HIDDEN: hidden.reshape(1, *self.grid)}


def hidden_count(blocks: int, ratio: float) -> int:
    """Return how many blocks of a patch are hidden: at least one, and not the last `FEWEST_VISIBLE`."""
    return min(max(1, round(ratio * blocks)), blocks - FEWEST_VISIBLE)


def blocks_of(patch_size: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return the number of blocks per axis.

    Raises:
        VolumenError: the patch is no multiple of the block, or has fewer than `FEWEST_VISIBLE` + 1 blocks.
    """
    grid = tuple(size // side for size, side in zip(patch_size, block, strict=True))
    shown = "x".join(map(str, patch_size))
    if any(size % side for size, side in zip(patch_size, block)):
        raise VolumenError(
            "tr_config.pretrain_mask_block",
            expected=f"sides that divide the patch of {shown}",
            found="x".join(map(str, block)),
            remedy="leave it out, or change --patch-size",
        )
    if math.prod(grid) <= FEWEST_VISIBLE:
        raise VolumenError(
            "tr_config.patch_size",
            expected=f"a patch with at least {FEWEST_VISIBLE + 1} blocks of {'x'.join(map(str, block))}, of which some"
            " are hidden",
            found=shown,
            remedy="give a larger --patch-size, or fewer stages (model_config.n_stages)",
        )
    return grid


class FinalizeMaskedPatchd(RandomizableTransform):
    """Convert a patch for pretraining to plain tensors, and remove all entries that a batch cannot hold.

    Returns:
        "image" and "reconstruction" float32 (C, *patch), the same tensor; "reconstruction_mask" bool (1, *patch), True
        inside the volume; "hidden" bool (1, *blocks); "volume_name", "start" and "spacing" as `FinalizePatchd`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = torch.from_numpy(np.ascontiguousarray(data["image"], np.float32))
        inside = data.get("in_volume")
        known = torch.ones((1, *image.shape[1:]), dtype=torch.bool)
        if inside is not None:
            known = torch.from_numpy(np.ascontiguousarray(inside, np.bool_)).reshape(known.shape)
        return {
            "image": image,
            RECONSTRUCTION: image,
            mask_key(RECONSTRUCTION): known,
            HIDDEN: torch.from_numpy(np.ascontiguousarray(data[HIDDEN], np.bool_)),
            "volume_name": data["volume_name"],
            "start": torch.tensor([int(first) for first in data["start"]], dtype=torch.int64),
            "spacing": tuple(float(side) for side in data["spacing"]),
        }
