"""Scores the last and the best epoch on the whole validation part when training ends."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator, Workflow

from volumen.checkpoints.file import load_checkpoint, write_run_file
from volumen.data.sampling.regions import RegionDataset
from volumen.handlers.checkpoint import Checkpointer
from volumen.handlers.records.logs import validation_line
from volumen.handlers.records.run_directory import RunDirectory
from volumen.handlers.state import registered_state
from volumen.handlers.validation import FINAL, PREFIX, run_validator
from volumen.handlers.weight_average import STATE as AVERAGE
from volumen.networks.placement import unwrap
from volumen.utils import distributed

logger = logging.getLogger(__name__)

FILE = "scores.json"


class FinalScores:
    """Score the last and the best epoch on the whole validation part; each epoch was scored on a random subset of it.

    The scores go to the log and to `<model_name>_scores.json`: for each epoch, what was scored and every metric.
    Weights, checkpoints and the choice of the best epoch do not change.

    Args:
        directory: the run's folder.
        network: the network, wrapped or not.
        validator: the evaluator.
        blocks: its data set.
        checkpointer: holds the best epoch and the metric that decides it.
        kinds: target to kind, for the units of errors in the log.
        length: unit of surface distances.
    """

    def __init__(
        self,
        directory: RunDirectory,
        network: torch.nn.Module,
        validator: Evaluator,
        blocks: RegionDataset,
        checkpointer: Checkpointer,
        kinds: Mapping[str, str] | None = None,
        length: str = "voxels",
    ) -> None:
        self.directory, self.network, self.validator = directory, network, validator
        self.blocks, self.checkpointer = blocks, checkpointer
        self.kinds, self.length = dict(kinds or {}), length

    def attach(self, engine: Workflow) -> None:
        """Score when the trainer has ended; after a signal before that, the resumed run does it."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.COMPLETED, self)

    def _forget(self, engine: Engine) -> None:
        """Delete the file of scores, because further training makes it outdated."""
        if distributed.is_main():
            self.directory.file(FILE).unlink(missing_ok=True)

    def __call__(self, engine: Engine) -> None:
        """Score the epochs that have no scores yet."""
        if not self.blocks.is_drawn or not engine.state.epoch:
            return
        last = engine.state.epoch
        best = int(self.checkpointer.ranking[0][1]) if self.checkpointer.ranking else last
        # All processes must agree on which epochs remain to be scored, and may not see the first one's disk.
        scored = distributed.broadcast(read_scores(self.directory.path) if distributed.is_main() else None)
        rows = {
            epoch: scored.get(epoch) or self._score(engine, epoch, last)
            for epoch in dict.fromkeys((best, last))
        }
        if not distributed.is_main():
            return
        content = {str(epoch): row for epoch, row in rows.items()}
        write_run_file(self.directory.file(FILE), (json.dumps(content, indent=1) + "\n").encode())
        for epoch, row in rows.items():
            logger.info(
                "%s epoch %d, %s: %s",
                "best" if epoch == best else "last",
                epoch,
                row["scored"],
                validation_line(
                    {PREFIX + name: value for name, value in row["metrics"].items()}, self.kinds, self.length
                ),
            )
        self._compare(engine, rows, best, last)

    def _compare(self, engine: Engine, rows: Mapping[int, Mapping[str, Any]], best: int, last: int) -> None:
        """Log it if the last epoch scores better than the epoch that the random subset called best."""
        metric = self.checkpointer.key_metric
        name = metric.resolve(engine)
        values = [rows[epoch]["metrics"].get(name.removeprefix(PREFIX)) for epoch in (best, last)]
        if best != last and None not in values and metric.better(values[1], values[0], engine):
            logger.warning(
                "on the whole validation part the last epoch is better than the best one, %s %.4g against %.4g: %s",
                name,
                values[1],
                values[0],
                self.directory.file(f"{last}.pth"),
            )

    def _score(self, engine: Engine, epoch: int, last: int) -> dict[str, Any]:
        """Return what was scored and the metrics of an epoch's weights."""
        logger.info("scoring epoch %d", epoch)
        with self._weights(engine, None if epoch == last else epoch), self._all_blocks():
            scored = self.blocks.describe()
            metrics = run_validator(self.validator, last)
        return {"scored": scored, "metrics": dict(sorted(metrics.items()))}

    def measure(self, engine: Workflow, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the metrics of other weights on the whole validation part; the network's own weights do not change."""
        with self._loaded(engine, weights, weights), self._all_blocks():
            return run_validator(self.validator, engine.state.epoch)

    def best_value(self, name: str) -> float | None:
        """Return a metric of the best epoch on the whole validation part; None if it was not measured.

        Args:
            name: of the key metric, without "val/".
        """
        if not self.checkpointer.ranking:
            return None
        value, epoch = self.checkpointer.ranking[0]
        if not self.blocks.is_drawn:
            return value
        scored = distributed.broadcast(read_scores(self.directory.path) if distributed.is_main() else None)
        return scored.get(int(epoch), {}).get("metrics", {}).get(name)

    @contextmanager
    def _weights(self, engine: Engine, epoch: int | None) -> Iterator[None]:
        """Load the weights of an epoch's checkpoint into the network for a `with` block; None leaves the weights."""
        if epoch is None:
            yield
            return
        weights, averaged = distributed.broadcast(self._best() if distributed.is_main() else None)
        with self._loaded(engine, weights, None if averaged is None else averaged["weights"]):
            yield

    @contextmanager
    def _loaded(
        self, engine: Engine, weights: Mapping[str, Any], averaged: Mapping[str, Any] | None
    ) -> Iterator[None]:
        """Load weights, and those of their moving average if there is one, for a `with` block."""
        network, average = unwrap(self.network), registered_state(engine).get(AVERAGE)
        own = {name: value.detach().clone() for name, value in network.state_dict().items()}
        own_average = None if average is None else average.state_dict()
        try:
            network.load_state_dict(weights)
            if average is not None and averaged is not None:
                average.load_state_dict({**average.state_dict(), "weights": averaged})
            yield
        finally:
            network.load_state_dict(own)
            if average is not None and own_average is not None:
                average.load_state_dict(own_average)

    def _best(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the weights of the best epoch, and the state of their average or None."""
        content = load_checkpoint(self.directory.file("best.pth"))
        return content["model"], content["handlers"].get(AVERAGE)

    @contextmanager
    def _all_blocks(self) -> Iterator[None]:
        """Let the evaluator run over all blocks within a `with` block, and restore its state afterwards."""
        state, loader = self.validator.state, cast(Sized, self.validator.data_loader)
        before = state.epoch_length, state.best_metric, state.best_metric_epoch
        self.blocks.final = True
        setattr(state, FINAL, True)
        state.epoch_length = len(loader)
        try:
            yield
        finally:
            self.blocks.final = False
            setattr(state, FINAL, False)
            state.epoch_length, state.best_metric, state.best_metric_epoch = before


def read_scores(run_folder: Path) -> dict[int, dict[str, Any]]:
    """Return the scores that `FinalScores` wrote into a run's folder, by epoch; empty without such a file."""
    for path in run_folder.glob(f"*_{FILE}"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {
                int(epoch): {"scored": str(row["scored"]), "metrics": _plain(row["metrics"])}
                for epoch, row in content.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: cannot be read (%s), so it is ignored", path, error)
    return {}


def _plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in metrics.items() if math.isfinite(value)}
