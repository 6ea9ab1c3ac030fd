"""Computes the Dice of the training patches, which reveals overfitting when compared with the validation's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from volumen.handlers.state import between_epochs, register_state
from volumen.transforms.decide import DECISIONS, LABEL_KINDS
from volumen.utils import distributed
from volumen.utils.sample_keys import mask_key


class RunningDice(Metric):
    """Mean over labelled targets of the Dice of an epoch's patches; each class's voxels of all patches are pooled.

    Patches are augmented and drawn by the sampler, and the network changes during the epoch, so the number lags behind
    the validation's and is no measure of quality. Classes that are neither present nor predicted do not count; if no
    class counts, the value is NaN. The engine's output must hold `decisions` from `DecideLabelsd`. Counts stay on the
    device.

    Args:
        kinds: target to kind.
        save_as: the name under which checkpoints store an unfinished epoch's counts.
        classes: number of classes of multiclass targets; without it every step reads the largest class present from
            the device.
    """

    # Ignite sums the tensors named here over processes; our dictionaries are summed in `_summed`.
    _state_dict_all_req_keys: tuple[str, ...] = ()

    def __init__(
        self,
        kinds: Mapping[str, str],
        save_as: str = "train_dice",
        classes: Mapping[str, int | None] | None = None,
    ) -> None:
        self.classes = dict(classes or {})
        self.kinds = {name: kind for name, kind in kinds.items() if kind in LABEL_KINDS}
        self.save_as = save_as
        self._counts: dict[str, Tensor] = {}
        super().__init__()

    def attach(self, engine: Engine, name: str, *_: Any) -> None:
        """Count after each iteration, and write the metric when the epoch ends."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.completed, name)
        register_state(engine, self.save_as, self)

    def _begin(self, engine: Engine) -> None:
        # An epoch that is resumed in its middle continues with its counts.
        if between_epochs(engine):
            self.reset()

    def reset(self) -> None:
        """Clear the counts."""
        self._counts = {}

    def update(self, output: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> None:
        """Add a batch: decisions by target, and labels with their masks."""
        decisions, labels = output
        for name, found in decisions.items():
            if name not in self.kinds or name not in labels:
                continue
            valid = labels.get(mask_key(name))
            counts = label_counts(found, labels[name], valid, self.kinds[name], self.classes.get(name))
            self._counts[name] = _widened(self._counts.get(name), counts)

    def compute(self) -> float:
        """Return the mean Dice over the targets, of all processes."""
        values = [dice(counts) for counts in self._summed().values()]
        defined = [value for value in values if not math.isnan(value)]
        return sum(defined) / len(defined) if defined else math.nan

    def iteration_completed(self, engine: Engine, *_: Any) -> None:
        """Add the trainer's last batch."""
        output: Any = engine.state.output
        self.update((output[DECISIONS], output[Keys.LABEL]))

    def completed(self, engine: Engine, name: str, *_: Any) -> None:
        """Write the value into the trainer's metrics."""
        engine.state.metrics[name] = self.compute()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the counts of the epoch so far."""
        return {name: counts.cpu() for name, counts in self._counts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the counts of a checkpoint."""
        self._counts = dict(state)

    def joined(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Add the counts of several processes."""
        together: dict[str, Any] = {}
        for state in states:
            for name, counts in state.items():
                together[name] = _widened(together.get(name), counts)
        return together

    def _summed(self) -> dict[str, Tensor]:
        flat = {
            f"{row} {column} {name}": float(value)
            for name, counts in self._counts.items()
            for row, entries in enumerate(counts.tolist())
            for column, value in enumerate(entries)
        }
        summed: dict[str, dict[tuple[int, int], float]] = {}
        for key, value in distributed.sum_over_ranks(flat).items():
            row, column, name = key.split(" ", 2)
            summed.setdefault(name, {})[int(row), int(column)] = value
        return {name: _table(entries) for name, entries in summed.items()}


def label_counts(
    found: Tensor, truth: Tensor, valid: Tensor | None, kind: str, classes: int | None = None
) -> Tensor:
    """Count, for each class, the voxels that are both predicted and true, predicted, and true.

    Args:
        found: the result of `decide`.
        truth: class indices (B, 1, *space), or 0 and 1 (B, C, *space).
        valid: bool (B, 1, *space), the valid voxels, or None for all.
        kind: binary, multiclass or multilabel.
        classes: number of classes of a multiclass target, which no valid voxel exceeds; None: as many as occur.

    Returns:
        int64 (classes without the background, 3).
    """
    if kind != "multiclass":
        true = truth > 0
        if valid is not None:
            found, true = found & (valid > 0), true & (valid > 0)
        axes = (0, *range(2, found.ndim))
        return torch.stack([(found & true).sum(axes), found.sum(axes), true.sum(axes)], dim=1)
    if classes is None:
        classes = int(torch.maximum(found.max(), truth.max())) + 1
    pairs = truth.long() * classes + found.long()
    if valid is not None:
        pairs = torch.where(valid > 0, pairs, classes * classes)
    # Not `bincount`, which reads the largest number from a GPU to know the size of its result.
    pairs = pairs.flatten()
    table = pairs.new_zeros(classes * classes + 1).index_add(0, pairs, torch.ones_like(pairs))
    table = table[: classes * classes].reshape(classes, classes)
    return torch.stack([table.diagonal(), table.sum(0), table.sum(1)], dim=1)[1:]


def dice(counts: Tensor) -> float:
    """Return the mean Dice over the classes that are predicted or true; NaN if there is none."""
    both, found, true = counts.double().unbind(dim=1)
    values = (2 * both / (found + true))[found + true > 0]
    return float(values.mean()) if len(values) else math.nan


def _widened(total: Tensor | None, counts: Tensor) -> Tensor:
    """Add two tables of counts that may have different numbers of classes."""
    if total is None:
        return counts
    total = total.to(counts.device)
    wide = counts.new_zeros((max(len(total), len(counts)), 3))
    wide[: len(total)] += total
    wide[: len(counts)] += counts
    return wide


def _table(entries: Mapping[tuple[int, int], float]) -> Tensor:
    table = torch.zeros((max(row for row, _ in entries) + 1, 3), dtype=torch.float64)
    for (row, column), value in entries.items():
        table[row, column] = value
    return table
