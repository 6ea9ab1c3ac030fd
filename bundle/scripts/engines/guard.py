"""Reports a loss or gradient that is not a finite number, and stops the training after too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from volumen.utils import distributed
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Report the patches with a NaN or infinity, skip that step, and stop training after too many skipped steps.

    Args:
        max_skipped: steps that may be skipped in the whole run; the next one stops it. 0 stops at once.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        if max_skipped < 0:
            raise ValueError(f"max_skipped must not be negative, got {max_skipped}")
        self.max_skipped = max_skipped
        self.skipped = 0

    def report_loss(
        self, engine: Any, batch: Mapping[str, Any], losses: Mapping[str, float], predictions: Any
    ) -> None:
        """Report a loss that is not finite, in this process or in another; every process must call this.

        Raises:
            VolumenError: more steps than allowed were skipped.
        """
        bad = [(name, value) for name, value in losses.items() if not math.isfinite(value)]
        # A target's sum is not finite if one of its losses is not, so the single losses are more informative.
        named = [item for item in bad if "/" in item[0]] or [item for item in bad if item[0] != "loss"] or bad
        what = ", ".join(_describe(name, value) for name, value in named)
        # Processes whose own losses are finite have nothing to report, but must skip the step too.
        messages = distributed.gather(f"{what} ({describe_patches(batch, predictions)})" if named else "")
        self._skip(engine, "; ".join(filter(None, messages)))

    def report_gradient(self, engine: Any, batch: Mapping[str, Any]) -> None:
        """Report a gradient that is not finite although the loss is; every process must call this.

        Raises:
            VolumenError: more steps than allowed were skipped.
        """
        patches = ", ".join(distributed.gather(describe_patches(batch, None)))
        self._skip(engine, f"the gradient is not finite ({patches})")

    def _skip(self, engine: Any, what: str) -> None:
        self.skipped += 1
        where = f"epoch {engine.state.epoch}, iteration {engine.state.iteration}"
        if self.skipped > self.max_skipped:
            raise VolumenError(
                where,
                f"{what}, after {self.max_skipped} skipped steps",
                remedy="look at that patch, lower tr_config.initial_lr, or set tr_config.gradient_clip",
            )
        logger.warning(
            "%s: %s; this step is skipped (%d of at most %d)",
            where,
            what,
            self.skipped,
            self.max_skipped,
        )

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps skipped so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the number of steps skipped so far."""
        self.skipped = int(state["skipped"])


def describe_patches(batch: Mapping[str, Any], predictions: Any) -> str:
    """Name volume and position of the samples with a value that is not finite, or of all samples if all are finite."""
    names, starts = batch.get("volume_name"), batch.get("start")
    if names is None:
        return "patch unknown"
    names = [names] if isinstance(names, str) else list(names)
    guilty = [i for i in range(len(names)) if not _sample_is_finite(i, batch, predictions)] or range(
        len(names)
    )
    return ", ".join(_describe_patch(names[i], None if starts is None else starts[i]) for i in guilty)


def _describe(name: str, value: float) -> str:
    target, _, loss = name.partition("/")
    if loss:
        return f"{loss} of target {target!r} is {value}"
    return f"the loss is {value}" if name == "loss" else f"the loss of target {target!r} is {value}"


def _describe_patch(name: str, start: Any) -> str:
    if start is None:
        return f"volume {name!r}"
    position = tuple(int(value) for value in torch.as_tensor(start).reshape(-1).tolist())
    return f"volume {name!r} at {position}"


def _sample_is_finite(sample: int, batch: Mapping[str, Any], predictions: Any) -> bool:
    tensors = [
        value for value in batch.values() if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    return all(
        bool(torch.isfinite(tensor[sample]).all())
        for tensor in [*tensors, *_tensors(predictions)]
        if tensor.ndim > 1 and len(tensor) > sample
    )


def _tensors(nest: Any) -> Iterator[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from _tensors(value)
    elif isinstance(nest, (list, tuple)):
        for value in nest:
            yield from _tensors(value)
