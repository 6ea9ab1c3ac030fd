"""Derives a network, a patch, a number of steps and a schedule from a time budget."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from volumen.time_budget.candidates import Candidate, candidates
from volumen.time_budget.duration import format_duration, parse_duration
from volumen.time_budget.heads import cost_line, decoder_line, left_out, measure_without
from volumen.time_budget.measure import measure, training_objects
from volumen.time_budget.measured import Measured
from volumen.time_budget.memory_fit import fits, memory_limit, smallest, within_memory
from volumen.time_budget.probe import measured_peak
from volumen.time_budget.snapshot import decided_settings
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import aligned, by, counted
from volumen.utils.threads import cores

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

logger = logging.getLogger(__name__)

KEY = "tr_config.time_budget"
# Fractions of the budget for measuring, for unforeseen work (checkpoints, previews, start), and for validation.
MEASURING, RESERVE, VALIDATION = 0.06, 0.06, 0.08
# Fraction of the validation's time for scoring the last and the best epoch on the whole validation part.
FINAL = 0.4
MOST_MEASURING = 120.0
# Scores, losses, derived targets and the preview cost about as much time as the windows of a validation.
VALIDATION_FACTOR = 2.0
# A run sees each voxel this many times. Up to the first number, flips and quarter turns are enough augmentation; from
# the second on, nnU-Net's full probabilities help. On fib25, at 26 passes, full augmentation cost 0.02 of Dice.
FEW_PASSES, MANY_PASSES = 25, 1000
FEWEST_VALIDATIONS, EPOCHS, MOST_STEPS_PER_EPOCH = 3, 20, 250
# The settings that a budget decides, and that a resumed run reads from its snapshot.
DECIDED = {
    "tr_config": (
        "augment_strength",
        "patch_size",
        "batch_size",
        "initial_lr",
        "max_epoch",
        "max_steps_per_epoch",
        "max_val_steps_per_epoch",
        "final_val_steps",
        "val_every_n",
        "warmup_epochs",
        "time_budget_choice",
        "time_budget_left_out",
    ),
    "model_config": ("features_per_stage", "n_blocks_per_stage", "separate_decoders"),
}


def choose(measured: Sequence[Measured]) -> Measured:
    """Choose the most expensive candidate that gets enough steps; if none does, the one that comes closest.

    Args:
        measured: at least one, cheapest first.
    """
    sufficient = [entry for entry in measured if entry.steps >= entry.needed]
    if sufficient:
        return sufficient[-1]
    return max(measured, key=lambda entry: entry.steps / entry.needed)


def within_budget(config: ConfigManager) -> ConfigManager:
    """Apply `tr_config.time_budget`: choose a candidate that fits, log it, and return the configuration with it.

    The time counts from this call. Without a budget the sizes are fitted to the memory alone, see `within_memory`. With
    one, only candidates that fit into the memory are measured. A resumed run keeps the
    choice of its snapshot: nothing is measured again; a larger budget adds epochs, see `extended`. Several processes
    measure together, see `measure`, and follow the first one's choice.

    Args:
        config: the checked configuration.

    Returns:
        A configuration in which all settings that the budget decides have values, and which has no budget any more.

    Raises:
        VolumenError: the budget is too short for a run.
    """
    text = config.tr_config.time_budget
    if text is None:
        return within_memory(config, probe=measured_peak if config.device.type == "cuda" else None)
    _ = config.device  # several processes meet here
    try:
        seconds = parse_duration(text)
    except ValueError:
        raise VolumenError(KEY, expected="a time above 0, such as 35m or 12h", found=repr(text)) from None
    kept = distributed.broadcast(_decided_before(config) if distributed.is_main() else None)
    if kept is not None:
        kept = extended(kept, seconds)
        logger.info(
            "time budget: the resumed run keeps what it chose (%s)", kept["tr_config"]["time_budget_choice"]
        )
        return _applied(config, kept)
    return _applied(config, _decide(config, seconds))


def _decide(config: ConfigManager, budget: float) -> dict[str, dict[str, Any]]:
    started = time.perf_counter()
    logger.info("time budget %s: measuring candidates", format_duration(budget))
    measured = _measure_all(config, budget, started)
    chosen = choose(measured)
    logger.info("time budget:\n%s", table(measured, chosen))
    decoders = decoder_line(measured, chosen)
    if decoders is not None:
        logger.info("time budget: %s", decoders)
    dropped, chosen = _fewer_heads(config, chosen, budget, started)
    if dropped:
        config = _without(config, dropped)
    if chosen.steps < chosen.needed:
        logger.warning("%s", too_short(chosen, budget))
    # What the first process finds out about the patches of the choice is in the cache when the others ask.
    decided = _resolve(config, chosen, budget, started) if distributed.is_main() else None
    if decided is not None:
        decided["tr_config"]["time_budget_left_out"] = dropped
    return distributed.broadcast(decided)


def _fewer_heads(
    config: ConfigManager, chosen: Measured, budget: float, started: float
) -> tuple[list[str], Measured]:
    """Log what the heads of derived targets cost, as far as there is time to measure it.

    Returns:
        The optional ones to leave out, and the choice without them.
    """
    limit = min(MOST_MEASURING, MEASURING * budget)

    def again(fewer: ConfigManager) -> Measured | None:
        left = limit - _elapsed(config, started)
        return None if left <= 0 else _measured(fewer, chosen.candidate, budget, started, left)

    without = measure_without(config, again)
    for names, fewer in without.items():
        logger.info("time budget: %s", cost_line(names, chosen, fewer))
    dropped, remaining = left_out(config, chosen, without)
    if dropped:
        logger.warning(
            "time budget: leaves out the optional %s: %d steps instead of %d, where %d are enough",
            ", ".join(dropped),
            remaining.steps,
            chosen.steps,
            chosen.needed,
        )
    return dropped, remaining


def _without(config: ConfigManager, names: Sequence[str]) -> ConfigManager:
    tasks = {name: task for name, task in config.auxiliary_tasks.items() if name not in names}
    return config.variant(auxiliary_tasks=tasks)


def too_short(chosen: Measured, budget: float) -> str:
    """Return what to say where a budget allows fewer steps than a network of the chosen size needs.

    Args:
        chosen: the choice, the best that there is.
        budget: seconds asked for.
    """
    enough = budget * chosen.needed / max(chosen.steps, 1)
    return (
        f"time budget {format_duration(budget)} allows {chosen.steps} steps where {chosen.needed} are enough: expect a"
        f" weak model. About {format_duration(enough)} on this machine would be enough; a GPU or a smaller"
        " --patch-size makes steps faster"
    )


def _resolve(
    config: ConfigManager, chosen: Measured, budget: float, started: float
) -> dict[str, dict[str, Any]]:
    """Return the settings of a run with this choice in the time that remains since `started`."""
    training, plan = config.tr_config, chosen.candidate
    resolved = plan.applied_to(config)
    voxels = covered_voxels(resolved)  # builds the index of patches that the run needs anyway
    schedule = plan_schedule(resolved, chosen, budget - (time.perf_counter() - started))
    patches = schedule["max_epoch"] * schedule["max_steps_per_epoch"] * plan.batch_size * config.world_size
    strength = augment_strength(patches * math.prod(plan.patch_size) / voxels)
    where = f"{config.world_size} x {config.device.type}" if config.world_size > 1 else str(config.device)
    choice = (
        f"{format_duration(budget)} on {where}: {schedule['max_epoch']} x"
        f" {schedule['max_steps_per_epoch']} steps of {chosen.seconds:.3g} s"
    )
    logger.info("time budget: %s", choice)
    if training.warmup_epochs:
        schedule["warmup_epochs"] = min(training.warmup_epochs, schedule["max_epoch"] - 1)
    return {
        "tr_config": {
            "patch_size": list(plan.patch_size),
            "batch_size": plan.batch_size,
            "initial_lr": plan.learning_rate,
            "augment_strength": training.augment_strength
            if "augment_strength" in config.given["tr_config"]
            else strength,
            "time_budget_choice": choice,
            **schedule,
        },
        "model_config": {
            "features_per_stage": list(plan.features_per_stage),
            "n_blocks_per_stage": list(plan.blocks_per_stage),
            "separate_decoders": plan.separate_decoders,
        },
    }


def augment_strength(passes: float) -> float:
    """Return the strength of augmentation for a number of passes: 0 up to 25 passes, 1 from 1000 passes on.

    Args:
        passes: patches' voxels of the whole run, divided by the number of voxels to learn from.

    Returns:
        Fraction of the full probabilities; it rises with the logarithm of the passes.
    """
    share = math.log(max(passes, FEW_PASSES) / FEW_PASSES) / math.log(MANY_PASSES / FEW_PASSES)
    return round(min(1.0, share), 2)


def covered_voxels(config: ConfigManager) -> int:
    """Return the voxels of the training part that valid patches cover; each patch counts one step of the grid."""
    index = training_objects(config).get_parsed_content("train#index")
    whole = sum(
        math.prod(stop - start for start, stop in box)
        for boxes in config.split.train.values()
        for box in boxes
    )
    stride = config.dataset_config.patch_stride or [max(1, size // 2) for size in config.patch_size]
    return max(1, min(whole, len(index) * math.prod(stride)))


def _measure_all(config: ConfigManager, budget: float, started: float) -> list[Measured]:
    """Measure candidates until one gets too few steps or the time for measuring is over."""
    limit = min(MOST_MEASURING, MEASURING * budget)
    measured: list[Measured] = []
    for candidate in _within_memory(config):
        left = limit - _elapsed(config, started)
        if measured and left <= 0:
            break
        found = _measured(config, candidate, budget, started, left)
        if found is None:
            break
        measured.append(found)
        if found.steps < found.needed:
            break
    if not measured:
        raise VolumenError(KEY, "not even the smallest network fits into the device's memory")
    if max(entry.steps for entry in measured) < 1:
        raise VolumenError(
            KEY,
            expected=f"time for at least one step, which takes {format_duration(measured[0].seconds)} here",
            found=config.tr_config.time_budget,
            remedy="give more time, or a smaller --patch-size",
        )
    return measured


def _within_memory(config: ConfigManager) -> list[Candidate]:
    """Return the candidates that fit into the memory, or into that of a preset; at least one."""
    found, limit = candidates(config), memory_limit(config)
    fitting = list(takewhile(lambda candidate: fits(config, candidate, limit), found))
    if len(fitting) < len(found):
        logger.info(
            "time budget: %d of %d candidates fit into %.1f GiB of memory",
            len(fitting),
            len(found),
            (limit or 0) / 2**30,
        )
    return fitting or [smallest(config)]


def _elapsed(config: ConfigManager, started: float) -> float:
    """Return the seconds since `started`, those of the slowest process."""
    return distributed.largest(time.perf_counter() - started, config.device)


def _measured(
    config: ConfigManager, candidate: Candidate, budget: float, started: float, left: float
) -> Measured | None:
    """Measure a candidate within the seconds that are left; None if it does not fit into memory."""
    cost = measure(config, candidate, enough=max(left, 1.0) / 2)
    if cost is None:
        return None
    seconds = cost.per_step(
        candidate.batch_size,
        workers=config.workers,
        cpu_threads=_threads(config),
        cores=cores() / distributed.processes_here(),
    )
    steps = int((1 - RESERVE - VALIDATION) * (budget - _elapsed(config, started)) / seconds)
    return Measured(candidate, cost, seconds, steps)


def plan_schedule(config: ConfigManager, chosen: Measured, seconds: float) -> dict[str, Any]:
    """Divide the remaining time between epochs and validations.

    Args:
        config: the configuration with the chosen candidate.
        chosen: the choice and its cost.
        seconds: remaining time of the budget.

    Returns:
        The values of `max_epoch`, `max_steps_per_epoch`, `max_val_steps_per_epoch`, `final_val_steps`, `val_every_n`
        and `warmup_epochs`.
    """
    available = seconds * (1 - RESERVE)
    batches, part, whole = _validation_batches(config)
    each = chosen.cost.forward * VALIDATION_FACTOR * part
    share = VALIDATION * available
    if batches * each > share / FEWEST_VALIDATIONS:
        batches = max(1, int(share * (1 - FINAL) / FEWEST_VALIDATIONS / each))
    final = config.tr_config.final_val_steps
    ending = 0.0
    if config.validates and batches < whole:
        # The last and the best epoch are scored on the whole validation part if the time allows it.
        affordable = max(batches, int(share * FINAL / 2 / max(each, 1e-9)))
        final = min(affordable, final or affordable) if affordable < whole else final
        scored = whole if final is None else min(whole, final)
        ending = 2 * each * scored if scored > batches else 0.0
    left = max(share - ending, 0.0)
    validations = max(1, min(EPOCHS, int(left / max(each * batches, 1e-6)))) if config.validates else 0
    steps = max(1, int((available - ending - validations * each * batches) / chosen.seconds))
    per_epoch = max(1, min(MOST_STEPS_PER_EPOCH, steps // EPOCHS))
    epochs = max(1, steps // per_epoch)
    return {
        "max_epoch": epochs,
        "max_steps_per_epoch": per_epoch,
        "max_val_steps_per_epoch": max(1, batches),
        "final_val_steps": final,
        "val_every_n": max(1, math.ceil(epochs / max(1, validations))),
        "warmup_epochs": min(epochs - 1, max(1, epochs // 20)),
    }


def _validation_batches(config: ConfigManager) -> tuple[int, float, int]:
    """Return the batches of a validation within the setting's limit, one process's fraction, and all batches."""
    from volumen.data.sampling.validation_blocks import fitting_size, part_windows

    most, batch = config.tr_config.max_val_steps_per_epoch, config.tr_config.batch_size
    val, patch = config.split.val, config.patch_size
    windows = part_windows(val, patch, fitting_size(val, patch, None if most is None else most * batch))
    whole = math.ceil(int(windows.sum()) / batch)
    blocks, batches = len(windows), whole
    if most is not None and most < whole:
        blocks, batches = math.ceil(blocks * most / whole), most
    # Blocks are divided between the processes; with fewer blocks than processes each takes all of them.
    processes = config.world_size
    part = math.ceil(blocks / processes) / blocks if blocks >= processes else 1.0
    return max(1, batches), part, max(1, whole)


def table(measured: Sequence[Measured], chosen: Measured) -> str:
    """Format the candidates as a table: sizes, time per step, steps that fit and steps that are enough."""
    header = (
        "patch",
        "batch",
        "features",
        "blocks",
        "decoders",
        "parameters",
        "s/step",
        "steps",
        "enough",
        "",
    )
    rows: list[tuple[str, ...]] = [header]
    for entry in measured:
        plan = entry.candidate
        rows.append(
            (
                by(plan.patch_size),
                str(plan.batch_size),
                f"{plan.features_per_stage[0]}-{plan.features_per_stage[-1]}",
                ",".join(map(str, plan.blocks_per_stage)),
                "separate" if plan.separate_decoders else "shared",
                f"{entry.cost.parameters / 1e6:.1f}M",
                f"{entry.seconds:.3g}",
                str(entry.steps),
                str(entry.needed),
                "<- chosen" if entry is chosen else "",
            )
        )
    return "\n".join(aligned(rows))


def _threads(config: ConfigManager) -> int:
    import torch

    return 0 if config.device.type == "cuda" else torch.get_num_threads()


def _decided_before(config: ConfigManager) -> dict[str, dict[str, Any]] | None:
    """Return the settings that the resumed run's budget decided, from its snapshot; None without such a snapshot."""
    return decided_settings(config, "time_budget_choice", DECIDED)


def extended(kept: dict[str, dict[str, Any]], budget: float) -> dict[str, dict[str, Any]]:
    """Add the epochs for which a larger budget than that of the first run has time.

    As many as the first run planned per second of its budget, whose time for measuring candidates is a reserve now.

    Args:
        kept: what the budget of the first run decided.
        budget: seconds of all of the run, the part that is done included.

    Returns:
        The same with more epochs; as it is where the budget is not larger by an epoch.
    """
    training = kept["tr_config"]
    before, separator, rest = training["time_budget_choice"].partition(" on ")
    try:
        earlier = parse_duration(before)
    except ValueError:  # edited by hand
        return kept
    epochs = training["max_epoch"]
    more = math.floor(epochs * (budget - earlier) / earlier)
    if more < 1:
        return kept
    logger.info(
        "time budget: %s more than the %s of the resumed run are time for %s after its %d",
        format_duration(budget - earlier),
        before,
        counted(more, "epoch"),
        epochs,
    )
    rest = rest.replace(f": {epochs} x ", f": {epochs + more} x ", 1)
    choice = f"{format_duration(budget)}{separator}{rest}"
    return {**kept, "tr_config": {**training, "max_epoch": epochs + more, "time_budget_choice": choice}}


def _applied(config: ConfigManager, decided: dict[str, dict[str, Any]]) -> ConfigManager:
    return _without(config, decided["tr_config"].get("time_budget_left_out", ())).variant(
        tr_config=replace(config.tr_config, time_budget=None, preset=None, **decided["tr_config"]),
        model_config=replace(config.model_config, **decided["model_config"]),
    )
