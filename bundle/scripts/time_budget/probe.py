"""Measures the peak memory of a training step on a GPU, with the run's own data and objects."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

logger = logging.getLogger(__name__)

STEPS = 2
"""The state of the optimizer exists from the second step on."""


def measured_peak(config: ConfigManager, memory: Any = None) -> int | None:
    """Run training steps and return the peak of the device's memory.

    Args:
        config: the configuration; its patches come from anywhere in the data.
        memory: what counts memory, by default `torch.cuda`: `reset_peak_memory_stats(device)`,
            `max_memory_reserved(device)` and `empty_cache()`.

    Returns:
        Bytes, the most of all processes; None if some process's device has too little memory.
    """
    import torch

    from volumen.losses.masking import this_rank_alone
    from volumen.time_budget.measure import anywhere, quiet, training_objects
    from volumen.time_budget.trial_step import TrialStep, collated
    from volumen.utils import distributed
    from volumen.utils.device import time_convolutions

    memory = memory or torch.cuda
    device = config.device
    devices = [device] if device.type == "cuda" else []
    time_convolutions(device, config.tr_setup.deterministic)
    peak, full = 0, False
    trial: TrialStep | None = None
    with torch.random.fork_rng(devices), quiet("volumen.data.index.patches"):
        parser = training_objects(anywhere(config))
        dataset = parser.get_parsed_content("train#dataset")
        samples = [dataset[(0, number % len(dataset))] for number in range(config.tr_config.batch_size)]
        memory.empty_cache()
        memory.reset_peak_memory_stats(device)
        try:
            with this_rank_alone():
                trial = TrialStep(config, parser)
                for _ in range(STEPS):
                    trial.step(collated(samples))
            peak = memory.max_memory_reserved(device)
        except torch.OutOfMemoryError:
            full = True
    # The network, its gradients and the data set.
    trial, parser, dataset, samples = None, None, None, []
    gc.collect()
    memory.empty_cache()
    if distributed.any_rank(full, device):
        return None
    return int(distributed.largest(peak, device))
