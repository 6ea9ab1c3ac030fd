"""The two networks that nnU-Net v2 plans, with the names of their weights, for running its checkpoints.

They follow `PlainConvUNet` and `ResidualEncoderUNet` of the package dynamic-network-architectures (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z; 2024, arXiv:2404.09556) in evaluation, where dropout and deep supervision
have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
BLOCKS_KEY = {PLAIN: "n_conv_per_stage", RESIDUAL: "n_blocks_per_stage"}
NONLINEARITIES = ("LeakyReLU", "ReLU", "GELU", "SiLU", "ELU", "Mish")
NORMS = ("InstanceNorm", "BatchNorm")
_WITHOUT_EFFECT = ("dropout_op", "dropout_op_kwargs", "deep_supervision")
_KNOWN = (
    "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", *BLOCKS_KEY.values(),
    "n_conv_per_stage_decoder", "conv_bias", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "nonlin_first",
    "stem_channels", *_WITHOUT_EFFECT,
)  # fmt: skip


class _Parts:
    """Makes layers of the dimensions and kinds that a plan states.

    Args:
        arguments: the plan's `arch_kwargs`.
        ndim: spatial dimensions.
    """

    def __init__(self, arguments: Mapping[str, Any], ndim: int) -> None:
        self.ndim = ndim
        self.bias = bool(arguments.get("conv_bias", False))
        self.norm, self.norm_options = arguments.get("norm_op"), dict(arguments.get("norm_op_kwargs") or {})
        self.nonlin, self.nonlin_options = arguments.get("nonlin"), dict(arguments.get("nonlin_kwargs") or {})
        self.nonlin_first = bool(arguments.get("nonlin_first", False))

    def convolution(
        self, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], bias: bool
    ) -> nn.Module:
        layer = nn.Conv2d if self.ndim == 2 else nn.Conv3d
        padding = tuple((size - 1) // 2 for size in kernel)
        return layer(inputs, outputs, tuple(kernel), tuple(stride), padding, bias=bias)  # type: ignore[arg-type]

    def transposed(self, inputs: int, outputs: int, stride: Sequence[int]) -> nn.Module:
        layer = nn.ConvTranspose2d if self.ndim == 2 else nn.ConvTranspose3d
        return layer(inputs, outputs, tuple(stride), tuple(stride), bias=self.bias)  # type: ignore[arg-type]

    def normalisation(self, channels: int) -> nn.Module | None:
        if self.norm is None:
            return None
        name = short_name(self.norm)[: -len("3d")] + f"{self.ndim}d"
        return getattr(nn, name)(channels, **self.norm_options)

    def nonlinearity(self) -> nn.Module | None:
        return None if self.nonlin is None else getattr(nn, short_name(self.nonlin))(**self.nonlin_options)

    def pooling(self, stride: Sequence[int]) -> nn.Module:
        layer = nn.AvgPool2d if self.ndim == 2 else nn.AvgPool3d
        return layer(tuple(stride), tuple(stride))  # type: ignore[arg-type]


class _Convolution(nn.Module):
    """A convolution with its norm and nonlinearity: ConvDropoutNormReLU."""

    def __init__(
        self, parts: _Parts, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int],
        *, nonlinear: bool = True, bias: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = parts.convolution(inputs, outputs, kernel, stride, parts.bias if bias is None else bias)
        norm, nonlin = parts.normalisation(outputs), parts.nonlinearity() if nonlinear else None
        order = [("norm", norm), ("nonlin", nonlin)]
        if parts.nonlin_first and norm is not None and nonlin is not None:
            order.reverse()
        self.after = [name for name, module in order if module is not None]
        for name, module in order:
            if module is not None:
                self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for name in self.after:
            x = getattr(self, name)(x)
        return x


def _in_a_row(
    block: Callable[..., nn.Module],
    parts: _Parts,
    count: int,
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
) -> nn.Sequential:
    """Return blocks one after the other, of which the first has the inputs and the stride."""
    one = (1,) * parts.ndim
    return nn.Sequential(
        *(block(parts, outputs if n else inputs, outputs, kernel, one if n else stride) for n in range(count))
    )


class _Stack(nn.Module):
    """Convolutions one after the other, of which the first has the stride: StackedConvBlocks."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.convs = _in_a_row(_Convolution, *arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class _ResidualBlock(nn.Module):
    """Two convolutions beside a skip of mean pooling and a 1x1 convolution where they are necessary: BasicBlockD."""

    def __init__(
        self, parts: _Parts, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        one = (1,) * parts.ndim
        self.conv1 = _Convolution(parts, inputs, outputs, kernel, stride)
        self.conv2 = _Convolution(parts, outputs, outputs, kernel, one, nonlinear=False)
        skip: list[nn.Module] = [parts.pooling(stride)] if any(step != 1 for step in stride) else []
        if inputs != outputs:
            skip.append(_Convolution(parts, inputs, outputs, one, one, nonlinear=False, bias=False))
        self.skip = nn.Sequential(*skip)
        self.nonlin2 = parts.nonlinearity() or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


class _ResidualStack(nn.Module):
    """Residual blocks, of which the first has the stride: StackedResidualBlocks."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.blocks = _in_a_row(_ResidualBlock, *arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class _Encoder(nn.Module):
    def __init__(
        self, kind: str, parts: _Parts, inputs: int, stages: list[dict[str, Any]], stem: int | None
    ) -> None:
        super().__init__()
        if kind == RESIDUAL:
            first = stages[0]
            channels = stem or first["features"]
            self.stem = _Stack(parts, 1, inputs, channels, first["kernel"], (1,) * parts.ndim)
            inputs = channels
        made: list[nn.Module] = []
        for stage in stages:
            block = _Stack if kind == PLAIN else _ResidualStack
            module = block(
                parts, stage["blocks"], inputs, stage["features"], stage["kernel"], stage["stride"]
            )
            # A plain stage is a sequence of one, which its names show.
            made.append(nn.Sequential(module) if kind == PLAIN else module)
            inputs = stage["features"]
        self.stages = nn.Sequential(*made)

    def forward(self, x: Tensor) -> list[Tensor]:
        if hasattr(self, "stem"):
            x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class _Decoder(nn.Module):
    def __init__(
        self, parts: _Parts, stages: list[dict[str, Any]], counts: Sequence[int], outputs: int
    ) -> None:
        super().__init__()
        ups: list[nn.Module] = []
        made: list[nn.Module] = []
        heads: list[nn.Module] = []
        one = (1,) * parts.ndim
        for count, below, skip in zip(counts, stages[:0:-1], stages[-2::-1], strict=True):
            features = skip["features"]
            ups.append(parts.transposed(below["features"], features, below["stride"]))
            made.append(_Stack(parts, count, 2 * features, features, skip["kernel"], one))
            heads.append(parts.convolution(features, outputs, one, one, bias=True))
        self.transpconvs, self.stages = nn.ModuleList(ups), nn.ModuleList(made)
        # The heads of lower resolutions serve deep supervision; they are there so that all weights have a place.
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, skips: list[Tensor]) -> Tensor:
        x = skips[-1]
        for up, stage, skip in zip(self.transpconvs, self.stages, skips[-2::-1], strict=True):
            x = stage(torch.cat((up(x), skip), dim=1))
        return self.seg_layers[-1](x)


class NnunetNetwork(nn.Module):
    """A U-Net as nnU-Net v2 plans it: images (B, C, *patch) to logits (B, K, *patch).

    Args:
        kind: `PlainConvUNet` or `ResidualEncoderUNet`.
        arguments: the plan's `arch_kwargs`.
        in_channels: channels of the image.
        out_channels: classes or regions.

    Raises:
        ValueError: an argument that is not supported; the message names it.
    """

    def __init__(self, kind: str, arguments: Mapping[str, Any], in_channels: int, out_channels: int) -> None:
        super().__init__()
        check_arguments(kind, arguments)
        ndim = dimensions(arguments)
        count = int(arguments["n_stages"])
        parts = _Parts(arguments, ndim)

        def each(key: str, length: int = count) -> list[int]:
            return _repeated(arguments[key], length, key)

        kernels = [_per_axis(k, ndim) for k in _repeated(arguments["kernel_sizes"], count, "kernel_sizes")]
        strides = [_per_axis(s, ndim) for s in _repeated(arguments["strides"], count, "strides")]
        stages = [
            {"features": features, "blocks": blocks, "kernel": kernel, "stride": stride}
            for features, blocks, kernel, stride in zip(
                each("features_per_stage"), each(BLOCKS_KEY[kind]), kernels, strides, strict=True
            )
        ]
        self.divisor = tuple(int(torch.tensor([s[axis] for s in strides]).prod()) for axis in range(ndim))
        self.encoder = _Encoder(kind, parts, in_channels, stages, arguments.get("stem_channels"))
        self.decoder = _Decoder(parts, stages, each("n_conv_per_stage_decoder", count - 1), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def check_arguments(kind: str, arguments: Mapping[str, Any]) -> None:
    """Refuse what is not built here.

    Raises:
        ValueError: names the network, or the argument and its value.
    """
    if kind not in BLOCKS_KEY:
        raise ValueError(f"the network {kind}")
    for key, value in arguments.items():
        if key not in _KNOWN and value not in (None, False, 0, 0.0):
            raise ValueError(f"{key}: {value} of the network {kind}")
    norm, nonlin = arguments.get("norm_op"), arguments.get("nonlin")
    if norm is not None and short_name(norm)[: -len("3d")] not in NORMS:
        raise ValueError(f"norm_op: {norm} of the network {kind}")
    if nonlin is not None and short_name(nonlin) not in NONLINEARITIES:
        raise ValueError(f"nonlin: {nonlin} of the network {kind}")
    if short_name(str(arguments.get("conv_op"))) not in ("Conv2d", "Conv3d"):
        raise ValueError(f"conv_op: {arguments.get('conv_op')} of the network {kind}")


def dimensions(arguments: Mapping[str, Any]) -> int:
    """Return the spatial dimensions of a plan's network, 2 or 3."""
    return 2 if short_name(str(arguments["conv_op"])) == "Conv2d" else 3


def short_name(path: str) -> str:
    """Return the last part of a dotted name."""
    return path.rpartition(".")[2]


def _repeated(value: Any, count: int, key: str) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{key}: {len(values)} values for {count} stages")
    return values


def _per_axis(value: Any, ndim: int) -> tuple[int, ...]:
    return tuple(int(size) for size in value) if isinstance(value, list | tuple) else (int(value),) * ndim
