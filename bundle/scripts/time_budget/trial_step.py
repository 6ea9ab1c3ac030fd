"""Steps of a training, with the run's own network, losses and optimizer, that are measured and not trained further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from volumen.config.manager import ConfigManager


class TrialStep:
    """The network, losses and optimizer of a run, and the step that `TrainStep` makes of them.

    Args:
        config: the configuration of the run.
        parser: its objects, see `volumen.time_budget.measure.training_objects`.
    """

    def __init__(self, config: ConfigManager, parser: Any) -> None:
        from volumen.engines.amp import AmpPolicy
        from volumen.engines.optimizers import build_optimizer
        from volumen.networks.placement import memory_format

        training = config.tr_config
        self.device = config.device
        self._alone = parser.get_parsed_content("network_def").to(self.device).train()
        if training.channels_last:
            self._alone = self._alone.to(memory_format=memory_format(config.spatial_dims))
        self._network = self._alone
        self._loss = parser.get_parsed_content("loss")
        self._prepare = parser.get_parsed_content("prepare_batch")
        self._amp = AmpPolicy(training.amp, self.device)
        self._optimizer = build_optimizer(
            training.optimizer,
            params=self._network,
            lr=training.initial_lr,
            weight_decay=training.weight_decay,
            options=training.optimizer_kwargs,
            fused=config.fused_optimizer,
        )

    @property
    def parameters(self) -> int:
        """Number of parameters of the network with all heads."""
        return sum(weight.numel() for weight in self._alone.parameters())

    def join_processes(self) -> None:
        """Exchange gradients with the other processes from now on, if there are any."""
        from volumen.networks.placement import prepare_network

        self._network = prepare_network(self._alone, self.device)

    def step(self, batch: Mapping[str, Any]) -> None:
        """Run forward pass, losses, backward pass and update on a collated batch."""
        self._alone.train()
        image, targets = self._prepare(batch, self.device)
        self._optimizer.zero_grad(set_to_none=True)
        with self._amp.autocast():
            loss = self._loss(self._network(image), targets).mean()
        self._amp.scaler.scale(loss).backward()
        self._amp.scaler.step(self._optimizer)
        self._amp.scaler.update()

    def forward(self, batch: Mapping[str, Any]) -> None:
        """Run a batch through the network without gradients, as a validation does."""
        self._alone.eval()
        image, _ = self._prepare(batch, self.device)
        with torch.no_grad(), self._amp.autocast():
            self._alone(image)


def collated(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arrays and tensors of samples as one batch, with the patches that the device augments."""
    from torch.utils.data import default_collate

    from volumen.transforms.deferred import DeferredBatch
    from volumen.utils.sample_keys import DEFERRED

    batch: dict[str, Any] = {
        key: default_collate([sample[key] for sample in samples])
        for key, value in samples[0].items()
        if hasattr(value, "shape")
    }
    if DEFERRED in samples[0]:
        batch[DEFERRED] = DeferredBatch([sample[DEFERRED] for sample in samples])
    return batch
