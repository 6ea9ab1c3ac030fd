"""Reports a loss or gradient that is not a finite number, and stops the training after too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
        self._watched: list[_Watched] = []

    def watch_loss(
        self,
        engine: Any,
        batch: Mapping[str, Any],
        losses: Mapping[str, float],
        predictions: Any,
        bad: torch.Tensor,
    ) -> None:
        """Remember a step's losses, and the bool scalar on the device that says whether they are not finite."""
        place = {**_place(batch), "sums": _sample_sums([engine.state.output["image"], predictions])}
        self._watched.append(_Watched(_where(engine), place, losses, bad))

    def watch_gradient(self, engine: Any, batch: Mapping[str, Any], bad: torch.Tensor) -> None:
        """Remember whether a step's gradient is not finite although its loss is: a bool scalar on the device."""
        self._watched.append(_Watched(_where(engine), _place(batch), None, bad))

    def read_flags(self) -> None:
        """Report all steps watched since the last call that were skipped; every process must call this.

        Raises:
            VolumenError: more steps than allowed were skipped.
        """
        watched, self._watched = self._watched, []
        if not watched:
            return
        everywhere = distributed.gather(torch.stack([one.bad for one in watched]).tolist())
        for one, flags in zip(watched, zip(*everywhere)):
            if not any(flags):
                continue
            if one.losses is None:
                patches = ", ".join(distributed.gather(describe_patches(one.place, None)))
                self._skip(one.where, f"the gradient is not finite ({patches})")
            else:
                self._report_loss(one.where, one.place, one.losses, None)

    def report_loss(
        self, engine: Any, batch: Mapping[str, Any], losses: Mapping[str, float], predictions: Any
    ) -> None:
        """Report a loss that is not finite, in this process or in another; every process must call this.

        Raises:
            VolumenError: more steps than allowed were skipped.
        """
        self._report_loss(_where(engine), batch, losses, predictions)

    def _report_loss(
        self, where: str, batch: Mapping[str, Any], losses: Mapping[str, float], predictions: Any
    ) -> None:
        bad = [(name, value) for name, value in losses.items() if not math.isfinite(value)]
        # A target's sum is not finite if one of its losses is not, so the single losses are more informative.
        named = [item for item in bad if "/" in item[0]] or [item for item in bad if item[0] != "loss"] or bad
        what = ", ".join(_describe(name, value) for name, value in named)
        # Processes whose own losses are finite have nothing to report, but must skip the step too.
        messages = distributed.gather(f"{what} ({describe_patches(batch, predictions)})" if named else "")
        self._skip(where, "; ".join(filter(None, messages)))

    def report_gradient(self, engine: Any, batch: Mapping[str, Any]) -> None:
        """Report a gradient that is not finite although the loss is; every process must call this.

        Raises:
            VolumenError: more steps than allowed were skipped.
        """
        patches = ", ".join(distributed.gather(describe_patches(batch, None)))
        self._skip(_where(engine), f"the gradient is not finite ({patches})")

    def _skip(self, where: str, what: str) -> None:
        self.skipped += 1
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


@dataclass(frozen=True)
class _Watched:
    """A step whose values still lie on the device: where it is, its patches, its losses (None: its gradient)."""

    where: str
    place: Mapping[str, Any]
    losses: Mapping[str, float] | None
    bad: torch.Tensor


def _where(engine: Any) -> str:
    return f"epoch {engine.state.epoch}, iteration {engine.state.iteration}"


def _place(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: batch[key] for key in ("volume_name", "start") if key in batch}


@torch.no_grad()
def _sample_sums(values: Any) -> torch.Tensor:
    """Return sums (B, tensors) over the values of each sample; a sum is not finite if one of its values is not."""
    return torch.stack([tensor.float().flatten(1).sum(dim=1) for tensor in _tensors(values)], dim=1)


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
