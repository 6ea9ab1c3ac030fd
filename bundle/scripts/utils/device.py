"""Chooses the device on which the network runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from volumen.utils.errors import VolumenError

READ_EVERY = 20
"""Steps on a GPU between two reads of losses and of the flags of losses that are not finite."""


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this name; `auto` is CUDA if it is available, else the CPU.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N` or any other device of torch.

    Raises:
        VolumenError: the name is not a device, or the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise VolumenError("--device", expected="auto, cpu, cuda or cuda:N", found=repr(name)) from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise VolumenError("--device", "no CUDA device on this machine", remedy="use --device cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise VolumenError(
            "--device",
            expected="cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}",
            found=repr(name),
            remedy="give a GPU of this machine, or use --device cpu",
        )
    return device


def time_convolutions(device: torch.device, deterministic: bool) -> None:
    """Let cuDNN measure its algorithms at the first patch of each shape and use the fastest, unless `deterministic`.

    With patches of one size this saves time, as in nnU-Net. The fastest algorithm may differ from run to
    run, and with it the last bits of the sums.

    Args:
        device: the device of the training; nothing changes unless it is a CUDA device.
        deterministic: whether two runs must have bit-identical results.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on a device, without waiting for the copy: a plain copy to a GPU synchronises.

    Args:
        values: a sequence of numbers, or an array.
        device: where the tensor shall lie.
        dtype: its type; None: that of the values.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
