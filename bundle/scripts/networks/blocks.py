"""Building blocks of the residual U-Net, built from MONAI's convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import ChannelSELayer, Convolution
from monai.networks.blocks.dynunet_block import get_conv_layer
from monai.networks.layers.drop_path import DropPath
from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from volumen.networks.operations import Operations


def conv_unit(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int] | int,
    stride: Sequence[int] | int,
    operations: Operations,
    *,
    activate: bool = True,
    drop: bool = True,
    bias: bool | None = None,
) -> Convolution:
    """Return convolution, dropout, normalisation and activation, in this order, padded to keep the size."""
    dropout = operations.dropout(spatial_dims) if drop else None
    unit = Convolution(
        spatial_dims,
        in_channels,
        out_channels,
        strides=stride,
        kernel_size=kernel_size,
        adn_ordering="DN",
        act=None,
        norm=operations.norm(out_channels),
        dropout=dropout[0] if dropout else None,
        dropout_dim=dropout[1] if dropout else 1,
        bias=operations.conv_bias if bias is None else bias,
    )
    activation = operations.activation(out_channels, spatial_dims) if activate else None
    if activation is not None:
        unit.add_module("act", activation)
    return unit


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection; the "D" form of He et al. 2019 (arXiv:1812.01187).

    The skip is average pooling if there is a stride, followed by a 1x1 convolution if the channels change.
    Shape (B, in_channels, *spatial) to (B, out_channels, *(spatial / stride)).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of both convolutions, per axis.
        stride: of the first convolution, per axis.
        operations: normalisation, activation, dropout.
        stochastic_depth_p: probability that a sample skips the two convolutions in training.
        squeeze_excitation_ratio: width of the squeeze-and-excitation's hidden layer as a fraction of the
            channels; None omits it.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        operations: Operations,
        *,
        stochastic_depth_p: float = 0.0,
        squeeze_excitation_ratio: float | None = None,
    ) -> None:
        super().__init__()
        channels = (spatial_dims, in_channels, out_channels)
        self.conv1 = conv_unit(*channels, kernel_size, stride, operations)
        self.conv2 = conv_unit(
            spatial_dims, out_channels, out_channels, kernel_size, 1, operations, activate=False, drop=False
        )
        self.skip = nn.Sequential()
        if any(step != 1 for step in stride):
            self.skip.append(Pool[Pool.AVG, spatial_dims](kernel_size=tuple(stride), stride=tuple(stride)))
        if in_channels != out_channels:
            projection = conv_unit(*channels, 1, 1, operations, activate=False, drop=False, bias=False)
            self.skip.append(projection)
        self.regularise = nn.Sequential()
        if stochastic_depth_p > 0:
            self.regularise.append(DropPath(stochastic_depth_p))
        if squeeze_excitation_ratio is not None:
            hidden = max(1, round(out_channels * squeeze_excitation_ratio))
            self.regularise.append(ChannelSELayer(spatial_dims, out_channels, r=out_channels // hidden))
        self.act = operations.activation(out_channels, spatial_dims) or nn.Identity()
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        for name, weight in self.conv2.named_parameters():
            if name == "adn.N.weight":
                nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.regularise(self.conv2(self.conv1(x)))
        return self.act(out + self.skip(x))


class ResidualEncoder(nn.Module):
    """A stem and stages of residual blocks; (B, in_channels, *spatial) to one feature map per stage.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        features: channels of each stage.
        strides: stride at the start of each stage, per axis.
        kernel_sizes: kernel of each stage, per axis.
        blocks: residual blocks of each stage.
        operations: normalisation, activation, dropout.
        stem_channels: channels of the first convolution; None omits the stem.
        pool_type: downsampling at the start of a stage: "conv" (strided), "avg" or "max".
        stochastic_depth_p: see `ResidualBlock`.
        squeeze_excitation_ratio: see `ResidualBlock`.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        blocks: Sequence[int],
        operations: Operations,
        *,
        stem_channels: int | None,
        pool_type: str = "conv",
        stochastic_depth_p: float = 0.0,
        squeeze_excitation_ratio: float | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        channels = in_channels
        if stem_channels is not None:
            self.stem.append(conv_unit(spatial_dims, channels, stem_channels, kernel_sizes[0], 1, operations))
            channels = stem_channels
        self.stages = nn.ModuleList()
        for width, stride, kernel, count in zip(features, strides, kernel_sizes, blocks):
            stage = nn.Sequential()
            step = tuple(stride)
            if pool_type != "conv" and any(size != 1 for size in step):
                kind = Pool.AVG if pool_type == "avg" else Pool.MAX
                stage.append(Pool[kind, spatial_dims](kernel_size=step, stride=step))
                step = (1,) * spatial_dims
            for _ in range(count):
                block = ResidualBlock(
                    spatial_dims,
                    channels,
                    width,
                    tuple(kernel),
                    step,
                    operations,
                    stochastic_depth_p=stochastic_depth_p,
                    squeeze_excitation_ratio=squeeze_excitation_ratio,
                )
                stage.append(block)
                channels, step = width, (1,) * spatial_dims
            self.stages.append(stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        skips: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class Decoder(nn.Module):
    """Transposed convolutions that upsample; each output is concatenated with the encoder's features of that size.

    Args:
        spatial_dims: 2 or 3.
        features: channels of each encoder stage, full resolution first.
        strides: as the encoder's.
        kernel_sizes: as the encoder's.
        convolutions: convolutions of each decoder stage, lowest resolution first.
        operations: normalisation, activation, dropout.
    """

    def __init__(
        self,
        spatial_dims: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        convolutions: Sequence[int],
        operations: Operations,
    ) -> None:
        super().__init__()
        self.up = nn.ModuleList()
        self.stages = nn.ModuleList()
        for step, count in enumerate(convolutions):
            level = len(features) - 1 - step
            below, width, stride = features[level], features[level - 1], tuple(strides[level])
            up = get_conv_layer(
                spatial_dims,
                below,
                width,
                kernel_size=stride,
                stride=stride,
                bias=operations.conv_bias,
                is_transposed=True,
            )
            self.up.append(up)
            stage = nn.Sequential()
            for index in range(count):
                channels = 2 * width if index == 0 else width
                kernel = tuple(kernel_sizes[level - 1])
                stage.append(conv_unit(spatial_dims, channels, width, kernel, 1, operations))
            self.stages.append(stage)

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Return the features of every decoder stage, full resolution first."""
        x = skips[-1]
        out: list[Tensor] = [x] if len(skips) == 1 else []
        for index, (up, stage) in enumerate(zip(self.up, self.stages)):
            x = stage(torch.cat((up(x), skips[-(index + 2)]), dim=1))
            out.insert(0, x)
        return out


class Pointwise2d(nn.Conv2d):
    """A 1x1 convolution whose gradient on a CPU is a matrix product, which takes about a third of the time.

    Outside training it is the plain convolution, also in exports.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.device.type == "cpu" and input.is_contiguous():
            return _product(input, self.weight, self.bias)
        return self._conv_forward(input, self.weight, self.bias)


class Pointwise3d(nn.Conv3d):
    """See `Pointwise2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.device.type == "cpu" and input.is_contiguous():
            return _product(input, self.weight, self.bias)
        return self._conv_forward(input, self.weight, self.bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    matrix = weight.flatten(1).expand(input.shape[0], -1, -1)
    return torch.baddbmm(bias[None, :, None], matrix, input.flatten(2)).unflatten(2, input.shape[2:])


class Head(nn.Module):
    """A 1x1 convolution from a decoder's features to a target's logits, and one for each coarser level.

    Args:
        spatial_dims: 2 or 3.
        features: channels of the decoder's levels that have logits, full resolution first. Levels that are
            not supervised must be left out: weights without a gradient break distributed training.
        out_channels: channels of the target.
    """

    def __init__(self, spatial_dims: int, features: Sequence[int], out_channels: int) -> None:
        super().__init__()
        convolution = Pointwise3d if spatial_dims == 3 else Pointwise2d
        self.finest = convolution(features[0], out_channels, kernel_size=1)
        self.coarser = nn.ModuleList(
            convolution(width, out_channels, kernel_size=1) for width in features[1:]
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return the logits at full resolution, (B, out_channels, *spatial)."""
        return self.finest(features[0])

    def at_all_levels(self, features: list[Tensor]) -> list[Tensor]:
        """Return the logits of every level, full resolution first."""
        coarser = [convolution(level) for convolution, level in zip(self.coarser, features[1:])]
        return [self.finest(features[0]), *coarser]
