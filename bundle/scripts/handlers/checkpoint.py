"""Saves the state of a training in checkpoint files, and resumes a training from one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer

from volumen.checkpoints.comparison import changed_settings, differences
from volumen.checkpoints.file import (
    load_checkpoint,
    plain,
    save_checkpoint,
    writing_failed,
)
from volumen.handlers.fusion import FitFusion
from volumen.handlers.metric import KeyMetric
from volumen.handlers.random_state import random_state, set_random_state
from volumen.handlers.records.resumable import find_resumable
from volumen.handlers.records.run_directory import RunDirectory
from volumen.handlers.state import Stateful, restore_states, saved_states
from volumen.networks.placement import unwrap
from volumen.utils import distributed
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import replacing, sync_file
from volumen.version import __version__

logger = logging.getLogger(__name__)

FORMAT = 1


class Checkpointer:
    """Write `<model_name>_<epoch>.pth` after each epoch, and load a checkpoint when a run resumes.

    The file holds `model`, `optimizer`, `scheduler`, `epoch` and `model_config`, and what an exact resume
    needs: `iteration`, `scaler`, `rng`, `best_metric`, the state of every registered handler, and the
        experiment's `config`.
    It saves after all other handlers of an epoch, wherever it stands in the list. When the run ends, its last
    epoch is also `<model_name>_final.pth`. A trainer that runs again goes on from what it holds in memory.

    Args:
        directory: the run's folder.
        network: the network, wrapped or not; weights are saved without a wrapper's prefix.
        optimizer: its optimizer.
        scheduler: its schedule.
        step: the training step, for the gradient scaler and the count of skipped steps.
        config: the resolved experiment; it is saved in full and compared on resuming.
        data: a digest of each volume by name; compared on resuming.
        key_metric: decides which epochs are best.
        keep: number of epoch checkpoints to retain.
        best: number of best epochs to retain in addition: `<model_name>_best.pth`, and with more than one also
            `<model_name>_best_<epoch>.pth` for each.
        every: epochs between checkpoints; the last epoch is always saved.
        resume: "latest" or True continues from the newest complete checkpoint, a path continues from that file,
            None or False starts from the beginning.
        fusion: gives the rules by which labels are read from several heads after an epoch; `model_config` holds them.
    """

    def __init__(
        self,
        directory: RunDirectory,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful | None = None,
        *,
        step: Stateful | None = None,
        config: Mapping[str, Any] | None = None,
        data: Mapping[str, str] | None = None,
        key_metric: KeyMetric | None = None,
        keep: int = 10,
        best: int = 1,
        every: int = 1,
        resume: bool | str | os.PathLike | None = None,
        fusion: FitFusion | None = None,
    ) -> None:
        for name, value, least in (("keep", keep, 1), ("best", best, 0), ("every", every, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.directory = directory
        self.network = network
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.step = step
        self.config = plain(config or {})
        self.data = dict(data or {})
        self.key_metric = key_metric or KeyMetric()
        self.keep = keep
        self.best = best
        self.every = every
        self.resume = resume
        self.fusion = fusion
        #: The best epochs, the best one first: [metric, epoch].
        self.ranking: list[list[float]] = []
        self._chosen = ""  # what the best model is, if it is no epoch
        self._saved_iteration = -1
        self._restored = False

    def attach(self, engine: SupervisedTrainer) -> None:
        """Resume when the trainer starts, save when an epoch ends."""
        engine.add_event_handler(Events.STARTED, self._on_start)

    def _on_start(self, engine: SupervisedTrainer) -> None:
        self._chosen = ""
        if not engine.has_event_handler(self._on_epoch, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._on_epoch)
        if not engine.has_event_handler(self._on_end, Events.COMPLETED):
            engine.add_event_handler(Events.COMPLETED, self._on_end)
        if self.resume and not self._restored:
            self.restore(engine)
            self._restored = True

    def _on_end(self, engine: SupervisedTrainer) -> None:
        """Link the last epoch as the final model, and say where the best one is."""
        last = self.directory.file(f"{engine.state.epoch}.pth")
        if distributed.is_main() and last.is_file():
            link_atomically(last, self.directory.file("final.pth"))
        self._log_best(engine)

    def _log_best(self, engine: SupervisedTrainer) -> None:
        """Log the path of the best checkpoint, which is the one to predict with."""
        path = self.directory.file("best.pth")
        if self._chosen and distributed.is_main():
            logger.info("best model: %s: %s", self._chosen, path)
        elif self.ranking and distributed.is_main() and path.is_file():
            value, epoch = self.ranking[0]
            logger.info("best epoch: %d, %s %.4g: %s", epoch, self.key_metric.resolve(engine), value, path)

    def replace_best(self, file: str, said: str) -> None:
        """Make another file than an epoch's the best model, until the run goes on.

        Args:
            file: its name after the model's, which exists in the run's folder.
            said: what it is, for the log.
        """
        self._chosen = said
        if distributed.is_main():
            link_atomically(self.directory.file(file), self.directory.file("best.pth"))

    def _on_epoch(self, engine: SupervisedTrainer) -> None:
        epoch = engine.state.epoch
        self._rank_epoch(engine)
        last = epoch == engine.state.max_epochs or engine.should_terminate
        if last or epoch % self.every == 0 or self._is_best(epoch):
            self.save(engine)

    def save(self, engine: SupervisedTrainer) -> Path | None:
        """Save the epoch that has just ended. The first process writes; every process must call this.

        Returns:
            The file; None in the other processes, which send their part of the state to the first one.

        Raises:
            VolumenError: the disk is full or cannot be written; older checkpoints remain complete.
        """
        self._saved_iteration = engine.state.iteration
        handlers = saved_states(engine)
        if not distributed.is_main():
            return None
        path = save_checkpoint(
            self.content(engine, handlers), self.directory.file(f"{engine.state.epoch}.pth")
        )
        self.directory.interrupted.unlink(missing_ok=True)
        self.tidy()
        return path

    def save_interrupted(self, engine: SupervisedTrainer) -> Path | None:
        """Save the state after the last step as `<model_name>_interrupted.pth`, in the first process.

        If the last step of an epoch is done but the epoch's end (validation, logs) is not, the resumed run begins
        with that end.

        Returns:
            The file, or None when everything is saved already.
        """
        if engine.state.iteration in (0, self._saved_iteration):
            return None
        handlers = saved_states(engine)
        if not distributed.is_main():
            return None
        return save_checkpoint(self.content(engine, handlers, interrupted=True), self.directory.interrupted)

    def content(
        self, engine: SupervisedTrainer, handlers: Mapping[str, Any], *, interrupted: bool = False
    ) -> dict[str, Any]:
        """Return everything that a checkpoint holds.

        Args:
            engine: the trainer.
            handlers: the result of `saved_states(engine)`.
            interrupted: whether the current epoch has not ended yet.
        """
        state = engine.state
        done = (state.iteration - 1) // state.epoch_length if interrupted else state.epoch
        network = unwrap(self.network)
        best = self.ranking[0] if self.ranking else None
        step = self.step.state_dict() if self.step is not None else {}
        loss = getattr(engine, "loss_function", None)
        return plain(
            {
                "model": dict(network.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
                "epoch": done,
                "model_config": self._model_config(network, done),
                "config": self.config,
                "iteration": state.iteration,
                "epoch_length": state.epoch_length,
                "max_epochs": state.max_epochs,
                "scaler": step.get("scaler", {}),
                "step": step,
                "loss": dict(loss.state_dict()) if isinstance(loss, torch.nn.Module) else {},
                "rng": random_state(),
                "sampler": {"epoch": done, "batch": state.iteration - done * state.epoch_length},
                "best_metric": best[0] if best else None,
                "best_metric_epoch": int(best[1]) if best else None,
                "ranking": self.ranking,
                "ranking_metric": self.key_metric.name,
                "handlers": handlers,
                "data": self.data,
                "versions": {"volumen": __version__, "torch": torch.__version__},
                "format": FORMAT,
            }
        )

    def _model_config(self, network: torch.nn.Module, epoch: int) -> dict[str, Any]:
        """Return what builds the network for prediction, with the rules that the epoch's validation fitted."""
        config = dict(getattr(network, "final_config", {}))
        rules = self.fusion.rules(epoch) if self.fusion is not None else {}
        return {**config, "fusion": rules} if rules else config

    def restore(self, engine: SupervisedTrainer) -> None:
        """Continue from the checkpoint that `resume` names; with "latest" and no checkpoint, start from the beginning.

        Raises:
            VolumenError: the checkpoint is damaged, or it belongs to another architecture or data set.
        """
        path, content = self._find()
        if content is None:
            logger.info("nothing to resume in %s: training starts from the beginning", self.directory.path)
            return
        for line in differences(content, unwrap(self.network), self.data, path):
            logger.warning("%s", line)
        for line in changed_settings(content["config"], self.config):
            logger.info("changed since the checkpoint: %s", line)
        unwrap(self.network).load_state_dict(content["model"])
        restore_optimizer(self.optimizer, content["optimizer"], path)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["scheduler"])
        if self.step is not None:
            self.step.load_state_dict(content["step"])
        loss = getattr(engine, "loss_function", None)
        if content["loss"] and isinstance(loss, torch.nn.Module):
            restore_loss(loss, content["loss"], path)
        self._restore_ranking(content, path)
        self._restore_position(engine, content, path)
        restore_states(engine, content["handlers"])
        set_random_state(content["rng"])
        distributed.barrier()
        if distributed.is_main():
            self._set_aside_newer(content["epoch"], path)
            self.tidy()
        logger.info(
            "resumed from %s: epoch %d, iteration %d", path, engine.state.epoch, engine.state.iteration
        )
        if content["sampler"]["batch"] == content["epoch_length"]:
            # This must run after the STARTED handlers of all other objects, because it runs their epoch's end.
            engine.add_event_handler(Events.STARTED, self._end_interrupted_epoch)
        elif not content["sampler"]["batch"]:
            self._saved_iteration = engine.state.iteration
            if content["epoch"] >= engine.state.max_epochs:
                logger.info("all %d epochs are done; train on with a larger max_epoch", content["epoch"])

    def _restore_ranking(self, content: Mapping[str, Any], path: Path) -> None:
        """Restore the values of the best epochs, unless they are values of another metric than this run's."""
        earlier = content.get("ranking_metric")
        if self.key_metric.replaces(earlier):
            logger.warning(
                "%s: its best epoch was chosen by %s, this run chooses by %s, so it compares only the epochs from here"
                " on",
                path,
                earlier,
                self.key_metric.name,
            )
            return
        self.ranking = [[value, int(epoch)] for value, epoch in content["ranking"]]

    def _end_interrupted_epoch(self, engine: SupervisedTrainer) -> None:
        """Run the end of an epoch that was interrupted after its last step: validation, logs, checkpoint."""
        engine.remove_event_handler(self._end_interrupted_epoch, Events.STARTED)
        engine.fire_event(Events.EPOCH_COMPLETED)

    def _find(self) -> tuple[Path, dict[str, Any] | None]:
        if self.resume is True or self.resume == "latest":
            found = find_resumable(self.directory)
            return found if found is not None else (self.directory.path, None)
        path = Path(self.resume)  # type: ignore[arg-type]
        return path, load_checkpoint(path)

    def _restore_position(self, engine: SupervisedTrainer, content: Mapping[str, Any], path: Path) -> None:
        length, batch = engine.state.epoch_length, content["sampler"]["batch"]
        if batch and length != content["epoch_length"]:
            raise VolumenError(
                path,
                "was saved in the middle of an epoch",
                expected=f"{content['epoch_length']} steps per epoch",
                found=length,
                remedy="keep max_steps_per_epoch and batch_size, or resume from an epoch's checkpoint",
            )
        engine.state.epoch = content["epoch"] + (1 if batch == length else 0)
        engine.state.iteration = content["epoch"] * length + batch

    def _rank_epoch(self, engine: SupervisedTrainer) -> None:
        value, epoch = self.key_metric.value(engine), engine.state.epoch
        if value is None or not self.best:
            return
        # An epoch that is trained again after resuming replaces its earlier entry.
        ranking = [[value, epoch]] + [entry for entry in self.ranking if entry[1] < epoch]
        sign = 1 if self.key_metric.smaller_is_better(engine) else -1
        self.ranking = sorted(ranking, key=lambda entry: (sign * entry[0], entry[1]))[: self.best]

    def _is_best(self, epoch: int) -> bool:
        return any(entry[1] == epoch for entry in self.ranking)

    def tidy(self) -> None:
        """Delete epoch checkpoints until only the newest and the best remain.

        The method can be repeated after a crash at any point. The best are linked before any epoch's file is deleted.
        """
        self._link_best()
        checkpoints = self.directory.checkpoints()
        for _, path in checkpoints[: -self.keep]:
            path.unlink(missing_ok=True)

    def _set_aside_newer(self, epoch: int, resumed: Path) -> None:
        """Rename the checkpoints of later epochs than the resumed one, which do not belong to the new history."""
        newer = [path for number, path in self.directory.checkpoints() if number > epoch]
        interrupted = self.directory.interrupted
        if interrupted.is_file() and interrupted.resolve() != resumed.resolve():
            newer.append(interrupted)
        for path in newer:
            logger.warning("%s: is later than what is resumed, renamed to %s.old", path, path.name)
            path.replace(path.with_name(f"{path.name}.old"))

    def _link_best(self) -> None:
        links: dict[Path, Path] = {}
        for place, (_, epoch) in enumerate(self.ranking):
            source = self.directory.file(f"{int(epoch)}.pth")
            if place == 0:
                links[self.directory.file("best.pth")] = source
            if self.best > 1:
                links[self.directory.file(f"best_{int(epoch)}.pth")] = source
        for target, source in links.items():
            if source.is_file():
                link_atomically(source, target)
        for path in self.directory.path.glob(f"{self.directory.model_name}_best_*.pth"):
            if path not in links:
                path.unlink(missing_ok=True)


def link_atomically(source: Path, target: Path) -> None:
    """Give a file a second name that replaces what had it; a copy where the file system knows no links."""
    if target.is_file() and target.samefile(source):
        return  # renaming one name of a file to another does nothing and leaves both
    try:
        with replacing(target) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
                sync_file(temporary)
    except OSError as error:
        raise writing_failed(target, error) from error


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: Path) -> None:
    """Restore an optimizer's state, but with the options (learning rate, decay, ...) of this run's
    configuration.

    Raises:
        VolumenError: the state belongs to another optimizer, or to one over other parameters.
    """
    fresh = optimizer.state_dict()
    if _layout(saved) != _layout(fresh):
        raise VolumenError(
            path,
            "was saved with another optimizer",
            remedy="resume with the same tr_config.optimizer and loss_balancing, or load weights alone with --finetune",
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": fresh["param_groups"]})


def restore_loss(loss: torch.nn.Module, saved: Mapping[str, Any], path: Path) -> None:
    """Restore the learned state of a loss, such as the weights of its targets.

    Raises:
        VolumenError: the state belongs to another balancing, or to one over other targets.
    """
    try:
        loss.load_state_dict(saved)
    except RuntimeError as error:
        raise VolumenError(
            path,
            "was saved with another loss balancing",
            remedy="resume with the same tr_config.loss_balancing and targets, or load weights alone with --finetune",
        ) from error


def _layout(state: Mapping[str, Any]) -> list[tuple[int, list[str]]]:
    """Return the number of parameters and the names of the options of each parameter group."""
    return [(len(group["params"]), sorted(group)) for group in state["param_groups"]]
