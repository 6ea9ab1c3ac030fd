"""Estimates the peak memory of a training step from shapes alone, without allocating it.

The network runs forward and backward on tensors that have a shape, a type and no values; every result counts from its
creation until nothing refers to it. Losses are run on a small random batch, and their memory is scaled by the number of
voxels; the state of the optimizer is that of a small tensor, scaled by the number of parameters.
`benchmarks/memory_fit.py` compares the estimate with measured peaks.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager

logger = logging.getLogger(__name__)

# Ratio of measured peaks to the sum of live tensors: memory inside of operations, and pieces of free memory that no
# tensor fits into. On a CPU the C library retains freed memory (`volumen.utils.memory`).
OVERHEAD = {"cpu": 1.25, "cuda": 1.1}
# What libraries take besides: of a GPU the context of CUDA, kernels and the work space of cuDNN.
CONTEXT = {"cpu": 32 * 2**20, "cuda": 600 * 2**20}
# Bytes per voxel and channel of the logits that a loss needs if it cannot be tried on random labels.
_LOSS_BYTES = 80
_TRIED_VOXELS = 4096
_SMALL = 1024


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step at its peak.

    Args:
        weights: the parameters.
        optimizer: the state of the optimizer.
        work: feature maps, gradients and the values inside of losses, at their largest.
        batch: the image, the labels and their masks.
        overhead: what the device needs besides, see `OVERHEAD` and `CONTEXT`.
        parameters: number of parameters.
    """

    weights: int
    optimizer: int
    work: int
    batch: int
    overhead: int
    parameters: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.optimizer + self.work + self.batch + self.overhead


def step_memory(config: ConfigManager) -> StepMemory:
    """Estimate the memory of a step with the patch, batch, network, losses and optimizer of a configuration.

    Args:
        config: the configuration.

    Returns:
        Bytes of one process, without what the process occupies before the training, and without its workers.
    """
    training, device = config.tr_config, config.device.type
    # Patches of a mean teacher make a pass of their own; those with pseudo-labels are part of the batch.
    labelled, unlabelled = training.batch_size, config.unlabelled_per_batch
    batch = max(labelled, unlabelled) if config.has_teacher else labelled + unlabelled
    patch = config.patch_size
    network = _network_memory(config, (batch, config.input_channels, *patch))
    voxels, weights = batch * math.prod(patch), network.weights
    stored, changing = _optimizer_factors(training.optimizer, training.optimizer_kwargs)
    # On a GPU torch updates all weights together, on a CPU one after the other.
    updated = weights + round(weights if device == "cuda" else changing * network.largest)
    work = max(network.peak, network.features + round(_loss_bytes(config) * voxels), updated)
    kept = round(stored * weights) + (weights if config.ema_decay else 0)
    labels = sum(target.out_channels + 1 for target in config.targets.values())
    views = 2 * config.in_channels + labels if config.has_teacher else 0
    given = 4 * voxels * (config.in_channels + labels + views)
    live = weights + kept + work + given
    extra = round((OVERHEAD.get(device, 1.1) - 1) * live) + CONTEXT.get(device, 0)
    return StepMemory(weights, kept, work, given, extra, network.parameters)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create inside the context, while they are referred to.

    Attributes:
        now: bytes at the moment.
        peak: the largest number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:  # a view, or a result in place
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class _NetworkMemory:
    """Bytes of the weights, of the largest of them, of what a forward pass leaves, and of forward and backward."""

    weights: int
    largest: int
    features: int
    peak: int
    parameters: int


def _network_memory(config: ConfigManager, shape: Sequence[int]) -> _NetworkMemory:
    from volumen.engines.amp import AmpPolicy
    from volumen.networks.recompute import recompute_activations

    amp = AmpPolicy(config.tr_config.amp, config.device)
    with FakeTensorMode(), torch.device(_shape_device(config.device)) as device:
        network = config.new_network().train()
        if config.tr_config.activation_checkpointing:
            recompute_activations(network)
        sizes = [weight.numel() * weight.element_size() for weight in network.parameters()]
        image = torch.empty(tuple(shape))
        with LiveBytes() as live:
            with torch.autocast(device.type, amp.dtype, enabled=amp.dtype is not None):
                outputs = network(image)
                total = sum(level.float().sum() for levels in outputs.values() for level in _levels(levels))
            features = live.now
            assert isinstance(total, torch.Tensor)
            total.backward()
        parameters = sum(weight.numel() for weight in network.parameters())
        return _NetworkMemory(sum(sizes), max(sizes), features, live.peak, parameters)


def _shape_device(device: torch.device) -> str:
    """Return the device whose rules of mixed precision apply; a build of torch without CUDA knows those of a CPU."""
    return "cuda" if device.type == "cuda" and torch.version.cuda is not None else "cpu"


def _levels(output: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else output


def _optimizer_factors(name: str, options: Mapping[str, Any]) -> tuple[float, float]:
    """Return the bytes of an optimizer's state, and those it needs during an update, per byte of the weights."""
    from volumen.engines.optimizers import build_optimizer

    weight = torch.nn.Parameter(torch.zeros(_SMALL))
    weight.grad = torch.ones(_SMALL)
    module = torch.nn.Module()
    module.weight = weight
    optimizer = build_optimizer(name, params=module, lr=1e-3, weight_decay=0.01, options=dict(options))
    optimizer.step()
    state = sum(
        value.numel() * value.element_size()
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    with LiveBytes() as live:
        optimizer.step()
    own = weight.numel() * weight.element_size()
    return state / own, live.peak / own


def _loss_bytes(config: ConfigManager) -> float:
    """Return the bytes that the losses need per voxel of a batch, beyond the logits, forward and backward."""
    from volumen.losses.multitask import MultiTaskLoss
    from volumen.losses.trial import tiny_target
    from volumen.utils.sample_keys import mask_key

    channels = sum(target.out_channels for target in config.targets.values())
    side = max(4, round(_TRIED_VOXELS ** (1 / config.spatial_dims)))
    size = tuple(min(side, length) for length in config.patch_size)
    sections = config.loss_sections
    random = torch.Generator().manual_seed(0)
    batch: dict[str, torch.Tensor] = {}
    outputs: dict[str, Any] = {}
    try:
        loss_function = MultiTaskLoss(
            {name: {**section, "validity": None} for name, section in sections.items()}
        )
        for name, section in sections.items():
            batch[name] = tiny_target(section["kind"], section["out_channels"], size, random)
            batch[mask_key(name)] = torch.ones(2, 1, *size, dtype=torch.bool)
            outputs[name] = [
                torch.randn(2, section["out_channels"], *level, requires_grad=True)
                for level in _level_sizes(config, size)
            ]
        with torch.random.fork_rng(devices=[]), LiveBytes() as live:
            loss_function(outputs, batch).mean().backward()
    except Exception as error:  # a loss of other people, or one that reads what is not made here
        logger.debug("losses are not measured: %s", error)
        return _LOSS_BYTES * channels
    return live.peak / (2 * math.prod(size))


def _level_sizes(config: ConfigManager, size: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the sizes of the levels of deep supervision for an image of this size."""
    sizes, current = [], tuple(size)
    for stride in config.plan.strides[: -1 if len(config.plan.strides) > 1 else None]:
        current = tuple(max(1, length // step) for length, step in zip(current, stride))
        sizes.append(current)
    return sizes if config.tr_config.enable_deep_supervision else sizes[:1]
