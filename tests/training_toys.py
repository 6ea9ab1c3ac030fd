"""A small network, data set and loss, and a whole training run with them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch.utils.data import DataLoader, Dataset, Sampler

from volumen.data.sampling.regions import RegionSampler
from volumen.engines.amp import AmpPolicy
from volumen.engines.batch import prepare_batch
from volumen.engines.evaluator import EvaluateStep
from volumen.engines.guard import NonFiniteGuard
from volumen.engines.optimizers import build_optimizer
from volumen.engines.schedules import build_scheduler
from volumen.engines.trainer import TrainStep
from volumen.handlers.checkpoint import Checkpointer
from volumen.handlers.early_stopping import EarlyStopping
from volumen.handlers.epochs import EpochStart, StepSchedule
from volumen.handlers.losses import LossAverages
from volumen.handlers.metric import KeyMetric
from volumen.handlers.random_state import SeedIterations, seed_everything
from volumen.handlers.records.logs import MetricsFile
from volumen.handlers.records.run_directory import RunDirectory
from volumen.handlers.records.snapshot import ConfigSnapshot
from volumen.handlers.rounds import NextRound
from volumen.handlers.running_dice import RunningDice
from volumen.handlers.scores import TargetScores
from volumen.handlers.signals import StopOnSignal
from volumen.handlers.validation import Validate
from volumen.handlers.weight_average import WeightAverage
from volumen.networks.placement import prepare_network
from volumen.transforms.decide import DecideLabelsd

SIDE = 8
TOY_TARGETS = {"ink": {"kind": "binary", "out_channels": 1}, "depth": {"kind": "field", "out_channels": 1}}
KINDS = {name: target["kind"] for name, target in TOY_TARGETS.items()}


class ToyNetwork(torch.nn.Module):
    """Two heads over one convolution, with dropout so that random numbers matter."""

    def __init__(self, features: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        self.final_config = {"features": features, "heads": ["ink", "depth"]}
        self.body = torch.nn.Conv2d(1, features, 3, padding=1)
        self.norm = torch.nn.InstanceNorm2d(features, affine=True)
        self.dropout = torch.nn.Dropout(dropout)
        self.ink = torch.nn.Conv2d(features, 1, 1)
        self.depth = torch.nn.Conv2d(features, 1, 1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.dropout(torch.relu(self.norm(self.body(image))))
        return {"ink": self.ink(features), "depth": self.depth(features)}


class ToyLoss(torch.nn.Module):
    """Cross-entropy and squared error, with the same components as the multi-task loss."""

    def __init__(self) -> None:
        super().__init__()
        self.components: dict[str, torch.Tensor] = {}
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        ink = torch.nn.functional.binary_cross_entropy_with_logits(
            outputs["ink"].float(), batch["ink"].float()
        )
        depth = torch.nn.functional.mse_loss(outputs["depth"].float(), batch["depth"])
        self.components = {
            "ink": ink.detach(),
            "ink/BCE": ink.detach(),
            "depth": depth.detach(),
            "depth/MSE": depth.detach(),
        }
        return ink + 0.5 * depth


class ToyData(Dataset):
    """Samples that are a pure function of (seed, epoch, index)."""

    def __init__(self, length: int = 8, poison: tuple[int, int] | None = None) -> None:
        self.length = length
        self.poison = poison

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        image = torch.rand(1, SIDE, SIDE, generator=generator)
        if self.poison == (epoch, index):
            image[0, 0, 0] = float("nan")
        return {
            "image": image,
            "ink": (image > 0.5).to(torch.uint8),
            "ink_mask": torch.ones(1, SIDE, SIDE, dtype=torch.bool),
            "depth": image - 0.5,
            "volume_name": f"scroll{index % 2}",
            "start": torch.tensor([epoch, index]),
        }


class ToySampler(Sampler):
    """The (epoch, index) pairs of one process, in order."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter([(self.epoch, index) for index in self.indices])

    def __len__(self) -> int:
        return len(self.indices)


def make_trainer(
    out: Path,
    *,
    epochs: int = 3,
    resume: Any = None,
    workers: int = 0,
    seed: int = 7,
    amp: str = "off",
    accumulation: int = 1,
    clip: float | None = 1.0,
    length: int = 8,
    batch_size: int = 2,
    scheduler: str = "cosine",
    poison: tuple[int, int] | None = None,
    max_skipped: int = 10,
    features: int = 4,
    dropout: float = 0.2,
    world: tuple[int, int] = (0, 1),
    digests: Mapping[str, str] | None = None,
    extra_handlers: Any = (),
    data: Dataset | None = None,
    optimizer: str = "AdamW",
    loss: Any = None,
    val_every: int = 1,
    ema: float | None = None,
    patience: int | None = None,
    stop_on_signal: bool = False,
    validation_delay: float = 0.0,
    validation_length: int = 4,
    scores: bool = False,
    network: torch.nn.Module | None = None,
    train_dice: bool = False,
    **checkpoint_options: Any,
) -> SupervisedTrainer:
    """Return a trainer with validation and all handlers that save and restore it, over toy data."""
    seed_everything(seed)
    network = prepare_network(network or ToyNetwork(features, dropout))
    loss = loss or ToyLoss()
    learned = list(loss.parameters())
    optim = build_optimizer(optimizer, network, lr=0.01, weight_decay=0.01, undecayed=learned)
    schedule = build_scheduler(scheduler, optim, epochs)
    policy = AmpPolicy(amp, "cpu")
    step = TrainStep(policy, gradient_clip=clip, guard=NonFiniteGuard(max_skipped))
    sampler = ToySampler(length, *world)
    data = data or ToyData(length, poison)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(
            ToyData(validation_length),
            batch_size=1 if scores else 2,
            sampler=RegionSampler(validation_length, rank=world[0], world_size=world[1]),
        ),
        key_val_metric={"mean_dice": TargetScores(TOY_TARGETS)} if scores else None,
        network=network,
        prepare_batch=prepare_batch,
        iteration_update=EvaluateStep(policy, loss_function=loss),
        decollate=False,
        val_handlers=[LossAverages()],
    )
    directory = RunDirectory(out, "toy", resume=bool(resume))
    checkpointer = Checkpointer(
        directory,
        network,
        optim,
        schedule,
        step=step,
        config={"tr_config": {"max_epoch": epochs}},
        data={"scroll/image": "data-1"} if digests is None else digests,
        resume=resume,
        **checkpoint_options,
    )
    if validation_delay:
        evaluator.add_event_handler(Events.ITERATION_STARTED, lambda _: time.sleep(validation_delay))
    handlers = [
        directory,
        NextRound(),
        SeedIterations(seed),
        EpochStart(sampler, [loss]),
        LossAverages("losses"),
        Validate(evaluator, val_every),
        MetricsFile(directory, optim),
        StepSchedule(schedule),
        WeightAverage(network, ema, evaluator),
        EarlyStopping(KeyMetric(), patience),
        checkpointer,
        ConfigSnapshot(directory, {"tr_config": {"max_epoch": epochs}}),
        *([StopOnSignal(checkpointer, evaluator)] if stop_on_signal else []),
        *extra_handlers,
    ]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
        ),
        network=network,
        optimizer=optim,
        loss_function=loss,
        prepare_batch=prepare_batch,
        iteration_update=step,
        accumulation_steps=accumulation,
        postprocessing=DecideLabelsd(KINDS) if train_dice else None,
        key_train_metric={"train/mean_dice": RunningDice(KINDS)} if train_dice else None,
        decollate=False,
        train_handlers=handlers,
    )
    trainer.toy_directory = directory
    trainer.toy_evaluator = evaluator
    return trainer


def weights(trainer: SupervisedTrainer) -> dict[str, torch.Tensor]:
    """Return a copy of the network's weights."""
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two sets of weights are bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
