"""Recomputes feature maps in the backward pass instead of storing them: less memory for a second forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from volumen.networks.blocks import Decoder, ResidualBlock, ResidualEncoder
from volumen.networks.masked_autoencoder import MaskedAutoencoder
from volumen.utils.errors import VolumenError


def recomputed_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules of which only the inputs are stored: stem, residual blocks, and the stages of decoders."""
    found: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, ResidualEncoder):
            found.append(module.stem)
        elif isinstance(module, ResidualBlock):
            found.append(module)
        elif isinstance(module, Decoder):
            found += [*module.up, *module.stages]
    return found


def recompute_activations(network: nn.Module) -> None:
    """Let a network recompute the feature maps within its blocks in the backward pass; its values do not change.

    Args:
        network: changed in place; its parameters and their names stay the same. Only training is affected.

    Raises:
        VolumenError: the network has no such blocks, or batch normalisation, whose statistics a second forward pass
            would change again.
    """
    modules = recomputed_modules(network)
    if not modules:
        raise VolumenError(
            "tr_config.activation_checkpointing",
            expected="a network of residual blocks, such as MultiHeadDynUNet",
            found=type(network).__name__,
            remedy="set it to false",
        )
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise VolumenError(
            "tr_config.activation_checkpointing",
            expected="a normalisation without running statistics, such as instance",
            found="batch normalisation",
            remedy="set it to false, or choose another model_config.norm_op",
        )
    for module in network.modules():
        if isinstance(module, MaskedAutoencoder):
            module.recomputes = True
        elif isinstance(module, Decoder):
            module.forward = partial(_decoded, module)  # type: ignore[method-assign]
        elif isinstance(module, ResidualBlock):
            module.forward = partial(_recomputed, module)  # type: ignore[method-assign]
        elif isinstance(module, ResidualEncoder):
            module.stem.forward = partial(_recomputed, module.stem)  # type: ignore[method-assign]


def _recomputed(module: nn.Module, *inputs: Tensor) -> Any:
    forward = partial(type(module).forward, module)
    if module.training and torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)


def _decoded(decoder: Decoder, skips: list[Tensor]) -> list[Tensor]:
    """Do what `Decoder.forward` does; of a stage only its output is stored, not what is concatenated for it."""
    if not (decoder.training and torch.is_grad_enabled()) or len(skips) == 1:
        return Decoder.forward(decoder, skips)

    def level(up: nn.Module, stage: nn.Module, below: Tensor, skip: Tensor) -> Tensor:
        return stage(torch.cat((up(below), skip), dim=1))

    out = [skips[-1]]
    for up, stage, skip in zip(decoder.up, decoder.stages, skips[-2::-1], strict=True):
        out.insert(0, checkpoint(partial(level, up, stage), out[0], skip, use_reentrant=False))
    return out[:-1]
