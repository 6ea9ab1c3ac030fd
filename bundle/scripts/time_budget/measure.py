"""Measures the cost of a candidate's training step on this machine, with the run's own data and objects.

Several processes measure together: each on its own GPU, or on the cores that it shares with the others, and with the
exchange of gradients, as in the training. All of them receive the same numbers, those of the slowest process.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from volumen.time_budget.candidates import Candidate

if TYPE_CHECKING:
    import torch

    from volumen.config.manager import ConfigManager
    from volumen.utils.boxes import Box

STEPS, PATCHES = 3, 6
_MOST_PATCHES = 32
"""Patches side by side, per axis, of the part of a volume in which costs are measured."""


@dataclass(frozen=True)
class Cost:
    """Times in seconds, and the size of the network.

    Args:
        step: one optimizer step on a prepared batch: forward, losses, backward, update, also of unlabelled patches.
        patch: reading, augmenting and deriving the targets of one labelled patch and its share of the unlabelled ones.
        forward: one batch through the network without gradients.
        parameters: number of parameters of the network with all heads.
    """

    step: float
    patch: float
    forward: float
    parameters: int

    def per_step(self, batch: int, *, workers: int, cpu_threads: int, cores: float) -> float:
        """Return the seconds between two steps of a run, including the preparation of patches.

        Args:
            batch: patches per step.
            workers: processes that prepare patches; 0: the training process itself.
            cpu_threads: threads in which the network runs; 0 on a GPU, which shares no core with the workers.
            cores: CPU cores that all of them share; with several processes, this process's part of the machine's
                cores, which may be less than one.
        """
        patches = batch * self.patch
        if not workers:
            return self.step + patches
        # With fewer cores than processes, the measured time of a patch already includes the slowdown.
        prepared = patches / max(1.0, min(workers, cores))
        if not cpu_threads or cpu_threads + workers <= cores:
            return max(self.step, prepared)
        # The network's threads wait for each other, so a worker on one of their cores delays them all.
        return self.step + prepared


def measure(config: ConfigManager, candidate: Candidate, *, enough: float = 20.0) -> Cost | None:
    """Measure a candidate's cost. All processes do it at the same time.

    Args:
        config: the run's configuration.
        candidate: the candidate to measure.
        enough: seconds after which no further step starts; at least one step runs. The same in all processes.

    Returns:
        Its cost, the same in all processes, or None if it does not fit into the memory of some process's device.
    """
    import torch

    from volumen.utils import distributed
    from volumen.utils.device import time_convolutions
    from volumen.utils.memory import freed_memory_kept

    time_convolutions(config.device, config.tr_setup.deterministic)  # as the training will do
    devices = [config.device] if config.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        quiet("volumen.data.index.patches"),
        freed_memory_kept(config.device),
    ):
        try:
            return _measure(candidate.applied_to(config), enough)
        except torch.OutOfMemoryError:
            if distributed.is_distributed():
                raise  # after the step that tests the memory the other processes wait for this one
            return None
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Suppress a logger's messages about each candidate's data."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _measure(config: ConfigManager, enough: float) -> Cost | None:
    from volumen.time_budget.trial_step import collated
    from volumen.utils import distributed

    parser = training_objects(anywhere(config))
    dataset = parser.get_parsed_content("train#dataset")
    batch_size = config.tr_config.batch_size
    samples, seconds = [], []
    for number in range(max(batch_size, PATCHES) + 1):  # the first one opens files and compiles
        started = time.perf_counter()
        # The data set may have fewer samples than are measured here.
        samples.append(dataset[(0, (number * config.world_size + config.rank) % len(dataset))])
        seconds.append(time.perf_counter() - started)
        if not number:
            distributed.barrier()
    network = _time_network(config, parser, collated(samples[1 : batch_size + 1]), enough)
    if network is None:
        return None
    step, forward, parameters = network
    patch = distributed.largest(median(seconds[1:]), config.device)
    # Of an unlabelled patch the teacher, if there is one, makes a forward pass, and the network a step.
    more, taught = config.unlabelled_per_batch / batch_size, forward if config.has_teacher else 0.0
    return Cost(step + more * (step + taught), (1 + more) * patch, forward, parameters)


def training_objects(config: ConfigManager) -> Any:
    """Return a parser of the bundle's configs, such as `train.yaml`, whose objects use a configuration.

    Args:
        config: the configuration.
    """
    from monai.bundle import ConfigParser

    from volumen.utils.bundle_root import configs_dir

    parser = ConfigParser()
    parser.read_config([str(configs_dir() / name) for name in config.bundle_configs])
    parser["experiment"] = parser["config"] = config
    return parser


def anywhere(config: ConfigManager) -> ConfigManager:
    """Return the configuration with patches from everywhere, with or without labels."""
    from volumen.data.sampling.split import make_split

    # Finding the valid patches and the validation part may take long, and does not change the time of a step.
    settings = replace(
        config.dataset_config, skip_patch_validation=True, bg_sampling_enabled=False, class_oversampling=0.0
    )
    shapes = {case.name: case.image.shape for case in config.cases}
    split = make_split(shapes, config.patch_size, 1.0, 0)
    most = [_MOST_PATCHES * size for size in config.patch_size]
    train = {name: [_middle(box, most) for box in boxes] for name, boxes in split.train.items()}
    return config.variant(dataset_config=settings, split=replace(split, train=train))


def _middle(box: Box, most: Sequence[int]) -> Box:
    """Cut the middle out of a box: the patches of all of a huge volume would not fit in memory."""
    middle = []
    for (start, stop), size in zip(box, most):
        low = start + max(0, stop - start - size) // 2
        middle.append((low, min(stop, low + size)))
    return tuple(middle)


def _time_network(
    config: ConfigManager, parser: Any, batch: dict[str, torch.Tensor], enough: float
) -> tuple[float, float, int] | None:
    import torch

    from volumen.losses.masking import this_rank_alone
    from volumen.time_budget.trial_step import TrialStep
    from volumen.utils import distributed

    trial = TrialStep(config, parser)

    def step() -> None:
        trial.step(batch)

    def forward() -> None:
        trial.forward(batch)

    # The first step allocates memory and chooses algorithms. In it no process waits for another, so that a process
    # whose memory is too small can report it to the others.
    first, full = 0.0, False
    try:
        with this_rank_alone():
            first = _seconds(step, config.device)
    except torch.OutOfMemoryError:
        full = True
    if distributed.any_rank(full, config.device):
        return None
    first = distributed.largest(first, config.device)
    times = [first] if first > enough else []
    trial.join_processes()
    while len(times) < STEPS and first + sum(times) < enough:
        times.append(distributed.largest(_seconds(step, config.device), config.device))
    ahead = (
        distributed.largest(_seconds(forward, config.device), config.device) if first < enough else first / 3
    )
    return median(times), ahead, trial.parameters


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
