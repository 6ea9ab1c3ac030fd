"""One training step for MONAI's `SupervisedTrainer` (its `iteration_update`).

MONAI's own step is bound to CUDA for mixed precision, cannot clip gradients where they are complete, and
divides a partial group of accumulated batches by the full group's size. This one keeps MONAI's events and
output keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys

from volumen.engines.amp import AmpPolicy
from volumen.engines.guard import NonFiniteGuard
from volumen.engines.loss_values import loss_values
from volumen.engines.mean_teacher import MeanTeacher
from volumen.utils import distributed
from volumen.utils.memory import limit_kept_memory

logger = logging.getLogger(__name__)


class TrainStep:
    """Forward pass, loss, backward pass and, at the end of a group of accumulated batches, an optimizer step.

    The step reads `network`, `optimizer`, `loss_function`, `inferer`, `prepare_batch` and
    `accumulation_steps` of the trainer that runs it. Gradients are averaged over the group. The average equals the
    gradient of one large batch for losses that are means over samples or voxels, if each batch of the group has the
    same number of valid voxels (otherwise it is a mean of means). A group ends with the epoch, and a partial group is
    averaged over its own size.

    `engine.state.output` holds MONAI's keys `image`, `label`, `pred` (detached) and `loss` (detached scalar),
    and
    - `losses`: `LossValues`: `loss` (the total), each target and each `target/LossName`;
    - `stepped`: whether the optimizer stepped;
    - `gradient_norm`: the norm before clipping, None on steps that only accumulate.

    On a GPU a step that reads a value makes the host wait until the GPU has finished, and then the GPU wait for the
    host. With `read_every` above 1 and a fused optimizer no step does so: a loss or gradient that is not finite makes
    the optimizer leave its weights and state unchanged by a flag on the device, the guard learns of it every
    `read_every` steps and at the epoch's end, `gradient_norm` is a tensor, and `stepped` is always True. Other
    optimizers cannot be skipped on the device; with them every step reads the values.

    Unlabelled patches of a batch, if it has any, make a second forward and backward pass, of which no more memory is
    needed than of the labelled ones; their gradients are added, and `losses` has the weighted loss as "unlabelled".

    Args:
        amp: number format and gradient scaler.
        gradient_clip: maximum norm of the whole gradient; None or 0 does not clip.
        guard: handles a loss or gradient that is not finite; by default ten steps are skipped before
            training stops.
        read_every: steps between two reads of values from the device.
        teacher: teaches the network with the unlabelled patches; None: there are none.
    """

    def __init__(
        self,
        amp: AmpPolicy | None = None,
        *,
        gradient_clip: float | None = None,
        guard: NonFiniteGuard | None = None,
        read_every: int = 1,
        teacher: MeanTeacher | None = None,
    ) -> None:
        self.amp = amp or AmpPolicy("off")
        self.gradient_clip = gradient_clip or None
        self.guard = guard or NonFiniteGuard()
        self.read_every = read_every
        self.teacher = teacher
        self._group_failed = False
        self._bad_loss: torch.Tensor | None = None

    def __call__(self, engine: SupervisedTrainer, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run one iteration; the class describes the result."""
        image, targets = engine.prepare_batch(
            batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        first, last, size = accumulation_group(
            engine.state.iteration, engine.state.epoch_length, engine.accumulation_steps
        )
        engine.network.train()
        if first:
            engine.optimizer.zero_grad(set_to_none=True)
            self._group_failed, self._bad_loss = False, None
        views = None if self.teacher is None else self.teacher.take(targets)

        output: dict[str, Any] = {
            Keys.IMAGE: image,
            Keys.LABEL: targets,
            "stepped": False,
            "gradient_norm": None,
        }
        engine.state.output = output
        waits = self.read_every <= 1 or not skips_on_device(engine.optimizer)
        unlabelled = None if views is None else self._learn_unlabelled(engine, views, size)
        with distributed.without_gradient_sync(engine.network, active=not last):
            self._forward_and_backward(engine, batch, size, waits, unlabelled)
        if last and waits:
            self._finish_group(engine, batch)
        elif last:
            self._finish_group_on_device(engine, batch)
        if not waits and _ends_interval(engine, self.read_every):
            self.guard.read_flags()
        if self.teacher is not None:
            self.teacher.count_labels(targets)
            if _ends_epoch(engine):
                self.teacher.end_epoch(engine)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        limit_kept_memory()
        return output

    def _learn_unlabelled(
        self, engine: SupervisedTrainer, views: tuple[torch.Tensor, torch.Tensor], size: int
    ) -> torch.Tensor:
        """Add the gradients of the unlabelled patches; return their loss."""
        assert self.teacher is not None
        # The gradients are exchanged once, together with those of the labelled patches.
        with distributed.without_gradient_sync(engine.network, active=True):
            with self.amp.autocast():
                loss = self.teacher.loss(engine, views)
            self.amp.scaler.scale(loss / size).backward()
        return loss.detach()

    def _forward_and_backward(
        self,
        engine: SupervisedTrainer,
        batch: Mapping[str, Any],
        size: int,
        waits: bool,
        unlabelled: torch.Tensor | None = None,
    ) -> None:
        output = engine.state.output
        with self.amp.autocast():
            predictions = engine.inferer(output[Keys.IMAGE], engine.network)
            output[Keys.PRED] = predictions
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss = engine.loss_function(predictions, output[Keys.LABEL]).mean()
        output[Keys.LOSS] = loss
        engine.fire_event(IterationEvents.LOSS_COMPLETED)

        total = loss if unlabelled is None else loss.detach() + unlabelled
        output["losses"] = loss_values(total, engine.loss_function, unlabelled)
        # All processes must agree; otherwise some would wait forever for the gradients of the one that skips.
        if waits and distributed.any_rank(not math.isfinite(output["losses"]["loss"]), engine.state.device):
            self._group_failed = True
            self.guard.report_loss(engine, batch, output["losses"], predictions)
        else:
            self.amp.scaler.scale(loss / size).backward()
        if not waits:
            bad = ~torch.isfinite(total.detach())
            self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
            self.guard.watch_loss(engine, batch, output["losses"], predictions, bad)
        output[Keys.LOSS] = total.detach()
        output[Keys.PRED] = detach(predictions)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)

    def _finish_group(self, engine: SupervisedTrainer, batch: Mapping[str, Any]) -> None:
        if self._group_failed:
            engine.optimizer.zero_grad(set_to_none=True)
            return
        scaler, output = self.amp.scaler, engine.state.output
        scaler.unscale_(engine.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in engine.network.parameters() if p.grad is not None], self.gradient_clip or math.inf
        ).item()
        output["gradient_norm"] = norm
        if not math.isfinite(norm) and not scaler.is_enabled():
            engine.optimizer.zero_grad(set_to_none=True)
            self.guard.report_gradient(engine, batch)
            return
        # A scaler skips a step whose float16 gradients overflowed, and lowers its scale: this is normal and no
        # error.
        scaler.step(engine.optimizer)
        scaler.update()
        output["stepped"] = math.isfinite(norm)

    def _finish_group_on_device(self, engine: SupervisedTrainer, batch: Mapping[str, Any]) -> None:
        """Step, or skip the step by a flag on the device."""
        scaler, output = self.amp.scaler, engine.state.output
        optimizer: Any = engine.optimizer
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in engine.network.parameters() if p.grad is not None], self.gradient_clip or math.inf
        )
        output["gradient_norm"], output["stepped"] = norm, True
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
            return
        assert self._bad_loss is not None
        bad_norm = ~torch.isfinite(norm)
        skipped = distributed.largest_on_device((self._bad_loss | bad_norm).float())
        self.guard.watch_gradient(engine, batch, bad_norm & ~self._bad_loss)
        # The protocol of torch's GradScaler with fused optimizers: where `found_inf` is 1 they change nothing.
        optimizer.grad_scale, optimizer.found_inf = None, skipped
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state, the number of skipped steps, and the teacher's state if there is one."""
        state = {"scaler": self.amp.state_dict(), "guard": self.guard.state_dict()}
        return state if self.teacher is None else {**state, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.amp.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])
        if self.teacher is not None and "teacher" in state:
            self.teacher.load_state_dict(state["teacher"])


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a flag on the device can make an optimizer skip a step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _ends_interval(engine: SupervisedTrainer, every: int) -> bool:
    return engine.state.iteration % every == 0 or _ends_epoch(engine)


def _ends_epoch(engine: SupervisedTrainer) -> bool:
    length = engine.state.epoch_length
    return length is not None and engine.state.iteration % length == 0


def accumulation_group(iteration: int, epoch_length: int | None, steps: int) -> tuple[bool, bool, int]:
    """Return the position of an iteration in its group of accumulated batches.

    Args:
        iteration: the engine's count, 1 for the first of the run.
        epoch_length: iterations per epoch; a group never crosses the end of an epoch.
        steps: batches per group.

    Returns:
        Whether it is the first of its group, whether it is the last, and the number of batches in the group.
    """
    if epoch_length is None:
        position = iteration - 1
        return position % steps == 0, (position + 1) % steps == 0, steps
    position = (iteration - 1) % epoch_length
    size = min(steps, epoch_length - position // steps * steps)
    return position % steps == 0, (position + 1) % steps == 0 or position + 1 == epoch_length, size


def detach(predictions: Any) -> Any:
    """Return the same nested dictionaries and lists with tensors that are detached from the graph."""
    if isinstance(predictions, torch.Tensor):
        return predictions.detach()
    if isinstance(predictions, Mapping):
        return {key: detach(value) for key, value in predictions.items()}
    return [detach(value) for value in predictions]
