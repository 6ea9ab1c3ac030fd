"""Logs the plan of a run before it begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from volumen.data.resampled import stored_volume
from volumen.utils.terminal.text import by, counted

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

logger = logging.getLogger(__name__)


def log_experiment(config: ConfigManager) -> None:
    """Log data, targets, split and the network's plan.

    Args:
        config: the run's configuration; this opens its data.
    """
    cases = config.cases
    shapes = sorted({by(case.image.shape) for case in cases})
    logger.info(
        "data: %s of %s in %s, %dD, %s, %s, spacing %s",
        counted(len(cases), f"{config.layout.format} volume"),
        ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else ""),
        config.layout.root,
        config.spatial_dims,
        counted(config.in_channels, "channel"),
        stored_volume(cases[0].image).dtype,
        " ".join(f"{value:g}" for value in config.spacing),
    )
    for target in config.targets.values():
        losses = " + ".join(_weighed(loss.weight, loss.name) for loss in target.losses)
        origin = f"{target.task_type} of {target.source_target}" if target.auxiliary_task else "labelled"
        logger.info(
            "target %s: %s, %s, %s, weight %g, %s",
            target.name,
            origin,
            target.kind,
            counted(target.out_channels, "channel"),
            target.weight,
            losses,
        )
    logger.info("%s", _machine(config))
    train, val = config.split.train, config.split.val
    logger.info("split: train on %s; validate on %s", _regions(train), _regions(val) or "nothing")
    if config.patch_line:
        logger.info("%s", config.patch_line)
    logger.info("network plan:\n%s", config.plan.table())
    for line in without_effect(config):
        logger.warning("%s", line)


def _weighed(weight: float, name: str) -> str:
    return name if weight == 1 else f"{weight:g} x {name}"


def _machine(config: ConfigManager) -> str:
    """Return a line with the device, the precision and the number of steps."""
    import torch

    from volumen.utils.precision import choose_dtype

    device, training = config.device, config.tr_config
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        name = f"{device} ({counted(torch.get_num_threads(), 'thread')})"
    precision = str(choose_dtype(training.amp, device) or torch.float32).removeprefix("torch.")
    steps = training.max_steps_per_epoch
    per_epoch = counted(steps, "step") if steps else "one pass over the patches"
    length = f"{counted(training.max_epoch, 'epoch')} of {per_epoch}"
    return f"device: {name}, {precision}; {length}, batch {training.batch_size}"


def without_effect(config: ConfigManager) -> list[str]:
    """Return a line for each setting that has no effect in this experiment, and each head that is never trained.

    Args:
        config: the run's configuration; this opens its data.
    """
    setup, training, data = config.tr_setup, config.tr_config, config.dataset_config
    lines = []
    for key in ("early_stopping_patience", "key_metric") if not config.validates else ():
        if getattr(training, key) is not None:
            lines.append(
                f"tr_config.{key}: has no effect without validation (tr_val_split {setup.tr_val_split:g})"
            )
    if data.class_oversampling not in (0, "auto") and _every_patch_holds_every_class(config):
        lines.append(
            "dataset_config.class_oversampling: has no effect, as there is one class and every valid patch holds it"
        )
    for key in ("class_oversampling", "bg_sampling_enabled"):
        if data.skip_patch_validation and getattr(data, key):
            lines.append(
                f"dataset_config.{key}: has no effect with skip_patch_validation, which reads no labels"
            )
    if config.model_config.dropout_p and not config.model_config.dropout_op:
        lines.append("model_config.dropout_p: has no effect without dropout_op")
    strides = config.plan.strides
    idle = sum(max(stride) == 1 for stride in strides[1:])
    if idle and config.model_config.strides is None and config.model_config.pool_op_kernel_sizes is None:
        lines.append(
            f"model_config: {idle} of {len(strides)} stages pool nothing, as a patch of {by(config.patch_size)} "
            f"is too small for them; {len(strides) - idle} stages are enough"
        )
    for name, target in config.targets.items():
        used = [loss for loss in target.losses if loss.weight and loss.start_epoch < training.max_epoch]
        if not target.weight or not used:
            why = "its weight is 0" if not target.weight else "no loss of it begins or has a weight"
            lines.append(f"target {name}: is never trained, as {why}")
    return lines


def _every_patch_holds_every_class(config: ConfigManager) -> bool:
    """Whether every valid patch contains the only class: without a mask, only objects count as labelled."""
    if sum(map(len, config.sampled_classes.values())) != 1:
        return False
    (target,) = config.sampled_classes
    return config.tr_setup.compute_loss_on_labeled_only or all(
        target not in case.masks for case in config.cases
    )


def _regions(part: dict) -> str:
    if len(part) > 4:
        return f"{len(part)} volumes"
    return "; ".join(
        f"{name} " + " and ".join("[" + ", ".join(f"{a}:{b}" for a, b in box) + "]" for box in boxes)
        for name, boxes in part.items()
    )
