"""nnU-Net's residual-encoder U-Net in plain torch, as a reference of equal size where its package is not installed.

Source: `ResidualEncoderUNet` of dynamic-network-architectures (MIC-DKFZ, Apache-2.0), with the arguments of nnU-Net
v2's planner: a stem convolution, residual blocks of two convolutions with instance normalisation and leaky ReLU, a
strided first block per stage with average pooling and a 1x1x1 convolution in its skip, and a decoder of a transposed
convolution and one convolution per stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _norm_act(features: int, active: bool = True) -> list[nn.Module]:
    norm = nn.InstanceNorm3d(features, eps=1e-5, affine=True)
    return [norm, nn.LeakyReLU(inplace=True)] if active else [norm]


class ResidualBlock(nn.Module):
    """Two convolutions and a skip; the skip is pooled by the stride and projected if the channels change."""

    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(inputs, features, 3, stride, 1),
            *_norm_act(features),
            nn.Conv3d(features, features, 3, 1, 1),
            *_norm_act(features, active=False),
        )
        skip: list[nn.Module] = [nn.AvgPool3d(stride, stride)] if stride > 1 else []
        if inputs != features:
            skip += [nn.Conv3d(inputs, features, 1, bias=False), *_norm_act(features, active=False)]
        self.skip = nn.Sequential(*skip)
        self.last = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.skip(x))


class PlainResidualUNet(nn.Module):
    """The U-Net: (B, C, Z, Y, X) to logits (B, classes, Z, Y, X).

    Args:
        in_channels: image channels.
        classes: output channels.
        features: channels per stage.
        strides: per stage.
        blocks: residual blocks per stage of the encoder.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        features: Sequence[int],
        strides: Sequence[int],
        blocks: Sequence[int],
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(in_channels, features[0], 3, 1, 1), *_norm_act(features[0]))
        inputs, stages = features[0], []
        for count, stride, number in zip(features, strides, blocks, strict=True):
            first = ResidualBlock(inputs, count, stride)
            stages.append(nn.Sequential(first, *(ResidualBlock(count, count, 1) for _ in range(number - 1))))
            inputs = count
        self.stages = nn.ModuleList(stages)
        self.up, self.decode = nn.ModuleList(), nn.ModuleList()
        for below, here, stride in zip(features[:0:-1], features[-2::-1], strides[:0:-1]):
            self.up.append(nn.ConvTranspose3d(below, here, stride, stride))
            self.decode.append(nn.Sequential(nn.Conv3d(2 * here, here, 3, 1, 1), *_norm_act(here)))
        self.head = nn.Conv3d(features[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        for up, decode, skip in zip(self.up, self.decode, skips[-2::-1]):
            x = decode(torch.cat([up(x), skip], dim=1))
        return self.head(x)
