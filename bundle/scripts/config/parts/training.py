"""The section `tr_config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from volumen.config.parts.common import STRICT_KEYS
from volumen.config.parts.targets import LossSpec
from volumen.config.parts.unlabelled import UnlabelledConfig
from volumen.config.value_types import (
    Amount,
    AmpMode,
    Count,
    PatchSetting,
    Positive,
    Share,
)
from volumen.metrics.score_names import VALIDATION_PATTERN

DURATION = r"^\s*(\d+(\.\d+)?\s*[dhmsDHMS]\s*)+$"
"""Pattern of a time with its unit."""
Duration = Annotated[
    str,
    # A bare 35 becomes text, so that the error says that the unit is missing, not that the type is wrong.
    BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value),
    Field(pattern=DURATION),
]


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
