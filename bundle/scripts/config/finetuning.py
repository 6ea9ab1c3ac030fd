"""Lets a training follow the pretrained encoder from which it starts: its network, and its learning rate."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from volumen.data.layout import MAX_SIZE_RATIO

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

logger = logging.getLogger(__name__)

AUTO, SAWTOOTH = "auto", "sawtooth"


def with_pretrained(config: ConfigManager) -> ConfigManager:
    """Return a configuration whose network is that of the pretrained encoder from which the training starts.

    Only settings that the user left out follow the encoder; others that differ are refused when it is loaded. With
    `tr_config.finetune_schedule: auto` the learning rate gets the schedule of a pretrained encoder. A resumed run keeps
    both from its snapshot, so that it needs neither `--finetune` again nor the file. A configuration without such a
    checkpoint does not change.

    Args:
        config: the checked configuration.

    Raises:
        VolumenError: the checkpoint cannot be read.
    """
    if config.resumes:
        return _as_before(config)
    if config.finetune_from is None or not Path(config.finetune_from).is_file():
        return config  # a missing file is reported when it is loaded
    from volumen.checkpoints.finetune import read_weights_file
    from volumen.checkpoints.pretrained import FOLLOWING, check_encoder, encoder_settings, pretraining_of

    path = Path(config.finetune_from)
    content = read_weights_file(path, shapes_only=True)
    program = pretraining_of(content)
    if program is None:
        return config
    settings = encoder_settings(content, path)
    # Before the others, whose number of axes depends on these.
    check_encoder({"spatial_dims": config.spatial_dims, "in_channels": config.in_channels}, settings, path)
    adopted = _followed(config, {key: settings[key] for key in FOLLOWING if key in settings})
    schedule = config.tr_config.finetune_schedule
    if schedule == AUTO:
        schedule = SAWTOOTH
    logger.info(
        "%s: an encoder that %s pretrained; the network follows it (%s); learning rate: tr_config.finetune_schedule %s",
        path, program, ", ".join(sorted(adopted)) or "as the settings already do", schedule,
    )  # fmt: skip
    _warn_of_other_images(config, content, path)
    return _applied(config, adopted, {"finetune_schedule": schedule})


def _as_before(config: ConfigManager) -> ConfigManager:
    """Return the configuration of a resumed run with the schedule and the network that its first start chose."""
    snapshot = config.resumed_file("config.yaml")
    if snapshot is None:
        return config
    content = yaml.safe_load(snapshot.read_text(encoding="utf-8"))
    training = content.get("tr_config", {})
    schedule = training.get("finetune_schedule", AUTO)
    if schedule == AUTO:
        return config
    from volumen.checkpoints.pretrained import FOLLOWING

    model = content.get("model_config", {})
    adopted = _followed(config, {key: model[key] for key in FOLLOWING if model.get(key)})
    decided = {"finetune_schedule": schedule, "finetune_warmup": training["finetune_warmup"]}
    return _applied(config, adopted, decided if config.tr_config.finetune_schedule == AUTO else {})


def _followed(config: ConfigManager, settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of an encoder's settings that the user left out."""
    model = config.model_config
    given = {key for key in settings if getattr(model, key) is not None}
    if model.pool_op_kernel_sizes is not None:
        given.add("strides")
    return {key: value for key, value in settings.items() if key not in given}


def _applied(config: ConfigManager, model: dict[str, Any], training: dict[str, Any]) -> ConfigManager:
    return config.variant(
        model_config=replace(config.model_config, **model),
        tr_config=replace(config.tr_config, **training),
    )


def _warn_of_other_images(config: ConfigManager, content: Any, path: Path) -> None:
    """Warn if the encoder was pretrained on images that are normalised otherwise, or on voxels of another size."""
    theirs = (content.get("config") or {}).get("dataset_config", {})
    scheme, mine = theirs.get("normalization_scheme"), config.dataset_config.normalization_scheme
    if scheme is not None and scheme != mine:
        logger.warning(
            "%s: was pretrained with dataset_config.normalization_scheme %s, and this training uses %s",
            path, scheme, mine,
        )  # fmt: skip
    spacing, unit = theirs.get("trained_spacing"), theirs.get("trained_unit")
    if spacing is None or not config.data.spacing_is_stated or unit != config.cases[0].unit:
        return
    ratios = [max(a / b, b / a) for a, b in zip(spacing, config.spacing, strict=True)]
    if max(ratios) > MAX_SIZE_RATIO:
        logger.warning(
            "%s: was pretrained on voxels of %s, and those here are of %s; target_spacing resamples them",
            path, " x ".join(f"{size:g}" for size in spacing), " x ".join(f"{size:g}" for size in config.spacing),
        )  # fmt: skip
