"""Runs a residual encoder on the visible part of an image alone, for masked reconstruction.

SparK (Tian et al. 2023, arXiv:2301.03580) shows that a convolutional network can learn from masked images only if
what is hidden stays hidden: an ordinary convolution moves values from the visible part into the hidden part, so after
some layers the mask has vanished, and statistics of normalisations count what is not there. Here every operation sets
the hidden positions to 0 again, and statistics are over visible positions alone. The result equals that of a
submanifold sparse convolution, with the dense kernels and the weights of the ordinary encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import ChannelSELayer, Convolution
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from volumen.networks.blocks import ResidualBlock, ResidualEncoder


def visible_features(
    encoder: ResidualEncoder, image: Tensor, visible: Tensor, *, recompute: bool = False
) -> list[Tensor]:
    """Return the features of an image whose hidden voxels do not exist for the encoder.

    Args:
        encoder: its weights are used as they are, in training or evaluation mode.
        image: (B, C, *spatial); hidden voxels may hold any value, NaN too.
        visible: bool (B, 1, *spatial), constant within blocks that are multiples of the encoder's total stride; each
            sample has the same number of visible voxels or another, but at least one block.
        recompute: store only the inputs of blocks and compute what is in them again in the backward pass.

    Returns:
        One feature map per stage, full resolution first; hidden positions are 0.
    """
    x = _shown(image, visible)
    for unit in encoder.stem:
        x = _shown(_unit(unit, x, visible), visible)
    levels: list[Tensor] = []
    for stage in encoder.stages:
        for module in stage.children():
            if isinstance(module, ResidualBlock):
                if recompute and encoder.training and torch.is_grad_enabled():
                    x, visible = checkpoint(_block, module, x, visible, use_reentrant=False)
                else:
                    x, visible = _block(module, x, visible)
            else:  # pooling
                x, visible = module(x), _at_size(visible, module(x[:1, :1]).shape[2:])
        levels.append(x)
    return levels


def check_maskable(encoder: nn.Module) -> None:
    """Refuse normalisations whose statistics cannot be restricted to visible positions here.

    Raises:
        ValueError: names the normalisation.
    """
    for module in encoder.modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError("norm_op must be instance, group, layer or batch for pretraining, got syncbatch")


def _block(block: ResidualBlock, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Run a residual block on features that are 0 at hidden positions, and return such features with their mask."""
    convolved = block.conv1.get_submodule("conv")(x)
    after = _at_size(visible, convolved.shape[2:])
    out = _unit(block.conv2, _shown(_after_convolution(block.conv1, convolved, after), after), after)
    for module in block.regularise:
        out = _excited(module, out, after) if isinstance(module, ChannelSELayer) else module(out)
    skip = x
    for module in block.skip:
        skip = _unit(module, skip, after) if isinstance(module, Convolution) else module(skip)
    return _shown(block.act(out + skip), after), after


def _unit(unit: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    """Run a convolution of stride 1 with what follows it; hidden positions of the result hold any value."""
    return _after_convolution(unit, unit.get_submodule("conv")(x), visible)


def _after_convolution(unit: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    parts = dict(unit.named_children())
    for module in parts["adn"].children() if "adn" in parts else ():
        x = _normalised(module, x, visible) if isinstance(module, nn.GroupNorm | _BatchNorm) else module(x)
    return parts["act"](x) if "act" in parts else x


def _normalised(norm: nn.GroupNorm | _BatchNorm, x: Tensor, visible: Tensor) -> Tensor:
    """Normalise by the statistics of visible positions, whatever hidden ones hold."""
    if isinstance(norm, _BatchNorm):
        return _batch_normalised(norm, x, visible)
    values, count = (
        _shown(x.float(), visible),
        visible.flatten(2).sum(2).float() * (x.shape[1] // norm.num_groups),
    )
    centred = _shown(values - _group_mean(values, norm.num_groups, count), visible)
    variance = _group_mean(centred.square(), norm.num_groups, count)
    return _affine(norm, centred, torch.rsqrt(variance + norm.eps)).to(x.dtype)


def _group_mean(x: Tensor, groups: int, count: Tensor) -> Tensor:
    """Return the mean of each group of channels, (B, C, 1, ...), from values that are 0 at hidden positions.

    Args:
        x: (B, C, *spatial).
        groups: number of groups.
        count: (B, 1), the visible values of a group.
    """
    sums = x.flatten(2).sum(2).unflatten(1, (groups, -1)).sum(2)
    means = (sums / count).repeat_interleave(x.shape[1] // groups, 1)
    return means.reshape(*means.shape, *(1,) * (x.ndim - 2))


def _batch_normalised(norm: _BatchNorm, x: Tensor, visible: Tensor) -> Tensor:
    values, axes = _shown(x.float(), visible), (0, *range(2, x.ndim))
    if norm.training or norm.running_mean is None or norm.running_var is None:
        count = visible.sum().float()
        mean = values.sum(axes) / count
        centred = _shown(values - _per_channel(mean, x), visible)
        variance = centred.square().sum(axes) / count
        if norm.training and norm.running_mean is not None and norm.running_var is not None:
            _update_running(norm, mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
    else:
        mean, variance = norm.running_mean, norm.running_var
        centred = _shown(values - _per_channel(mean, x), visible)
    return _affine(norm, centred, _per_channel(torch.rsqrt(variance + norm.eps), x)).to(x.dtype)


def _update_running(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    share = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)


def _affine(norm: nn.GroupNorm | _BatchNorm, centred: Tensor, scale: Tensor) -> Tensor:
    weight, bias = norm.weight, norm.bias
    if weight is not None:
        scale = scale * _per_channel(weight, centred)
    return centred * scale if bias is None else torch.addcmul(_per_channel(bias, centred), centred, scale)


def _excited(layer: ChannelSELayer, x: Tensor, visible: Tensor) -> Tensor:
    """Run squeeze and excitation with means over visible positions."""
    count = visible.flatten(2).sum(2).to(x.dtype)
    means = _shown(x, visible).flatten(2).sum(2) / count
    factors = layer.fc(means)
    return x * factors.reshape(*factors.shape, *(1,) * (x.ndim - 2))


def _shown(x: Tensor, visible: Tensor) -> Tensor:
    # A product with the mask would let NaN and infinity through.
    return x.masked_fill(~visible, 0.0)


def _at_size(visible: Tensor, size: Sequence[int]) -> Tensor:
    """Return the mask at the resolution of a feature map; each of its positions belongs to one block of the mask."""
    steps = [before // after for before, after in zip(visible.shape[2:], size, strict=True)]
    return visible[(slice(None), slice(None), *(slice(None, None, step) for step in steps))]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *(1,) * (x.ndim - 2))
