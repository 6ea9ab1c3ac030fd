"""Computes the metrics of every target and the evaluator's key metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.utils.enums import CommonKeys as Keys

from volumen.data.sampling.regions import BLOCK_WEIGHT
from volumen.metrics.score_names import LABELS, checked_names, names_of
from volumen.metrics.target_metrics import CHEAP_METRICS, build_metrics
from volumen.metrics.whole_regions import WholeRegions
from volumen.transforms.decide import DECISIONS, DecideLabelsd
from volumen.utils import distributed
from volumen.utils.sample_keys import mask_key


class TargetScores(Metric):
    """Dice and IoU of labels, angles of directions, absolute errors of values, per target and class.

    The engine's output needs `pred` and `label` from `EvaluateStep`, its batch `volume_name`. Blocks of a volume count
    as parts of one case, each as many times as its `block_weight`. Labels are scored from `decisions` in the output;
    if no `DecideLabelsd` wrote them, they are computed from `pred`. The metric's own value, the key metric, is the
    mean Dice over the labelled targets, or NaN if no target is labelled; all other metrics go to
    `engine.state.metrics` under their names.

    Args:
        targets: name -> {"kind", "out_channels", "classes"}, as `build_metrics` takes them.
        spacing: voxel size in spatial order of volumes whose batches do not say theirs.
        names: of metrics besides those that cost one pass over the arrays, such as "hd95", "b1_error" or "voi_merge".
            They are measured on whole validation regions, whose labels are stored until the end of the validation.
        tolerance: of the surface Dice in units of the spacing; None: one voxel.
    """

    # Ignite sums the tensors named here over processes; our dictionaries are gathered in `compute`.
    _state_dict_all_req_keys: tuple[str, ...] = ()

    def __init__(
        self,
        targets: Mapping[str, Mapping[str, Any]],
        spacing: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        tolerance: float | None = None,
    ) -> None:
        self._kinds = {name: str(target["kind"]) for name, target in targets.items()}
        self._decide = DecideLabelsd(self._kinds)
        self._scores = build_metrics(targets, spacing, names=CHEAP_METRICS)
        given = checked_names(names or (), "tr_config.validation_metrics")
        wanted = [name for name in given if name not in names_of(LABELS, pieces=True)]
        self._regions = WholeRegions(targets, spacing, wanted, tolerance) if wanted else None
        self.values: dict[str, float] = {}
        super().__init__()

    def reset(self) -> None:
        """Clear all cases."""
        self._scores.reset()
        if self._regions is not None:
            self._regions.reset()

    def update(self, output: tuple[dict, dict, dict, list, list | None]) -> None:
        """Add a batch: predictions, labels, masks by target, the samples' volumes and weights."""
        predictions, labels, masks, volumes, weights = output
        self._scores.update(predictions, labels, masks, cases=volumes, weights=weights)

    def compute(self) -> float:
        """Return the mean Dice and store all values in `values`."""
        if distributed.is_distributed():
            states: list[Any] = [None] * distributed.world_size()
            dist.all_gather_object(states, self._scores.state())
            self._scores.reset()
            for state in states:
                self._scores.merge(state)
        self.values = self._scores.compute()
        if self._regions is not None:
            self._gather_regions(self._regions)
            self.values.update(self._regions.compute())
        return self.values.get("mean_dice", math.nan)

    @staticmethod
    def _gather_regions(regions: WholeRegions) -> None:
        """Send the blocks of all processes to every process."""
        if not distributed.is_distributed():
            return
        states: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(states, regions.state())
        regions.reset()
        for state in states:
            regions.merge(state)

    def running(self) -> dict[str, float]:
        """Return every metric over the blocks so far, of this process alone."""
        return self._scores.compute()

    def iteration_completed(self, engine: Engine, *_: Any) -> None:
        """Add the evaluator's last batch."""
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        labels, predictions = output[Keys.LABEL], output[Keys.PRED]
        weights = batch.get(BLOCK_WEIGHT)
        decisions = output.get(DECISIONS) or self._decide.decisions(predictions)
        self.update(
            (
                {**predictions, **decisions},
                {name: labels[name] for name in self._kinds if name in labels},
                {name: labels[mask_key(name)] for name in self._kinds if mask_key(name) in labels},
                list(batch["volume_name"]),
                None if weights is None else weights.tolist(),
            )
        )
        if self._regions is not None:
            self._store_labels(self._regions, decisions, labels, batch)

    @staticmethod
    def _store_labels(
        regions: WholeRegions,
        decisions: Mapping[str, Any],
        labels: Mapping[str, Any],
        batch: Mapping[str, Any],
    ) -> None:
        """Store the decided labels of a batch's blocks."""
        for name in regions.targets:
            if name not in decisions or name not in labels:
                continue
            mask = labels.get(mask_key(name))
            for i, volume in enumerate(batch["volume_name"]):
                regions.add(
                    name,
                    volume,
                    batch["start"][i].tolist(),
                    decisions[name][i].cpu().numpy(),
                    labels[name][i].cpu().numpy(),
                    None if mask is None else mask[i, 0].cpu().numpy(),
                    [float(side[i]) for side in batch["spacing"]] if "spacing" in batch else None,
                )

    def completed(self, engine: Engine, name: str, *_: Any) -> None:
        """Write every metric that has a value into the evaluator's state."""
        value = self.compute()
        engine.state.metrics.update({key: v for key, v in self.values.items() if not math.isnan(v)})
        engine.state.metrics[name] = value
