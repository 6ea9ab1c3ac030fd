"""Chooses the number format of mixed precision that the device computes fast."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from volumen.utils.errors import VolumenError
from volumen.utils.precision import AMP_SETTINGS, choose_dtype

logger = logging.getLogger(__name__)


class AmpPolicy:
    """The number format in which the network computes, and the gradient scaler that belongs to it.

    MONAI's own `amp=True` is bound to CUDA and creates its scaler where no checkpoint can reach it, so the
    engines run with `amp=False` and use autocast and scaling from this class.

    Args:
        setting: "auto", "off", "float16" or "bfloat16". "auto" is bfloat16 on a GPU that computes in it
            (Ampere and later), float16 with gradient scaling on an older GPU, bfloat16 on a CPU with
            instructions for it (AVX512-BF16, AMX or Arm's BF16), and off on all other devices.
        device: the device that trains.

    Raises:
        VolumenError: the setting is not one of the four.
    """

    def __init__(self, setting: str = "auto", device: str | torch.device = "cpu") -> None:
        # YAML 1.1 reads a bare `off` as False.
        setting = "off" if setting is False else setting
        if setting not in AMP_SETTINGS:
            raise VolumenError(
                "tr_config.amp", expected=f"one of {', '.join(AMP_SETTINGS)}", found=repr(setting)
            )
        self.device = torch.device(device)
        self.dtype: torch.dtype | None = choose_dtype(setting, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def autocast(self) -> AbstractContextManager:
        """Return the context for the network's forward pass; it does nothing when mixed precision is off."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state; empty if gradients are not scaled."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scaler; a state from a run without scaling leaves a fresh scaler."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)

    def __repr__(self) -> str:
        name = "off" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"AmpPolicy({name} on {self.device})"
