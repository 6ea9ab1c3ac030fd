"""Translates the names of a network's operations in the settings into MONAI's layer factories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from monai.networks.layers.factories import Act, Norm
from monai.networks.layers.utils import get_act_layer
from torch import Tensor, nn
from torch.nn import functional

from volumen.utils.suggest import closest

INSTANCE = "instance_by_device"
INSTANCE_KWARGS = {"eps": 1e-5, "affine": True}
LEAKY_KWARGS = {"negative_slope": 0.01, "inplace": True}
GROUPS = 8
GATED = ("swiglu", "glu")

NORMS = {
    "instance": "instance",
    "instancenorm": "instance",
    "batch": "batch",
    "batchnorm": "batch",
    "syncbatch": "syncbatch",
    "syncbatchnorm": "syncbatch",
    "group": "group",
    "groupnorm": "group",
    "layer": "layer",
    "layernorm": "layer",
}
# Names that differ from those of MONAI's factory, or that the factory spells differently.
ACTIVATIONS = {"leakyrelu": "leakyrelu", "silu": "swish", "swiglu": "swiglu", "glu": "glu"}


@dataclass(frozen=True)
class Operations:
    """The operations that follow every convolution of a network: normalisation, activation, dropout.

    Args:
        norm_op: "instance", "batch", "syncbatch", "group" or "layer", in short or as the class's name
            (`nn.InstanceNorm3d`), or None.
        norm_op_kwargs: arguments of the normalisation; instance: eps 1e-5 and affine.
        nonlin: "LeakyReLU", "ReLU", "SwiGLU", "GLU" or an activation of MONAI's factory, in short or as the
            class's name, or None.
        nonlin_kwargs: arguments of the activation; LeakyReLU: slope 0.01.
        dropout_op: None, a probability, "dropout" (whole channels) or the name of a class (`nn.Dropout3d`;
            `nn.Dropout` drops voxels).
        dropout_op_kwargs: {"p": probability}.
        conv_bias: whether convolutions have a bias.

    Raises:
        ValueError: for an unknown name; the message suggests the closest one.
    """

    norm_op: str | None = "instance"
    norm_op_kwargs: Mapping[str, Any] = field(default_factory=dict)
    nonlin: str | None = "LeakyReLU"
    nonlin_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dropout_op: str | float | None = None
    dropout_op_kwargs: Mapping[str, Any] = field(default_factory=dict)
    conv_bias: bool = True

    def __post_init__(self) -> None:
        self.norm(GROUPS)
        self.activation(2)
        self.dropout(3)

    def norm(self, channels: int) -> tuple[str, dict[str, Any]] | None:
        """Return MONAI's name and arguments of the normalisation for this number of channels."""
        name = norm_name(self.norm_op)
        if name is None:
            return None
        kwargs = dict(self.norm_op_kwargs)
        if name == "instance":
            return INSTANCE, {**INSTANCE_KWARGS, **kwargs}
        if name in ("group", "layer"):
            # A layer norm over channels and space is a group norm of one group, for any patch size.
            groups = 1 if name == "layer" else kwargs.pop("num_groups", GROUPS)
            return "group", {"num_groups": math.gcd(groups, channels), **kwargs}
        return name, kwargs

    def activation(self, channels: int, spatial_dims: int = 3) -> nn.Module | None:
        """Return a new activation for this number of channels."""
        name = activation_name(self.nonlin)
        if name is None:
            return None
        kwargs = dict(self.nonlin_kwargs)
        if name in GATED:
            return GatedUnit(channels, spatial_dims, gate=name)
        if name == "leakyrelu":
            kwargs = {**LEAKY_KWARGS, **kwargs}
        elif name == "relu":
            kwargs = {"inplace": True, **kwargs}
        return get_act_layer((name, kwargs))

    def dropout(self, spatial_dims: int) -> tuple[float, int] | None:
        """Return the probability and the dimensions of the dropout (1: single voxels), or None."""
        named = short_name(self.dropout_op)
        if isinstance(self.dropout_op, int | float) and not isinstance(self.dropout_op, bool):
            return (float(self.dropout_op), spatial_dims) if self.dropout_op > 0 else None
        if named is None:
            return None
        if named.rstrip("123d") != "dropout" and named != "dropout":
            raise ValueError(f"dropout_op must be a probability or a dropout's name, got {self.dropout_op!r}")
        probability = float(self.dropout_op_kwargs.get("p", 0.5))
        by_voxel = str(self.dropout_op).endswith("Dropout")
        return (probability, 1 if by_voxel else spatial_dims) if probability > 0 else None


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation, computed by the kernel that is fastest on the input's device.

    On a CPU this is PyTorch's group normalisation with one group per channel: forward and backward take about 0.6
    of the time of `nn.InstanceNorm3d`, whose output is a view that an in-place activation must copy first.
    On CUDA, autocast would run group normalisation in float32, and its variance is inexact for channels-last inputs
    (0.2 off at a mean of 100 standard deviations), so there the kernel of `nn.InstanceNorm3d` is used. The weights
    have the same names in both. Shape (B, num_features, *spatial), any number of spatial axes.

    Args:
        num_features: channels.
        eps: added to the variance.
        affine: whether each channel has a learned scale and shift.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, num_features, eps=eps, affine=affine)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda or not input.is_contiguous():
            return functional.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


Norm.add_factory_callable(INSTANCE, lambda spatial_dims: InstanceNorm)


class GatedUnit(nn.Module):
    """A gated linear unit: a 1x1 convolution to twice the channels; one half of them gates the other half.

    SwiGLU gates with SiLU, GLU with a sigmoid (Shazeer 2020, arXiv:2002.05202). Shape (B, C, *spatial).

    Args:
        channels: channels of input and output.
        spatial_dims: 2 or 3.
        gate: "swiglu" or "glu".
    """

    def __init__(self, channels: int, spatial_dims: int, gate: str) -> None:
        super().__init__()
        convolution = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.expand = convolution(channels, 2 * channels, kernel_size=1)
        self.swish = gate == "swiglu"

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=1)
        return value * (functional.silu(gate) if self.swish else functional.sigmoid(gate))


def short_name(name: object) -> str | None:
    """Return "instancenorm" for `torch.nn.InstanceNorm3d`, None for None and "none"."""
    if name is None or name is False or str(name).lower() in ("", "none", "null", "identity"):
        return None
    text = str(name).rsplit(".", 1)[-1].strip("'>").lower()
    return text[:-2] if text.endswith(("1d", "2d", "3d")) else text


def norm_name(name: object) -> str | None:
    """Return the normalisation's key in `NORMS`' values."""
    short = short_name(name)
    return None if short is None else _look_up(short, NORMS, "norm_op", name)


def activation_name(name: object) -> str | None:
    """Return the activation's name in MONAI's factory, or "swiglu" or "glu"."""
    short = short_name(name)
    names = {key.lower(): key.lower() for key in Act.names} | ACTIVATIONS
    return None if short is None else _look_up(short.replace("_", ""), names, "nonlin", name)


def _look_up(short: str, names: Mapping[str, str], key: str, given: object) -> str:
    if short in names:
        return names[short]
    meant = closest(short, names)
    hint = f", {meant}" if meant else ""
    raise ValueError(f"{key} must be one of {', '.join(sorted(set(names.values())))}, got {given!r}{hint}")
