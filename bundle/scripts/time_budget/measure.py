"""What a training step of a candidate costs on this machine, measured on the run's own data and objects."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from scripts.time_budget.candidates import Candidate

if TYPE_CHECKING:
    import torch

    from scripts.config import ConfigManager

STEPS, PATCHES = 3, 6


@dataclass(frozen=True)
class Cost:
    """Seconds, and the size of the network.

    Args:
        step: one optimizer step on a batch that is ready: forward, losses, backward, update.
        patch: one patch read, augmented and given its derived targets.
        forward: one batch through the network without gradients.
        parameters: of the network, all heads.
    """

    step: float
    patch: float
    forward: float
    parameters: int

    def per_step(self, batch: int, *, workers: int, cpu_threads: int, cores: int) -> float:
        """Seconds between two steps of a run, the patches' preparation included.

        Args:
            batch: patches per step.
            workers: processes that prepare patches; 0: the training process itself.
            cpu_threads: threads in which the network runs; 0 on a GPU, which shares no core with the workers.
            cores: CPU cores that all of them share.
        """
        patches = batch * self.patch
        if not workers:
            return self.step + patches
        prepared = patches / min(workers, cores)
        if cpu_threads + workers <= cores:
            return max(self.step, prepared)
        # The network's threads wait for each other, so that a worker on one of their cores delays them all.
        return self.step + prepared


def measure(config: ConfigManager, candidate: Candidate, *, enough: float = 20.0) -> Cost | None:
    """Time a candidate.

    Args:
        config: the run's configuration.
        candidate: what to time.
        enough: seconds after which no more steps are taken; at least one is.

    Returns:
        Its cost, or None where the device's memory cannot hold it.
    """
    import torch

    devices = [config.device] if config.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _quiet("scripts.data.patches"):
        try:
            return _measure(candidate.applied_to(config), enough)
        except torch.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep what a logger tells of a run from being told of every candidate."""
    told = logging.getLogger(name)
    level = told.level
    told.setLevel(logging.WARNING)
    try:
        yield
    finally:
        told.setLevel(level)


def _measure(config: ConfigManager, enough: float) -> Cost:
    from torch.utils.data import default_collate

    parser = training_objects(_anywhere(config))
    dataset = parser.get_parsed_content("train#dataset")
    batch_size = config.tr_config.batch_size
    samples, seconds = [], []
    for number in range(max(batch_size, PATCHES) + 1):  # the first one opens files and compiles
        started = time.perf_counter()
        samples.append(dataset[(0, number)])
        seconds.append(time.perf_counter() - started)
    batch = {
        key: default_collate([sample[key] for sample in samples[1 : batch_size + 1]])
        for key, value in samples[0].items()
        if hasattr(value, "shape")
    }
    step, forward, parameters = _time_network(config, parser, batch, enough)
    return Cost(step, median(seconds[1:]), forward, parameters)


def training_objects(config: ConfigManager) -> Any:
    """A parser of the bundle's `train.yaml` whose objects are those of a configuration.

    Args:
        config: the configuration.
    """
    from monai.bundle import ConfigParser

    from scripts.bundle_root import configs_dir

    parser = ConfigParser()
    parser.read_config(str(configs_dir() / "train.yaml"))
    parser["config"] = config
    return parser


def _anywhere(config: ConfigManager) -> ConfigManager:
    """The configuration with patches from anywhere, whether they hold labels or not."""
    from scripts.data.split import make_split

    # Which patches are valid and which part validates changes no time, and may take long to find out.
    anywhere = config.variant(
        dataset_config=replace(
            config.dataset_config,
            skip_patch_validation=True,
            bg_sampling_enabled=False,
            class_oversampling=0.0,
        )
    )
    shapes = {case.name: case.image.shape for case in config.cases}
    anywhere.use_split(make_split(shapes, config.patch_size, 1.0, 0))
    return anywhere


def _time_network(
    config: ConfigManager, parser: Any, batch: dict[str, torch.Tensor], enough: float
) -> tuple[float, float, int]:
    import torch

    from scripts.engines.amp import AmpPolicy
    from scripts.engines.network import memory_format
    from scripts.engines.optimizers import build_optimizer

    training = config.tr_config
    network = parser.get_parsed_content("network_def").to(config.device).train()
    if training.channels_last:
        network = network.to(memory_format=memory_format(config.spatial_dims))
    loss_function = parser.get_parsed_content("loss")
    prepare_batch = parser.get_parsed_content("prepare_batch")
    amp = AmpPolicy(training.amp, config.device)
    optimizer = build_optimizer(
        training.optimizer,
        params=network,
        lr=training.initial_lr,
        weight_decay=training.weight_decay,
        options=training.optimizer_kwargs,
    )

    def step() -> None:
        image, targets = prepare_batch(batch, config.device)
        optimizer.zero_grad(set_to_none=True)
        with amp.autocast():
            loss = loss_function(network(image), targets).mean()
        amp.scaler.scale(loss).backward()
        amp.scaler.step(optimizer)
        amp.scaler.update()

    def forward() -> None:
        image, _ = prepare_batch(batch, config.device)
        with torch.no_grad(), amp.autocast():
            network(image)

    first = _seconds(step, config.device)  # allocates memory and chooses algorithms
    times = [first] if first > enough else []
    while len(times) < STEPS and first + sum(times) < enough:
        times.append(_seconds(step, config.device))
    network.eval()
    ahead = _seconds(forward, config.device) if first < enough else first / 3
    return median(times), ahead, sum(weight.numel() for weight in network.parameters())


def _seconds(work: Any, device: torch.device) -> float:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
