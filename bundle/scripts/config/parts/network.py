"""The section `model_config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from volumen.config.parts.common import STRICT_KEYS
from volumen.config.value_types import Positive, Share


@dataclass(frozen=True)
class ModelConfig:
    """`model_config`: the network. What is null is planned from patch size and spacing."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    in_channels: Annotated[
        Positive | None, Field(description="Image channels; null: from the data, else 1.")
    ] = None
    targets: Annotated[
        dict[str, Any],
        Field(description="Targets; the same as `dataset_config.targets`, either place serves."),
    ] = field(default_factory=dict)
    separate_decoders: Annotated[
        bool | None,
        Field(
            description="A decoder per target; false: one shared decoder with a head per target; null: true, unless a "
            "time budget is short."
        ),
    ] = None
    base_features: Annotated[
        Positive | None,
        Field(
            description="Features of the first stage when planned; null: 32, or what a time budget or the memory"
            " chooses."
        ),
    ] = None
    max_features: Annotated[Positive, Field(description="Most features of a stage when planned.")] = 320
    features_per_stage: Annotated[
        list[Positive] | None, Field(description="Features per stage; null: min(base * 2^i, max).")
    ] = None
    n_stages: Annotated[Positive | None, Field(description="Stages; null: pooling operations + 1.")] = None
    n_blocks_per_stage: Annotated[
        list[Positive] | None, Field(description="Residual blocks per stage; null: 1, 3, 4, 6, 6, ...")
    ] = None
    n_conv_per_stage_decoder: Annotated[
        Positive | list[Positive], Field(description="Convolutions per decoder stage.")
    ] = 1
    kernel_sizes: Annotated[
        list[Any] | None, Field(description="Convolution kernel per stage; null: planned.")
    ] = None
    strides: Annotated[list[Any] | None, Field(description="Stride per stage, first 1; null: planned.")] = (
        None
    )
    pool_op_kernel_sizes: Annotated[list[Any] | None, Field(description="The older name of `strides`.")] = (
        None
    )
    norm_op: Annotated[
        str, Field(description="instance, batch, group, layer or none (torch class names too).")
    ] = "instance"
    nonlin: Annotated[str, Field(description="LeakyReLU, ReLU, SwiGLU, GLU, GELU.")] = "LeakyReLU"
    dropout_op: Annotated[str | None, Field(description="Dropout in the encoder; null: none.")] = None
    dropout_p: Annotated[Share, Field(description="Probability of `dropout_op`.")] = 0.0
    conv_bias: Annotated[bool, Field(description="Convolutions have a bias.")] = True
    do_stem: Annotated[bool, Field(description="A convolution before the first stage.")] = True
    stem_channels: Annotated[
        Positive | None, Field(description="Features of the stem; null: as stage 0.")
    ] = None
    stochastic_depth_p: Annotated[Share, Field(description="Probability of dropping a residual block.")] = 0.0
    squeeze_excitation: Annotated[
        bool, Field(description="Squeeze and excitation in the residual blocks.")
    ] = False
    squeeze_excitation_reduction_ratio: Annotated[
        Annotated[float, Field(gt=0)], Field(description="Its reduction ratio (share of the channels kept).")
    ] = 1.0 / 16
    pool_type: Annotated[
        Literal["conv", "avg", "max"], Field(description="Downsampling: strided convolution, or pooling.")
    ] = "conv"
