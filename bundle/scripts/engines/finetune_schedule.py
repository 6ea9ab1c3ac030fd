"""Learning rates for a network whose encoder is pretrained and whose decoders are new."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from volumen.engines.schedules import Curve, Schedule, build_scheduler, named_curve, poly

logger = logging.getLogger(__name__)

ENCODER = "encoder"
PART = "part"
"""Key of an optimizer's parameter group that names the part of the network to which its parameters belong."""
FEWEST_EPOCHS = 5
"""A shorter run has no time for decoders alone."""


class FinetuneSchedule(Schedule):
    """First the decoders alone, then a warm-up of the whole network, then a curve.

    A new decoder's random gradients would destroy what the encoder has learned. So nnssl's authors train the decoder
    alone first, with a rate that rises and falls, then let the rate of the whole network rise, and then fall: the
    "sawtooth" of the code with which they fine-tune (`PretrainedTrainer_sawtooth` of github.com/TaWald/nnUNet, for Wald
    et al. 2024, arXiv:2412.17041), with 50 and 50 of 1000 epochs, or 15 and 15 of 150. The rate of the decoders rises
    linearly in the first half of their time and falls as a polynomial of power 0.9 in the second. Meanwhile the
    learning rate of the encoder is 0; its gradients already enter the averages of optimizers such as AdamW.

    Args:
        optimizer: the parameter groups with `group["part"] == "encoder"` wait.
        curve: factor as a function of progress from 0 to 1, after both warm-ups.
        total: number of steps of the whole run.
        share: share of the steps for the decoders alone, and for the warm-up of the whole network.
        alone: whether the decoders train alone first; False: only the warm-up of the whole network.
        warmup: fewest steps of that warm-up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        curve: Curve,
        total: int,
        *,
        share: float,
        alone: bool = True,
        warmup: int = 0,
    ) -> None:
        self.share, self.alone, self.least = share, alone, warmup
        super().__init__(optimizer, curve, total)

    @property
    def parts(self) -> tuple[int, int]:
        """Steps with the decoders alone, and the step at which the whole network is warm."""
        each = max(1, round(self.share * self.total)) if self.total >= FEWEST_EPOCHS else 0
        first = each if self.alone else 0
        return first, min(first + max(each, self.least), self.total - 1)

    def factor(self, step: int) -> float:
        """Return the fraction of the initial learning rate of the decoders at a step, 0 for the first."""
        alone, warm = self.parts
        if step < alone:
            rise = (alone + 1) // 2
            if step < rise:
                return (step + 1) / rise
            return poly()((step - rise) / (alone - rise))
        if step < warm:
            return (step - alone + 1) / (warm - alone + 1)
        return self.curve(min(1.0, (step - warm) / (self.total - warm)))

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the current learning rate of each parameter group."""
        waiting = self.last_epoch < self.parts[0]
        rates = super().get_lr()
        return [
            0.0 if waiting and group.get(PART) == ENCODER else rate
            for rate, group in zip(rates, self.optimizer.param_groups, strict=True)
        ]

    def words(self) -> str:
        """Return what the schedule does, for a log."""
        alone, warm = self.parts
        if not warm:
            return f"no warm-up, as {self.total} epochs are too few"
        first = f"decoders alone for {alone} epochs, then " if alone else ""
        return f"{first}all warm up for {warm - alone}, then the schedule, of {self.total} epochs"


def build_training_schedule(
    name: str | None,
    optimizer: Optimizer,
    total: int,
    *,
    warmup: int = 0,
    options: Mapping[str, Any] | None = None,
    finetune: str = "none",
    share: float = 0.1,
) -> Schedule:
    """Build the schedule of a training, which may start from a pretrained encoder.

    Args:
        name, optimizer, total, warmup, options: as for `build_scheduler`.
        finetune: `tr_config.finetune_schedule`; "sawtooth" or "warmup", else none.
        share: `tr_config.finetune_warmup`.

    Raises:
        VolumenError: as `build_scheduler`.
    """
    if finetune not in ("sawtooth", "warmup"):
        return build_scheduler(name, optimizer, total, warmup=warmup, options=options)
    curve, least = named_curve(name, total, warmup=warmup, options=options)
    schedule = FinetuneSchedule(
        optimizer, curve, total, share=share, alone=finetune == "sawtooth", warmup=least
    )
    logger.info("fine-tuning: %s", schedule.words())
    return schedule
