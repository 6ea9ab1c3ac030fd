"""Chooses the number format in which a network computes, for training and prediction."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch

from volumen.utils.errors import VolumenError

AMP_SETTINGS = ("auto", "off", "float16", "bfloat16")


def choose_dtype(setting: str, device: torch.device) -> torch.dtype | None:
    """Return the number format of a setting on a device; None is full float32.

    "auto" is bfloat16 if the hardware computes in it (CUDA from Ampere on, CPUs with AVX512-BF16, AMX or Arm's
    BF16), float16 on older CUDA devices, and float32 on all others. bfloat16 has the range of float32, so instance
    norms of bright volumes do not overflow.

    Args:
        setting: "auto", "off", "float16" or "bfloat16".
        device: the device on which the network runs.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return {"float16": torch.float16, "bfloat16": torch.bfloat16}[setting]
    if device.type == "cuda":
        # `is_bf16_supported()` is also true if bfloat16 is only emulated, so the compute capability is checked.
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and cpu_computes_bfloat16():
        return torch.bfloat16
    return None


def choose_precision(setting: str, device: torch.device) -> str:
    """Return the same decision as "float32", "bfloat16" or "float16".

    Raises:
        VolumenError: the setting is not one of the four.
    """
    if setting not in AMP_SETTINGS:
        raise VolumenError("--amp", expected=f"one of {', '.join(AMP_SETTINGS)}", found=repr(setting))
    return str(choose_dtype(setting, device) or torch.float32).removeprefix("torch.")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which the forward pass runs at a precision ("float32", "bfloat16" or "float16")."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


@functools.cache
def cpu_computes_bfloat16() -> bool:
    """Return whether this processor has instructions for bfloat16; emulated bfloat16 is slower than float32."""
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
