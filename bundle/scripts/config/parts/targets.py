"""Entries of `targets` and of `auxiliary_tasks`, and their losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from volumen.config.parts.common import STRICT_KEYS
from volumen.config.value_types import (
    Amount,
    Count,
    Positive,
)


@dataclass(frozen=True)
class LossSpec:
    """An entry of a target's `losses`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    name: Annotated[str, Field(description="Loss by name: ours, `torch.nn.X` or `monai.losses.X`.")]
    weight: Annotated[float, Field(ge=0.0, description="Weight in the target's sum.")] = 1.0
    kwargs: Annotated[dict[str, Any], Field(description="Arguments of the loss.")] = field(
        default_factory=dict
    )
    start_epoch: Annotated[Count, Field(description="First epoch (from 0) at which it counts.")] = 0
    skip_deep_supervision: Annotated[bool, Field(description="Only at full resolution.")] = False
    field: Annotated[
        str | None,
        Field(
            description="A target derived from this one that the loss reads, at full resolution alone, such as a"
            " skeleton for SkeletonRecallLoss; null: none."
        ),
    ] = None


@dataclass(frozen=True)
class TargetConfig:
    """A target of `dataset_config.targets`: something a person labelled."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    out_channels: Annotated[
        Positive | None, Field(description="Channels of the head; null: from the labels, else as the image.")
    ] = None
    channels: Annotated[Positive | None, Field(description="The same as `out_channels`.")] = None
    activation: Annotated[
        Literal["sigmoid", "softmax", "none"] | None,
        Field(
            description="After the head; null: by the channels. With sigmoid, exclusive classes are learned as a yes "
            "or no per class, background included."
        ),
    ] = None
    losses: Annotated[
        list[LossSpec], Field(description="Losses; empty: cross-entropy and Dice, binary or by class.")
    ] = field(default_factory=list)
    weight: Annotated[Amount, Field(description="Weight of the target in the total.")] = 1.0
    class_weights: Annotated[
        Literal["auto"] | list[Amount] | None,
        Field(
            description="Weight of each class in the cross-entropy; auto: 1 / ln(1.02 + share of the training voxels),"
            " for independent channels against their background; null: all alike."
        ),
    ] = None
    ignore_label: Annotated[int | None, Field(description="Label value that means unknown.")] = None
    ignore_index: Annotated[int | None, Field(description="The same as `ignore_label`.")] = None
    ignore_value: Annotated[int | None, Field(description="The same as `ignore_label`.")] = None
    invert: Annotated[
        bool,
        Field(description="0 in the labels is the foreground, all else background (min-is-white masks)."),
    ] = False
    ds_interpolation: Annotated[
        Literal["nearest", "linear"] | None, Field(description="Downsampling under deep supervision.")
    ] = None
    separate_decoder: Annotated[
        bool | None, Field(description="Its own decoder or not; null: as `model_config.separate_decoders`.")
    ] = None
    kind: Annotated[
        Literal["binary", "multiclass", "multilabel", "distance"] | None,
        Field(description="How labels are read; null: detected. distance: with `instances: distance` alone."),
    ] = None
    instances: Annotated[
        Literal["foreground", "boundary", "interior", "distance"] | None,
        Field(
            description="The labels number instances, of which the head learns this; "
            "null: classes, unless the labels hold more than 64 values of 16 bits or more, or nine or more of one "
            "connected piece each."
        ),
    ] = None
    classes: Annotated[list[str] | None, Field(description="Names of the classes, for reports.")] = None
    regions: Annotated[
        dict[str, Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]] | None,
        Field(
            description="Overlapping regions that are learned of a label map, each by its name and its label values; a"
            " label map is predicted in this order, later ones over earlier ones. null: none."
        ),
    ] = None
    region_values: Annotated[
        list[Annotated[int, Field(ge=1, le=255)]] | None,
        Field(
            description="Label value that each region has in a predicted label map; null: the first of its values that"
            " no later region has."
        ),
    ] = None
    fuse: Annotated[
        Literal["auto", "none"] | list[str],
        Field(
            description="Read the label from the heads derived from it too, by a fusion that validation fits. auto:"
            " from all that speak for it, if that helps voxels that did not fit it; a list: from these heads, always;"
            " none: from its own head alone."
        ),
    ] = "none"


@dataclass(frozen=True)
class AuxiliaryTaskConfig:
    """A target of `auxiliary_tasks`, derived from labels: the keys of every task, whatever its type."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    type: Annotated[str, Field(description="What is derived, a type of the table below.")]
    source_target: Annotated[str, Field(description="The labelled target that it is derived from.")]
    losses: Annotated[list[LossSpec], Field(description="Losses, at least one; none without a head.")] = (
        field(default_factory=list)
    )
    head: Annotated[
        bool,
        Field(description="The network predicts it; false: it is derived for losses of its source alone."),
    ] = True
    loss_weight: Annotated[Amount | None, Field(description="Weight in the total; null: 1.")] = None
    weight: Annotated[Amount | None, Field(description="The same as `loss_weight`.")] = None
    separate_decoder: Annotated[
        bool | None, Field(description="A decoder of its own; null: as `separate_decoders`.")
    ] = None
    optional: Annotated[
        bool,
        Field(description="A time budget may leave it out where it has too few steps for the network."),
    ] = False
    ds_interpolation: Annotated[
        Literal["nearest", "linear"] | None,
        Field(description="Downsampling under deep supervision; null: linear."),
    ] = None
    classes: Annotated[
        list[int] | None, Field(description="Class numbers that count as foreground; null: all above 0.")
    ] = None
    validity: Annotated[
        Literal["exact", "informed", "completed"] | None,
        Field(description="exact or informed, see `tr_config.validity`; null: as there."),
    ] = None
    out_channels: Annotated[
        Positive | None,
        Field(description="Channels of the head; null: by the type. Another number is refused."),
    ] = None
    channels: Annotated[Positive | None, Field(description="The same as `out_channels`.")] = None
    activation: Annotated[
        str | None, Field(description="Has no effect: the head of a derived target has none.")
    ] = None
    ignore_label: Annotated[
        int | None, Field(description="Has no effect: unknown voxels are those of the labelled target.")
    ] = None
    ignore_index: Annotated[int | None, Field(description="The same as `ignore_label`.")] = None
    ignore_value: Annotated[int | None, Field(description="The same as `ignore_label`.")] = None
    auxiliary_task: Annotated[
        bool | None, Field(description="Has no effect: every entry here is derived.")
    ] = None
