"""One evaluation step for MONAI's `SupervisedEvaluator` (its `iteration_update`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys

from volumen.engines.amp import AmpPolicy
from volumen.engines.loss_values import loss_values
from volumen.networks.placement import local_network


class EvaluateStep:
    """Predict with the evaluator's inferer in the device's number format, also on a CPU.

    No step waits for another process, so each may have its own number of batches.

    `engine.state.output` holds `image`, `label`, `pred` (float32) and, with a loss function, `loss` and
    `losses` as in `TrainStep`.

    Args:
        amp: number format.
        loss_function: computes the validation loss; None computes no loss.
    """

    def __init__(self, amp: AmpPolicy | None = None, *, loss_function: Callable | None = None) -> None:
        self.amp = amp or AmpPolicy("off")
        self.loss_function = loss_function

    def __call__(self, engine: SupervisedEvaluator, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run one iteration; the class describes the result."""
        image, targets = engine.prepare_batch(
            batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        output: dict[str, Any] = {Keys.IMAGE: image, Keys.LABEL: targets}
        engine.state.output = output
        with engine.mode(engine.network), self.amp.autocast():
            output[Keys.PRED] = _float32(engine.inferer(image, local_network(engine.network)))
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        if self.loss_function is not None:
            with torch.no_grad(), _eval_mode(self.loss_function):
                output[Keys.LOSS] = self.loss_function(output[Keys.PRED], targets).mean()
            output["losses"] = loss_values(output[Keys.LOSS], self.loss_function)
            engine.fire_event(IterationEvents.LOSS_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return output


@contextmanager
def _eval_mode(loss_function: Callable) -> Iterator[None]:
    """Prevent a loss that balances its targets from learning from validation data."""
    if not isinstance(loss_function, torch.nn.Module):
        yield
        return
    training = loss_function.training
    loss_function.eval()
    try:
        yield
    finally:
        loss_function.train(training)


def _float32(predictions: Any) -> Any:
    if isinstance(predictions, torch.Tensor):
        return predictions.float()
    return {name: value.float() for name, value in predictions.items()}
