"""The experiment's sections as frozen dataclasses: every key with its type, default, range and effect.

The documentation's table of keys is generated from these descriptions. `volumen.config.validation` refuses unknown
keys and names the closest known one; then pydantic checks types and ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field

from volumen.config.parts.common import FILE_NAME, STRICT_KEYS
from volumen.config.parts.network import ModelConfig
from volumen.config.parts.setup import TrainingSetup
from volumen.config.parts.unlabelled import UnlabelledConfig
from volumen.config.prediction import InferenceConfig
from volumen.config.value_types import (
    NAMES_FILE,
    Amount,
    AmpMode,
    Count,
    PatchSetting,
    PatchSize,
    Positive,
    Share,
)
from volumen.metrics.score_names import VALIDATION_PATTERN, VALIDATION_SCORES

_DURATION = r"^\s*(\d+(\.\d+)?\s*[dhmsDHMS]\s*)+$"
_FOLD = r"^\d+/\d+$"
Duration = Annotated[
    str,
    # A bare 35 becomes text, so that the error says that the unit is missing, not that the type is wrong.
    BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value),
    Field(pattern=_DURATION),
]
Scheme = Literal["unit", "percentile", "zscore", "ct", "none"]

# Errors show these instead of the patterns.
PATTERN_MEANINGS = {
    _FOLD: "a fold such as 0/5, the first of five",
    _DURATION: "a time such as 35m, 12h or 1h30m",
    FILE_NAME: "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    VALIDATION_PATTERN: f"a score of labels ({', '.join(VALIDATION_SCORES)}; X is a number)",
}


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
class TrainingConfig:
    """`tr_config`: how the network is trained."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    patch_size: Annotated[
        PatchSetting | None,
        Field(
            description="Patch in voxels, (Z, Y, X) or (Y, X), or in lengths with a unit, such as [20um, 5um, 5um], or"
            " 20um for every axis; null: from the data."
        ),
    ] = None
    batch_size: Annotated[
        Positive | None,
        Field(description="Patches per step (per process); null: 2, or what a time budget chooses."),
    ] = None
    initial_lr: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Learning rate at the start; null: 0.001, or what a time budget chooses."),
    ] = None
    weight_decay: Annotated[Amount, Field(description="Weight decay.")] = 0.01
    optimizer: Annotated[str, Field(description="Any optimizer of torch.optim, by class name.")] = "AdamW"
    optimizer_kwargs: Annotated[dict[str, Any], Field(description="More arguments of the optimizer.")] = (
        field(default_factory=dict)
    )
    fused_optimizer: Annotated[
        bool | Literal["auto"],
        Field(
            description="Update all weights in one kernel, which on a GPU also spares every step from waiting; auto: on"
            " CUDA, if the optimizer has one."
        ),
    ] = "auto"
    scheduler: Annotated[
        str,
        Field(description="cosine (CosineAnnealingLR), poly, linear, onecycle or constant; steps per epoch."),
    ] = "cosine"
    scheduler_kwargs: Annotated[
        dict[str, Any],
        Field(
            description="More arguments of the schedule: power (poly), eta_min (cosine), end (linear), or pct_start,"
            " div_factor, final_div_factor (onecycle)."
        ),
    ] = field(default_factory=dict)
    warmup_epochs: Annotated[Count, Field(description="Epochs of linear warm-up before the schedule.")] = 0
    finetune_schedule: Annotated[
        Literal["auto", "sawtooth", "warmup", "none"],
        Field(
            description="Learning rate after `--finetune`. sawtooth: the decoders alone rise and fall, then the whole"
            " network warms up, then `scheduler`; warmup: the second and third alone; none: `scheduler`; auto: sawtooth"
            " after a pretraining without labels, else none."
        ),
    ] = "auto"
    finetune_warmup: Annotated[
        Annotated[float, Field(gt=0, le=0.4)],
        Field(description="Share of the epochs for each of the first two parts of `finetune_schedule`."),
    ] = 0.1
    preset: Annotated[
        Literal["small", "medium", "large", "xlarge"] | None,
        Field(
            description="Memory for which patch, batch, width and depth are chosen, as far as they are not set: 8, 12,"
            " 24 or 40 GB of a GPU, or 2, 4, 8 or 16 GB of main memory on a CPU; null: what is free, on a GPU up to"
            " large, on a CPU no more than the default patch needs."
        ),
    ] = None
    memory_choice: Annotated[
        str | None,
        Field(
            description="Written by a run whose patch, batch or network was fitted to the memory: what it chose."
        ),
    ] = None
    time_budget: Annotated[
        Duration | None,
        Field(
            description="Time for the whole run, such as 35m or 12h: measures this machine first, then chooses network,"
            " patch, batch, learning rate and number of steps, as far as they are not set; null: no limit."
        ),
    ] = None
    time_budget_choice: Annotated[
        str | None,
        Field(description="Written by a run with a time budget: what it chose."),
    ] = None
    time_budget_left_out: Annotated[
        list[str],
        Field(
            description="Written by a run with a time budget: optional derived targets that it leaves out."
        ),
    ] = field(default_factory=list)
    max_epoch: Annotated[Positive, Field(description="Epochs to train.")] = 1000
    max_steps_per_epoch: Annotated[
        Positive | None, Field(description="Steps per epoch; null: one pass over the valid patches.")
    ] = 250
    max_val_steps_per_epoch: Annotated[
        Positive | None,
        Field(
            description="Batches of windows per validation, drawn at random once; null: the whole validation part."
        ),
    ] = 50
    final_val_steps: Annotated[
        Positive | None,
        Field(
            description="The same for the last and the best epoch when training ends; null: the whole validation part, "
            "or as many windows as training has patches where it is larger (at least 2000)."
        ),
    ] = None
    num_dataloader_workers: Annotated[
        Count | None,
        Field(description="Worker processes that prepare patches; null: CPU cores less one, at most 8."),
    ] = None
    gradient_accumulation: Annotated[Positive, Field(description="Batches per optimizer step.")] = 1
    gradient_clip: Annotated[
        Annotated[float, Field(gt=0)] | None, Field(description="Largest gradient norm; null: no clipping.")
    ] = 12.0
    enable_deep_supervision: Annotated[
        bool,
        Field(description="Losses at every decoder resolution, weights halving per level and summing to 1."),
    ] = True
    amp: Annotated[
        AmpMode,
        Field(
            description="Mixed precision; auto: bfloat16 where the device is fast at it, else float16 on CUDA."
        ),
    ] = "auto"
    channels_last: Annotated[bool, Field(description="Memory format channels last.")] = False
    compile: Annotated[
        bool | Literal["reduce-overhead", "max-autotune"],
        Field(
            description="Compile network and losses with torch.compile for the patch's size; reduce-overhead: with"
            " CUDA graphs; max-autotune: with a search for the fastest kernels."
        ),
    ] = False
    activation_checkpointing: Annotated[
        bool,
        Field(
            description="Store only the inputs of each block and compute its feature maps again in the backward pass:"
            " about a third of the memory, for about a third more time."
        ),
    ] = False
    pretrain_mask_ratio: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Field(
            description="Share of a patch's blocks that `volumen pretrain` hides; null: 0.75 in 3D, 0.6 in 2D."
        ),
    ] = None
    pretrain_mask_block: Annotated[
        list[Positive] | None,
        Field(
            description="Voxels per axis of a hidden block, a multiple of the product of the strides; null: that"
            " product, doubled up to 8 voxels of the smallest spacing while four blocks fit into the patch."
        ),
    ] = None
    pretrain_empty_below: Annotated[
        Share,
        Field(
            description="`volumen pretrain` leaves out places whose standard deviation is below this share of that of"
            " the volume's places with the most contrast (the 99th percentile); at 0 only constant places."
        ),
    ] = 0.1
    validity: Annotated[
        Literal["auto", "exact", "informed", "completed"],
        Field(
            description="What derived targets learn near unknown voxels. exact: values that no unknown voxel could"
            " change; informed: also bounds of distances and estimates with a confidence; auto: informed where the"
            " source target is masked or has an ignore label."
        ),
    ] = "auto"
    augment_on_device: Annotated[
        bool | Literal["auto"],
        Field(
            description="Augment training patches of a whole batch on the training device; the workers only read"
            " them. auto: on CUDA."
        ),
    ] = "auto"
    derive_on_device: Annotated[
        bool | Literal["auto"],
        Field(
            description="Derive auxiliary targets of a whole batch on the training device instead of in the workers;"
            " auto: on CUDA, and where the device augments."
        ),
    ] = "auto"
    val_every_n: Annotated[Positive, Field(description="Epochs between validations.")] = 1
    early_stopping_patience: Annotated[
        Positive | None,
        Field(description="Validations without a better key metric before stopping; null: never."),
    ] = None
    validation_metrics: Annotated[
        list[Annotated[str, Field(pattern=VALIDATION_PATTERN)]],
        Field(
            description="Scores of labels measured at validation, by the names of docs/scores.md; dice and iou always, "
            "the others on whole validation regions, whose labels stay in memory (3 bytes a voxel and target)."
        ),
    ] = field(default_factory=lambda: ["dice", "iou"])
    validation_tolerance: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Tolerance of surface_dice, in the spacing's unit; null: one voxel."),
    ] = None
    key_metric: Annotated[
        str | None,
        Field(description="Metric that chooses the best checkpoint; null: mean Dice of the labels."),
    ] = None
    keep_checkpoints: Annotated[Positive, Field(description="Newest epoch checkpoints to keep.")] = 10
    losses: Annotated[
        list[LossSpec],
        Field(description="Losses of labelled targets that list none; empty: cross-entropy and Dice."),
    ] = field(default_factory=list)
    loss_balancing: Annotated[
        Literal["fixed", "aligned", "uncertainty", "gradnorm"],
        Field(
            description="How targets are weighed against each other; aligned: derived targets change the encoder only"
            " as far as they do not oppose the labelled ones."
        ),
    ] = "fixed"
    loss_balancing_kwargs: Annotated[
        dict[str, Any],
        Field(description="Arguments of the balancing, such as method of aligned or interval of gradnorm."),
    ] = field(default_factory=dict)
    ema_decay: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Field(description="Moving average of the weights; null: none, or 0.99 with `unlabelled`."),
    ] = None
    unlabelled: Annotated[
        UnlabelledConfig | None,
        Field(
            description="Learn from patches without labels too, such as {ratio: 1}, see docs/unlabelled.md; null: no."
        ),
    ] = None
    average_last: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(
            description="Last epochs whose weights are averaged when training ends: a whole number from 2, or a"
            " fraction of all epochs below 1; the average is the best model if it validates better; null: none."
        ),
    ] = None
    max_nonfinite_steps: Annotated[
        Count, Field(description="Steps with a NaN or infinite loss that are skipped before the run stops.")
    ] = 10
    augment: Annotated[bool, Field(description="Augment training patches.")] = True
    augment_strength: Annotated[
        Share | None,
        Field(
            description="Share of nnU-Net's probabilities with which patches are rotated, scaled and changed in"
            " intensity; at 0 only flips and quarter turns remain, which lose nothing; null: 1, or what a time budget"
            " chooses."
        ),
    ] = None
    preview_history: Annotated[
        Count, Field(description="Older previews to keep beside the newest, one per validation.")
    ] = 0


@dataclass(frozen=True)
class DatasetConfig:
    """`dataset_config`: which data, how they are read, which patches count."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_KEYS

    data_path: Annotated[
        str | list[str] | None,
        NAMES_FILE,
        Field(
            description="Data folder where `-i` is not given, or a list of folders; NAME=FOLDER names one of several."
        ),
    ] = None
    format: Annotated[
        Literal[
            "zarr",
            "tif",
            "nifti",
            "png",
            "hdf5",
            "mrc",
            "nrrd",
            "precomputed",
            "n5",
            "metaimage",
            "dicom",
            "webknossos",
            "napari",
        ]
        | None,
        Field(description="Data format; null: by content."),
    ] = None
    targets: Annotated[
        dict[str, Any], Field(description="Targets by name; empty: every target found under labels/.")
    ] = field(default_factory=dict)
    volumes: Annotated[
        list[str] | None, NAMES_FILE, Field(description="Names of the images to use; null: all of them.")
    ] = None
    val_volumes: Annotated[
        list[str] | None,
        NAMES_FILE,
        Field(
            description="Names of the images that validate, also with * and ?; all others train. null: chosen by "
            "`tr_setup.tr_val_split`."
        ),
    ] = None
    val_path: Annotated[
        str | None,
        NAMES_FILE,
        Field(description="Data folder whose images all validate, and none of which trains; null: none."),
    ] = None
    split_path: Annotated[
        str | None,
        NAMES_FILE,
        Field(
            description="File that says which images or regions train and validate, such as the `_split.json` of "
            "a run; null: none."
        ),
    ] = None
    fold: Annotated[
        str | None,
        Field(
            pattern=_FOLD,
            description="Part of the data that validates: 0/5 is the first of five parts, 4/5 the last; null: none.",
        ),
    ] = None
    group_by: Annotated[
        str | None,
        NAMES_FILE,
        Field(
            description="Images of one group never stand on both sides: a regular expression whose first (...) is "
            "the group in an image's name, or a .csv file with the columns volume and group; null: no groups."
        ),
    ] = None
    axes: Annotated[
        str | None,
        Field(description="Axes of the images where metadata do not say, such as zyx, czyx or yxc."),
    ] = None
    spacing: Annotated[
        list[Annotated[float, Field(gt=0)]] | None,
        Field(description="Voxel size per spatial axis; null: from metadata, else 1."),
    ] = None
    target_spacing: Annotated[
        Literal["auto"] | list[Annotated[float, Field(gt=0)]] | None,
        Field(
            description="Voxel size per spatial axis to which volumes are resampled while they are read, in the data's"
            " unit; auto: nnU-Net's rule (the median); null: volumes are used as stored."
        ),
    ] = None
    trained_spacing: Annotated[
        list[Annotated[float, Field(gt=0)]] | None,
        Field(
            description="Written by a run: the median voxel size of its data, which prediction compares with its"
            " image's; null: no file told one."
        ),
    ] = None
    trained_unit: Annotated[
        str | None,
        Field(description="Written by a run: the unit of trained_spacing; null: no file states one."),
    ] = None
    trained_orientation: Annotated[
        str | None,
        Field(
            description="Written by a run: where the axes of its volumes run to, such as SAR (superior, anterior,"
            " right); a volume with other axes is turned for the network. null: no file states it."
        ),
    ] = None
    min_labeled_ratio: Annotated[
        Share | None,
        Field(
            description="Least labelled share of a training patch (masks first, else labels); null: 0.10, or half "
            "of an image's best share where none of its patches reaches that."
        ),
    ] = None
    min_bbox_percent: Annotated[
        Share,
        Field(description="Least share of the patch that the bounding box of the labelled voxels fills."),
    ] = 0.0
    patch_stride: Annotated[
        PatchSize | None, Field(description="Grid of candidate patches in voxels; null: half a patch.")
    ] = None
    skip_patch_validation: Annotated[bool, Field(description="Take every patch of the grid.")] = False
    cache_valid_patches: Annotated[
        bool, Field(description="Keep the index of valid patches in the user's cache.")
    ] = True
    chunk_cache_mib: Annotated[
        Count,
        Field(description="Decoded chunks that each worker keeps for the next patches, in MiB; 0: none."),
    ] = 128
    valid_patch_find_resolution: Annotated[
        Count, Field(description="OME-Zarr level of the labels at which patches are looked for.")
    ] = 0
    ome_zarr_resolution: Annotated[Count, Field(description="OME-Zarr level that is read.")] = 0
    allow_unlabeled_data: Annotated[
        bool, Field(description="Accept images that lack some target; its loss is masked there.")
    ] = False
    bg_sampling_enabled: Annotated[bool, Field(description="Also train on patches without foreground.")] = (
        False
    )
    bg_to_fg_ratio: Annotated[Amount, Field(description="Background patches per foreground patch.")] = 0.5
    class_oversampling: Annotated[
        Share | Literal["auto"],
        Field(
            description="Share of the patches drawn for what they hold: each class, or target, as often; auto: up to"
            " half, the rarer a class is among the patches and the lower its score at the last validation the more."
        ),
    ] = 0.0
    normalization_scheme: Annotated[
        Scheme | Annotated[list[Scheme], Field(min_length=1)],
        Field(
            description="unit ([0, 1]), percentile, zscore, ct or none; or a list with one for each channel."
        ),
    ] = "unit"
    normalize_per_volume: Annotated[
        bool | None,
        Field(
            description="Each volume by its own statistics; null: where their ranges differ by more than 3 times, or"
            " one is brighter than all of another."
        ),
    ] = None
    intensity_properties: Annotated[
        dict[str, Any], Field(description="Statistics of the images; filled by sampling when empty.")
    ] = field(default_factory=dict)
    trained_intensities: Annotated[
        list[dict[str, Any]],
        Field(
            description="Written by a run: the range of its volumes' intensities per channel, which prediction compares"
            " with its image's."
        ),
    ] = field(default_factory=list)
    nonfinite: Annotated[
        Literal["zero", "refuse"], Field(description="NaN or infinity in an image: replace by 0, or stop.")
    ] = "zero"
    no_spatial: Annotated[bool, Field(description="No spatial augmentation at all.")] = False
    rotation_axes: Annotated[
        list[Literal["x", "y", "z"]] | None,
        Field(description="Axes to rotate about (x, y, z); null: all, or the thin one."),
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


SECTIONS: dict[str, type] = {
    "tr_setup": TrainingSetup,
    "tr_config": TrainingConfig,
    "model_config": ModelConfig,
    "dataset_config": DatasetConfig,
    "inference_config": InferenceConfig,
}

# Values of keys that are null by default, used if nothing else decides them. Null tells an unset key from one to which
# the user gave the same value.
UNSET: dict[str, dict[str, Any]] = {
    "tr_config": {"batch_size": 2, "initial_lr": 1e-3, "augment_strength": 1.0},
    "model_config": {"separate_decoders": True, "base_features": 32},
    "dataset_config": {"min_labeled_ratio": 0.10},
}


@cache
def file_keys(section: str) -> frozenset[str]:
    """Return the keys of a section whose values name files or folders; none for a section without such keys."""
    if section not in SECTIONS:
        return frozenset()
    hints = get_type_hints(SECTIONS[section], include_extras=True)
    return frozenset(key for key, hint in hints.items() if NAMES_FILE in getattr(hint, "__metadata__", ()))


# Other names of keys, which files of other tools use: section -> name -> key.
ALIASES: dict[str, dict[str, str]] = {
    "tr_config": {"amp_dtype": "amp"},
    "model_config": {"squeeze_excitation_rd_ratio": "squeeze_excitation_reduction_ratio"},
}

# Keys of older files that have no effect here, with their replacement: section -> key -> advice.
RETIRED: dict[str, dict[str, str]] = {}
