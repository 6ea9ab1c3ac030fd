"""From a collated batch to what the network and the losses take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.data import MetaTensor

from scripts.engines.network import memory_format

IMAGE = "image"


def prepare_batch(
    batch: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    *,
    channels_last: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Split a batch into the image and everything that losses look at, on the device.

    Args:
        batch: "image" (B, C, *spatial), and per target its values (B, Ct, *spatial) and "<target>_mask"
            (B, 1, *spatial). What is not a tensor (names) stays in `engine.state.batch`.
        device: where to.
        non_blocking: do not wait for copies from pinned memory.
        channels_last: lay the image out with the channel axis innermost.

    Returns:
        The image (B, C, *spatial), and the targets and masks by name.
    """
    tensors = {
        key: _plain(value).to(device, non_blocking=non_blocking)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    image = tensors.pop(IMAGE)
    if channels_last:
        image = image.to(memory_format=memory_format(image.ndim - 2))
    return image, tensors


def _plain(value: torch.Tensor) -> torch.Tensor:
    # A MetaTensor makes each operation ten times as expensive to launch.
    return value.as_tensor() if isinstance(value, MetaTensor) else value
