"""Places a network on a device, wraps it for training, and unwraps it."""

from __future__ import annotations

from typing import Any

import torch

from volumen.networks.recompute import recompute_activations
from volumen.utils.compilation import compile_arguments, compiling
from volumen.utils.distributed import is_distributed


def prepare_network(
    network: torch.nn.Module,
    device: str | torch.device = "cpu",
    *,
    channels_last: bool = False,
    compile: bool | str = False,
    compile_kwargs: dict[str, Any] | None = None,
    find_unused_parameters: bool = False,
    activation_checkpointing: bool = False,
) -> torch.nn.Module:
    """Move a network to its device and wrap it as the settings require.

    Args:
        network: the network; its parameters move in place.
        device: the device of the training.
        channels_last: store convolution weights with the channel axis innermost in memory, which is faster on tensor
            cores and with oneDNN. `prepare_batch` must then do the same for the images.
        compile: compile with `torch.compile`; also a name of `COMPILE_MODES`.
        compile_kwargs: more of its arguments.
        find_unused_parameters: for several processes, if a step leaves out some heads.
        activation_checkpointing: see `recompute_activations`.

    Returns:
        The network, inside `DistributedDataParallel` when there are several processes, and compiled if required.

    Raises:
        VolumenError: it shall be compiled and there is no compiler, or its activations cannot be recomputed.
    """
    device = torch.device(device)
    if activation_checkpointing:
        recompute_activations(network)
    network = network.to(device)
    if channels_last:
        network = network.to(memory_format=memory_format(spatial_dims(network)))  # type: ignore[call-overload]
    if is_distributed():
        network = torch.nn.parallel.DistributedDataParallel(
            network,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=find_unused_parameters,
            # Gradients lie in the buffers that are exchanged while the backward pass still runs, and are not copied.
            gradient_as_bucket_view=True,
        )
    if compile:
        arguments = compile_arguments(compile, **(compile_kwargs or {}))
        # The compiler runs at the first step; here a missing one is found.
        with compiling("tr_config.compile", device):
            network = torch.compile(network, **arguments)  # type: ignore[assignment]
    return network


def unwrap(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network without the wrappers that would add a prefix to the names in its state."""
    while True:
        if isinstance(network, torch.nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), torch.nn.Module):
            network = network._orig_mod  # type: ignore[assignment]
        else:
            return network


def local_network(network: torch.nn.Module) -> torch.nn.Module:
    """Return the network for passes that not every process runs, such as those of a divided validation.

    `DistributedDataParallel` may exchange buffers in a forward pass and would then wait for the other processes.
    """
    inner = unwrap(network)
    wrapped = network._orig_mod if hasattr(network, "_orig_mod") else network
    return inner if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) else network


def spatial_dims(network: torch.nn.Module) -> int:
    """Return 2 or 3, from the first weight of a convolution."""
    for parameter in network.parameters():
        if parameter.ndim in (4, 5):
            return parameter.ndim - 2
    raise ValueError("the network has no convolution, so it has no number of spatial axes")


def memory_format(spatial: int) -> torch.memory_format:
    """Return the memory format with the channel axis innermost for 2 or 3 spatial axes."""
    return torch.channels_last if spatial == 2 else torch.channels_last_3d
