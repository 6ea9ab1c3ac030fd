"""Choice of the precision of the forward pass, and what a network's outputs depend on beside its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from volumen.utils.errors import VolumenError

AMP_MODES = ("auto", "off", "bfloat16", "float16")


@dataclass(frozen=True)
class Machine:
    """What a network's outputs depend on beside its weights.

    Args:
        device: "cpu" or "cuda".
        name: what the device is called.
        precision: "float32", "bfloat16" or "float16".
        threads: threads that compute; on a CPU another number gives other last bits.
        versions: of the packages that compute.
    """

    device: str
    name: str
    precision: str
    threads: int
    versions: Mapping[str, str]


def describe_machine(device: torch.device, amp: str) -> Machine:
    """Return what this process computes with on a device.

    Raises:
        VolumenError: for an unknown precision.
    """
    return Machine(
        device.type, device_name(device), choose_precision(amp, device), torch.get_num_threads(), versions()
    )


def device_name(device: torch.device) -> str:
    """Return what the device is called."""
    import platform

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    import platform

    import monai
    import numpy as np
    import zarr
    from volumen.version import __version__

    return {
        "volumen": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "monai": monai.__version__,
        "numpy": np.__version__,
        "zarr": zarr.__version__,
    }


def choose_precision(mode: str, device: torch.device) -> str:
    """Return "float32", "bfloat16" or "float16" for an `--amp` mode.

    "auto" is bfloat16 where the hardware computes it (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX),
    float16 on older CUDA devices, and float32 elsewhere: bfloat16 has the range of float32, so instance
    norms of bright volumes do not overflow.

    Raises:
        VolumenError: for an unknown mode.
    """
    if mode not in AMP_MODES:
        raise VolumenError("--amp", expected=f"one of {', '.join(AMP_MODES)}", found=repr(mode))
    if mode == "off":
        return "float32"
    if mode != "auto":
        return mode
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bfloat16" if probe is not None and probe() else "float32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which the forward pass runs at a precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))
