"""Describes the machine of a prediction: device, precision, threads and package versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from volumen.utils.precision import choose_precision


@dataclass(frozen=True)
class Machine:
    """The properties of a machine on which the bits of a network's outputs depend.

    Args:
        device: "cpu" or "cuda".
        name: name of the device.
        precision: "float32", "bfloat16" or "float16".
        threads: computing threads; on a CPU their number can change the last bits.
        versions: versions of the packages that compute.
    """

    device: str
    name: str
    precision: str
    threads: int
    versions: Mapping[str, str]


def describe_machine(device: torch.device, amp: str) -> Machine:
    """Return the description of this process on a device.

    Raises:
        VolumenError: an unknown precision.
    """
    return Machine(
        device.type, device_name(device), choose_precision(amp, device), torch.get_num_threads(), versions()
    )


def device_name(device: torch.device) -> str:
    """Return the name of a device."""
    import platform

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
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
