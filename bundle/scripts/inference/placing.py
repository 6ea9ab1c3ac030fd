"""Moves the weights of an ensemble's members to the device: all of them, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from volumen.inference.predictor import Predictor, WindowNetwork

SHARE_OF_MEMORY = 0.5
"""Share of a GPU's free memory that the weights of all members may take; the windows need the rest."""
RUN = 32
"""Number of consecutive batches of a member if its weights must be moved to the device first."""


class Placing:
    """Moves the weights of a member to the device before it predicts.

    If the weights of all members fit (see `fits`), they stay there. Otherwise each member is moved to the device for
    `run` batches and back.

    Args:
        members: the networks.
        device: device of the prediction.
        held: whether all weights stay on the device; None: true if they are there now.
    """

    def __init__(self, members: Sequence[Predictor], device: torch.device, held: bool | None = None) -> None:
        self._members, self._device = list(members), device
        self.held = all(_device_of(member) == device for member in members) if held is None else held
        self._there: int | None = None

    @property
    def run(self) -> int:
        """Number of consecutive batches of one member."""
        return 1 if self.held else RUN

    def bring(self, number: int, network: WindowNetwork) -> Callable[[np.ndarray], Any]:
        """Return a function that predicts windows with a member and moves its weights if necessary."""
        if self.held:
            return network

        def predict(windows: np.ndarray) -> Any:
            if self._there != number:
                if self._there is not None:
                    self._members[self._there].network.to("cpu")
                self._members[number].network.to(self._device)
                self._there = number
            return network(windows)

        return predict


def fits(members: Sequence[Predictor], device: torch.device) -> bool:
    """Return whether the weights of all members can stay on a device: always on a CPU.

    On a GPU they may use half of the free memory.
    """
    if device.type != "cuda":
        return True
    needed = sum(
        tensor.numel() * tensor.element_size()
        for member in members
        for tensor in (*member.network.parameters(), *member.network.buffers())
    )
    free, _ = torch.cuda.mem_get_info(device)
    return needed <= SHARE_OF_MEMORY * free


def _device_of(member: Predictor) -> torch.device:
    parameter = next(member.network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
