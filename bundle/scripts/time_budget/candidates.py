"""The networks and patches from which a time budget chooses, from the cheapest step to the most expensive."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

# Residual blocks per stage: half the default depth at the same resolutions learns more in a short time.
# Deep stages hold most weights and learn slowest, so light networks do not widen beyond the fourth stage.
LIGHT_BLOCKS, LIGHT_WIDENING = (1, 2, 2, 2), 8
# A learning rate that suits AdamW at 16 features; wider networks use smaller rates.
BASE_RATE, BASE_WIDTH = 0.003, 16


@dataclass(frozen=True)
class Preset:
    """One preset of network and patch, before the user's own settings replace parts of it.

    Args:
        voxels: number of voxels of a patch.
        features: channels at full resolution.
        light: few residual blocks instead of the default number, and one decoder for all targets.
        batch: patches per step.
    """

    voxels: int
    features: int
    light: bool
    batch: int


PRESETS: dict[int, tuple[Preset, ...]] = {
    3: (
        Preset(48**3, 16, True, 2),
        Preset(64**3, 16, True, 2),
        Preset(64**3, 24, True, 2),
        Preset(96**3, 32, True, 2),
        Preset(96**3, 32, False, 2),
        Preset(128**3, 32, False, 2),
        Preset(192**3, 32, False, 2),
        Preset(224**3, 32, False, 2),
    ),
    2: (
        Preset(128**2, 16, True, 4),
        Preset(256**2, 16, True, 2),
        Preset(256**2, 32, True, 4),
        Preset(512**2, 32, True, 4),
        Preset(512**2, 32, False, 8),
        Preset(512**2, 64, False, 12),
    ),
}


@dataclass(frozen=True)
class Candidate:
    """Values for all settings that the budget may choose.

    Args:
        patch_size: voxels per axis.
        batch_size: patches per step.
        features_per_stage: channels per stage.
        blocks_per_stage: residual blocks per stage.
        learning_rate: initial learning rate.
        separate_decoders: True: one decoder per target; False: one decoder that all targets share.
    """

    patch_size: tuple[int, ...]
    batch_size: int
    features_per_stage: tuple[int, ...]
    blocks_per_stage: tuple[int, ...]
    learning_rate: float
    separate_decoders: bool = True

    def applied_to(self, config: ConfigManager) -> ConfigManager:
        """Return the configuration with this candidate's values."""
        return config.variant(
            tr_config=replace(
                config.tr_config,
                patch_size=list(self.patch_size),
                batch_size=self.batch_size,
                initial_lr=self.learning_rate,
            ),
            model_config=replace(
                config.model_config,
                features_per_stage=list(self.features_per_stage),
                n_blocks_per_stage=list(self.blocks_per_stage),
                separate_decoders=self.separate_decoders,
            ),
        )


def candidates(config: ConfigManager) -> list[Candidate]:
    """List the candidates for an experiment, cheapest first.

    Settings of the user do not change: a patch, features, blocks, number of stages, a batch size, a learning rate, one
    decoder or several. Without `tr_setup.autoconfigure` the network does not change either, and only the number of
    steps is chosen.

    Args:
        config: the run's configuration; reading it opens the data.

    Returns:
        At least one candidate, each once.
    """
    found: list[Candidate] = []
    if config.tr_setup.autoconfigure:
        found = [preset_candidate(config, preset) for preset in PRESETS[config.spatial_dims]]
    return list(dict.fromkeys(found)) or [as_set(config)]


def preset_candidate(config: ConfigManager, preset: Preset) -> Candidate:
    """Return a preset with the user's own settings in the place of its values."""
    from volumen.config.detection import default_patch_size
    from volumen.networks.planning import FIRST_STAGES_BLOCKS, plan_blocks

    training, model = config.tr_config, config.model_config
    given = config.given["tr_config"]
    decoders_are_given = "separate_decoders" in config.given["model_config"]
    if training.patch_size is not None:
        patch = config.requested_patch_size
    else:
        patch = default_patch_size(config.cases, config.spacing, config.device.type, voxels=preset.voxels)
    width = preset.features
    if model.features_per_stage:
        width = model.features_per_stage[0]
    elif "base_features" in config.given["model_config"]:
        width = model.base_features or preset.features
    most = min(model.max_features, LIGHT_WIDENING * width) if preset.light else model.max_features
    planned = config.variant(
        tr_config=replace(training, patch_size=list(patch)),
        model_config=replace(model, base_features=width, max_features=most),
    ).plan
    blocks = planned.blocks_per_stage
    if preset.light and not model.n_blocks_per_stage:
        shallow = LIGHT_BLOCKS + LIGHT_BLOCKS[-1:] * max(0, planned.stages - len(FIRST_STAGES_BLOCKS))
        blocks = tuple(min(a, b) for a, b in zip(shallow, plan_blocks(planned.stages)))
    return Candidate(
        patch_size=tuple(planned.patch_size),
        batch_size=training.batch_size if "batch_size" in given else preset.batch,
        features_per_stage=tuple(planned.features_per_stage),
        blocks_per_stage=tuple(blocks),
        learning_rate=training.initial_lr if "initial_lr" in given else _rate(width),
        # Five decoders make a step about twice as long as one; with one target there is nothing to share.
        separate_decoders=model.separate_decoders
        if decoders_are_given
        else not (preset.light and len(config.targets) > 1),
    )


def _rate(width: int) -> float:
    return round(BASE_RATE * math.sqrt(BASE_WIDTH / max(width, BASE_WIDTH)), 5)


def as_set(config: ConfigManager) -> Candidate:
    """Return the values that the configuration has."""
    plan = config.plan
    return Candidate(
        tuple(plan.patch_size),
        config.tr_config.batch_size,
        tuple(plan.features_per_stage),
        tuple(plan.blocks_per_stage),
        config.tr_config.initial_lr,
        config.model_config.separate_decoders,
    )
