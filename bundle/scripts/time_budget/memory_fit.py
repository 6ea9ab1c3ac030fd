"""Fits patch, batch, width and depth to the memory that the device has, or to a preset of stated memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from volumen.networks.planning import BASE_FEATURES
from volumen.time_budget.candidates import Candidate, Preset, preset_candidate
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import by, counted

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

logger = logging.getLogger(__name__)

KEY = "tr_config.preset"
GIB = 2**30
# Memory in GiB of the device for which a preset is made. On GPUs medium, large and xlarge are those of nnU-Net's
# residual encoder presets M, L and XL, which occupy 9.1, 22.7 and 36.6 GB (Isensee et al. 2024, arXiv:2404.09556). On
# a CPU a step of that size would take minutes, so the numbers are what one process may occupy there.
PRESETS: dict[str, dict[str, float]] = {
    "cuda": {"small": 8, "medium": 12, "large": 24, "xlarge": 40},
    "cpu": {"small": 2, "medium": 4, "large": 8, "xlarge": 16},
}
# Without a preset a GPU gets at most this one, the default that nnU-Net's authors recommend.
MOST = "large"
# Share of the free memory, or of a preset's, that the estimate may reach.
SHARE = {"cuda": 0.92, "cpu": 0.8}
# A preset may be chosen on a device whose free memory is this share of the preset's: a driver and a screen take some.
PRESENT = 0.9
MOST_PROBES = 3
MOST_BATCH = {2: 64, 3: 16}
# Copies of a patch with its halo and its labels that a process which prepares patches holds.
_PATCH_COPIES = 12
_SIDES: dict[int, tuple[int, ...]] = {
    3: (256, 240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48),
    2: (2048, 1536, 1024, 768, 512, 384, 256, 192, 128),
}
# nnU-Net's smallest batches.
_BATCH = {3: 2, 2: 12}
# Smaller networks, for devices in which not even the last of the sizes above fits.
_SMALLER: dict[int, tuple[Preset, ...]] = {
    3: (
        Preset(48**3, 32, True, 2),
        Preset(48**3, 16, True, 2),
        Preset(32**3, 16, True, 2),
        Preset(32**3, 16, True, 1),
        Preset(24**3, 8, True, 1),
    ),
    2: (
        Preset(128**2, 32, True, 4),
        Preset(128**2, 16, True, 2),
        Preset(64**2, 16, True, 1),
        Preset(64**2, 8, True, 1),
    ),
}
# Settings that the memory decides, and that a resumed run reads from its snapshot.
DECIDED = {
    "tr_config": ("patch_size", "batch_size", "memory_choice"),
    "model_config": ("features_per_stage", "n_blocks_per_stage", "separate_decoders"),
}

Probe = Callable[["ConfigManager"], "int | None"]


def within_memory(config: ConfigManager, *, probe: Probe | None = None) -> ConfigManager:
    """Return the configuration with a patch, batch and network that fit into the memory of the device.

    Settings of the user do not change. On a CPU without a preset the default patch and batch stay if they fit, since a
    larger step would only be slower. On a GPU the largest patch that fits is taken at nnU-Net's smallest batch, and a
    larger batch where a patch covers a whole image.

    Args:
        config: the checked configuration. A resumed run keeps the choice of its snapshot.
        probe: measures the peak of a step in bytes, None if the memory is not enough; None: the estimate is trusted.

    Raises:
        VolumenError: a preset that has nothing to choose or is too large for the device; or nothing fits.
    """
    training = config.tr_config
    _ = config.device  # several processes meet here
    if not config.has_data:  # a published network, loaded without its data: nothing is trained
        return config
    if training.memory_choice is not None and training.preset is None:
        return config
    if config.resumes:
        kept = distributed.broadcast(decided_before(config) if distributed.is_main() else None)
        if kept is not None:
            logger.info(
                "memory: the resumed run keeps what it chose (%s)", kept["tr_config"]["memory_choice"]
            )
        return config if kept is None else applied(config, kept)
    _check_preset(config)
    limit = memory_limit(config)
    if limit is None:
        return config
    if _nothing_to_choose(config):
        _warn_if_too_large(config, limit)
        return config
    candidate, needed = _fitting(config, limit)
    for _ in range(MOST_PROBES if probe is not None else 0):
        assert probe is not None
        measured = probe(candidate.applied_to(config))
        if measured is not None and measured <= limit:
            needed = measured
            break
        # Either the step failed at an unknown peak, or the estimate is too small by a known factor.
        factor = 0.8 if measured is None else limit / measured
        logger.info("memory: %s take more than estimated; trying less", _sizes(candidate))
        candidate, needed = _fitting(config, factor * min(needed, limit))
    if candidate == _default(config):
        return config
    return applied(config, _decided(config, candidate, needed, limit))


def memory_limit(config: ConfigManager) -> float | None:
    """Return the bytes that a training step may take at its peak on the device, the least of all processes.

    Returns:
        Bytes; None if the system does not state its memory and there is no preset.
    """
    from volumen.utils.device_memory import device_memory

    kind = _kind(config)
    free = device_memory(config.device)
    limits = [] if free is None else [SHARE[kind] * free]
    if kind == "cpu" and free is not None:
        limits = [max(0.0, (SHARE[kind] * free) / distributed.processes_here() - _preparation(config))]
    preset = config.tr_config.preset or (MOST if kind == "cuda" else None)
    if preset is not None:
        limits.append(
            SHARE[kind] * PRESETS[kind][preset] * GIB if kind == "cuda" else PRESETS[kind][preset] * GIB
        )
    if not limits:
        return None
    return -distributed.largest(-min(limits), config.device)


def fits(config: ConfigManager, candidate: Candidate, limit: float | None) -> bool:
    """Return whether a candidate's estimated peak is within a limit; None is no limit."""
    return limit is None or _needed(config, candidate) <= limit


def smallest(config: ConfigManager) -> Candidate:
    """Return the candidate that needs the least memory."""
    return preset_candidate(config, _SMALLER[config.spatial_dims][-1])


def halved(experiment: ConfigManager, config: ConfigManager) -> ConfigManager | None:
    """Return a run's configuration with half the batch, or half the patch where the batch is 1 or the user's.

    Args:
        experiment: the configuration as the user gave it.
        config: the configuration of the run, whose first steps ran out of memory.

    Returns:
        The configuration; None if batch and patch are the user's.
    """
    training = config.tr_config
    decided: dict[str, Any] = {}
    if "batch_size" not in experiment.given["tr_config"] and training.batch_size > 1:
        decided["batch_size"] = training.batch_size // 2
        sizes = config
    elif experiment.tr_config.patch_size is None and experiment.tr_setup.autoconfigure:
        half = Preset(math.prod(config.patch_size) // 2, config.plan.features_per_stage[0], False, 1)
        plan = preset_candidate(experiment, half)
        blocks = [min(pair) for pair in zip(plan.blocks_per_stage, config.plan.blocks_per_stage)]
        decided["patch_size"] = list(plan.patch_size)
        sizes = config.variant(
            model_config=replace(
                config.model_config,
                features_per_stage=list(plan.features_per_stage),
                n_blocks_per_stage=blocks,
            )
        )
    else:
        return None
    smaller = sizes.variant(tr_config=replace(training, **decided))
    choice = f"{_sizes(_default(smaller))}, after more were out of memory"
    return smaller.variant(tr_config=replace(smaller.tr_config, memory_choice=choice))


def _kind(config: ConfigManager) -> str:
    return "cuda" if config.device.type == "cuda" else "cpu"


def _preparation(config: ConfigManager) -> float:
    """Return the bytes of the processes that prepare patches: decoded chunks, and copies of a patch."""
    voxels = math.prod(config.patch_size)
    patch = 4.0 * voxels * (config.in_channels + len(config.primary_targets)) * _PATCH_COPIES
    return max(1, config.workers) * (config.dataset_config.chunk_cache_mib * 2**20 + patch)


def _check_preset(config: ConfigManager) -> None:
    from volumen.utils.device_memory import device_memory

    name = config.tr_config.preset
    if name is None:
        return
    where = f"{config.origin}: {KEY}"
    if not config.tr_setup.autoconfigure or _nothing_to_choose(config):
        raise VolumenError(
            where,
            f"{name} has nothing to choose, as patch and batch are given or tr_setup.autoconfigure is false",
            remedy="leave the preset out, or the patch or batch size",
        )
    stated, free = PRESETS[_kind(config)][name], device_memory(config.device)
    if free is not None and free < PRESENT * stated * GIB:
        raise VolumenError(
            where,
            expected=f"{stated:g} GiB of memory on {config.device}",
            found=f"{free / GIB:.1f} GiB free",
            remedy="choose a smaller preset, or leave it out, so that the sizes fit what is free",
        )


def _nothing_to_choose(config: ConfigManager) -> bool:
    """Whether patch and batch are the user's."""
    patch_is_given = config.tr_config.patch_size is not None
    return not config.tr_setup.autoconfigure or (patch_is_given and "batch_size" in config.given["tr_config"])


def _warn_if_too_large(config: ConfigManager, limit: float) -> None:
    needed = _step_bytes(config)
    if needed > limit / SHARE[_kind(config)]:
        logger.warning(
            "memory: patches of %s in batches of %d need about %.1f GiB, and %.1f GiB are free on %s; a smaller"
            " --patch-size or --batch-size needs less, and without them the sizes are chosen to fit",
            by(config.patch_size),
            config.tr_config.batch_size,
            needed / GIB,
            limit / SHARE[_kind(config)] / GIB,
            config.device,
        )


def _fitting(config: ConfigManager, limit: float) -> tuple[Candidate, float]:
    """Return the first candidate within the limit, from the largest on, and the bytes it needs."""
    found = list(dict.fromkeys(_candidates(config)))
    known: float | None = None
    for number, candidate in enumerate(found):
        # Memory is nearly proportional to voxels, so candidates that are far too large are not estimated.
        if known is not None and number + 1 < len(found) and _voxels(candidate) * known > 1.5 * limit:
            continue
        needed = _needed(config, candidate)
        if needed <= limit:
            return (candidate, needed) if number else _grown(config, candidate, needed, limit)
        known = needed / _voxels(candidate) if known is None else known
    raise VolumenError(
        "memory",
        expected=f"{needed / GIB:.2f} GiB for the smallest step, {_sizes(candidate)}",
        found=f"{max(limit, 0) / GIB:.2f} GiB on {config.device}",
        remedy="give a smaller --patch-size, --batch-size or model_config.features_per_stage, or free memory",
    )


def _candidates(config: ConfigManager) -> Iterator[Candidate]:
    """Yield what may be chosen, from the most memory to the least."""
    dims = config.spatial_dims
    default = _default(config)
    if _kind(config) == "cuda" or config.tr_config.preset is not None:
        for side in _SIDES[dims]:
            yield preset_candidate(config, Preset(side**dims, _base_features(config), False, _BATCH[dims]))
    else:
        yield default
        for side in _SIDES[dims]:
            if side**dims < math.prod(default.patch_size):
                features = _base_features(config)
                yield preset_candidate(config, Preset(side**dims, features, False, default.batch_size))
    for preset in _SMALLER[dims]:
        yield preset_candidate(config, preset)


def _base_features(config: ConfigManager) -> int:
    return config.model_config.base_features or BASE_FEATURES


def _grown(
    config: ConfigManager, candidate: Candidate, needed: float, limit: float
) -> tuple[Candidate, float]:
    """Return the largest candidate with more patches per step if that is a choice: no larger patch makes sense."""
    by_default = _kind(config) == "cpu" and config.tr_config.preset is None
    if by_default or "batch_size" in config.given["tr_config"]:
        return candidate, needed
    double = _needed(config, replace(candidate, batch_size=2 * candidate.batch_size))
    each = max(1.0, (double - needed) / candidate.batch_size)
    data = sum(math.prod(case.image.shape) for case in config.cases)
    most = min(
        int(candidate.batch_size + (limit - needed) / each),
        MOST_BATCH[config.spatial_dims],
        # A batch does not show more voxels than there are.
        data // math.prod(candidate.patch_size),
    )
    batch = max(candidate.batch_size, most)
    return replace(candidate, batch_size=batch), needed + (batch - candidate.batch_size) * each


def _default(config: ConfigManager) -> Candidate:
    from volumen.time_budget.candidates import as_set

    return as_set(config)


def _needed(config: ConfigManager, candidate: Candidate) -> float:
    return _step_bytes(candidate.applied_to(config))


def _step_bytes(config: ConfigManager) -> float:
    from volumen.time_budget.memory_estimate import step_memory

    return float(step_memory(config).total)


def _voxels(candidate: Candidate) -> int:
    return candidate.batch_size * math.prod(candidate.patch_size)


def _sizes(candidate: Candidate) -> str:
    patches = "patches" if candidate.batch_size > 1 else "patch"
    return (
        f"{candidate.batch_size} {patches} of {by(candidate.patch_size)} with"
        f" {counted(candidate.features_per_stage[0], 'feature')}"
    )


def _decided(
    config: ConfigManager, candidate: Candidate, needed: float, limit: float
) -> dict[str, dict[str, Any]]:
    preset = f"preset {config.tr_config.preset}, " if config.tr_config.preset else ""
    choice = f"{preset}{_sizes(candidate)}: {needed / GIB:.1f} of {limit / GIB:.1f} GiB on {config.device}"
    logger.info("memory: %s", choice)
    return {
        "tr_config": {
            "patch_size": list(candidate.patch_size),
            "batch_size": candidate.batch_size,
            "memory_choice": choice,
        },
        "model_config": {
            "features_per_stage": list(candidate.features_per_stage),
            "n_blocks_per_stage": list(candidate.blocks_per_stage),
            "separate_decoders": candidate.separate_decoders,
        },
    }


def decided_before(config: ConfigManager) -> dict[str, dict[str, Any]] | None:
    """Return what the memory decided in the resumed run, from its snapshot; None without such a decision."""
    from volumen.time_budget.snapshot import decided_settings

    return decided_settings(config, "memory_choice", DECIDED)


def applied(config: ConfigManager, decided: dict[str, dict[str, Any]]) -> ConfigManager:
    """Return the configuration with what the memory decided, without a preset."""
    return config.variant(
        tr_config=replace(config.tr_config, preset=None, **decided["tr_config"]),
        model_config=replace(config.model_config, **decided["model_config"]),
    )
