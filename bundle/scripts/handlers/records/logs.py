"""Writes an epoch's numbers to the console, `metrics.csv`, TensorBoard and progress bars."""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Workflow

from volumen.checkpoints.file import write_run_file
from volumen.handlers.records.run_directory import RunDirectory
from volumen.handlers.state import between_epochs, register_state
from volumen.metrics.units import metric_unit
from volumen.utils import distributed
from volumen.utils.device import READ_EVERY

logger = logging.getLogger(__name__)

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
FEWEST_BLOCKS = 4
"""Columns that are left for the bar itself."""


def epoch_numbers(engine: Workflow, learning_rate: float) -> dict[str, float]:
    """Return the learning rate and every number in `state.metrics`, sorted, the losses first."""
    metrics = {name: float(value) for name, value in engine.state.metrics.items()}
    names = sorted(metrics, key=lambda name: (not name.startswith("loss"), name))
    return {"learning_rate": learning_rate, **{name: metrics[name] for name in names}}


class _EpochLog:
    """Stores the learning rate that an epoch was trained with, since schedules step when the epoch ends."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._learning_rate = 0.0

    def attach(self, engine: Workflow) -> None:
        """Follow the trainer, in the first process only."""
        if not distributed.is_main():
            return
        register_state(engine, f"{type(self).__name__}.learning_rate", self)
        engine.add_event_handler(Events.EPOCH_STARTED, self._remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def _remember(self, engine: Workflow) -> None:
        # An epoch that is resumed in its middle retains the learning rate of its start.
        if between_epochs(engine):
            self._learning_rate = float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, float]:
        """Return the learning rate at the epoch's start."""
        return {"learning_rate": self._learning_rate}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the result of `state_dict`."""
        self._learning_rate = float(state["learning_rate"])

    def _epoch(self, engine: Workflow) -> None:
        self.log(engine, epoch_numbers(engine, self._learning_rate))

    def log(self, engine: Workflow, numbers: dict[str, float]) -> None:
        """Write an epoch's numbers."""
        raise NotImplementedError


class MetricsFile(_EpochLog):
    """Append each epoch's numbers to `metrics.csv`: epoch, iteration, learning rate, losses, metrics.

    The file holds no times, so that the file of a resumed run equals that of an uninterrupted one byte for byte.
    Resuming removes the rows after the checkpoint's epoch. A new column causes the whole file to be rewritten.

    Args:
        directory: the run's folder.
        optimizer: for the learning rate.
    """

    def __init__(self, directory: RunDirectory, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.directory = directory

    @property
    def path(self) -> Path:
        """Return the path of the file."""
        return self.directory.path / "metrics.csv"

    def attach(self, engine: Workflow) -> None:
        """Follow the trainer, in the first process only."""
        super().attach(engine)
        if distributed.is_main():
            engine.add_event_handler(Events.EPOCH_STARTED, self._truncate)

    def _truncate(self, engine: Workflow) -> None:
        rows = self.read()
        kept = [row for row in rows if int(row["epoch"]) < engine.state.epoch]
        if len(kept) < len(rows):
            self._write(kept)

    def log(self, engine: Workflow, numbers: dict[str, float]) -> None:
        """Write an epoch's row."""
        row = {"epoch": str(engine.state.epoch), "iteration": str(engine.state.iteration)}
        row.update({name: f"{value:.9g}" for name, value in numbers.items()})
        self._write([*self.read(), row])

    def read(self) -> list[dict[str, str]]:
        """Return the rows of the file; empty when there is no file."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]

    def _write(self, rows: list[dict[str, str]]) -> None:
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_run_file(self.path, text.getvalue().encode())


class TensorBoardLog(_EpochLog):
    """Log every loss, metric, learning rate, gradient norm and the patches per second to TensorBoard.

    Per iteration: the losses and the gradient norm ("iteration/..."). Per epoch: all columns of `metrics.csv`, and
    "patches_per_second". A `PreviewHandler` adds its pictures. Resuming hides what was logged after the
    checkpoint.

    Args:
        directory: the run's folder; events go to `tensorboard/` in it.
        optimizer: for the learning rate.
        every: iterations between points of the per-iteration curves.
    """

    def __init__(self, directory: RunDirectory, optimizer: torch.optim.Optimizer, *, every: int = 10) -> None:
        super().__init__(optimizer)
        self.directory = directory
        self.every = every
        self.writer: Any = None
        self._trainer: Workflow | None = None
        self._speed = Speed()

    def attach(self, engine: Workflow) -> None:
        """Follow the trainer, in the first process only."""
        super().attach(engine)
        if not distributed.is_main():
            return
        self._trainer = engine
        self._speed.attach(engine)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._iteration)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda _engine, _error: self._close())

    def _open(self, engine: Workflow) -> Any:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Opened at the first number, because a resumed run knows its iteration only then.
            self.writer = SummaryWriter(
                str(self.directory.path / "tensorboard"), purge_step=max(1, engine.state.iteration)
            )
        return self.writer

    def _iteration(self, engine: Workflow) -> None:
        output, writer = engine.state.output, self._open(engine)
        for name, value in output["losses"].items():
            writer.add_scalar(f"iteration/{name}", value, engine.state.iteration)
        if output.get("gradient_norm") is not None:
            writer.add_scalar("iteration/gradient_norm", output["gradient_norm"], engine.state.iteration)

    def log(self, engine: Workflow, numbers: dict[str, float]) -> None:
        """Write an epoch's points at its iteration."""
        writer = self._open(engine)
        for name, value in {**numbers, "patches_per_second": self._speed.epoch}.items():
            writer.add_scalar(name, value, engine.state.iteration)
        writer.flush()

    def add_image(self, tag: str, image: np.ndarray) -> None:
        """Log an image at the trainer's iteration, like every curve; does nothing before training has started.

        Args:
            tag: its name in TensorBoard.
            image: uint8 (height, width, 3).
        """
        if self._trainer is not None:
            step = self._trainer.state.iteration
            self._open(self._trainer).add_image(tag, image, global_step=step, dataformats="HWC")

    def _close(self) -> None:
        if self.writer is None:
            return
        try:
            self.writer.close()
        except OSError as error:
            # The disk is full; the run has ended, or ends with its own message.
            logger.warning("%s: the last points could not be written (%s)", self.directory.path, error)
        self.writer = None


class Speed:
    """Patches per second: the mean over the epoch, and a moving average over the last iterations.

    Only the time from an epoch's start to its last iteration counts, so validation and saving do not.
    """

    def __init__(self) -> None:
        self.epoch = 0.0
        self.now = 0.0
        self._patches = 0
        self._began = self._last = 0.0

    def attach(self, engine: Workflow) -> None:
        """Follow the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)

    def _start(self, engine: Workflow) -> None:
        self._began = self._last = time.perf_counter()
        self._patches = 0

    def _count(self, engine: Workflow) -> None:
        # A monotonic clock is used, so that setting the computer's time has no effect.
        now, patches = time.perf_counter(), len(engine.state.output["image"]) * distributed.world_size()
        self._patches += patches
        self.epoch = self._patches / max(now - self._began, 1e-9)
        latest = patches / max(now - self._last, 1e-9)
        self.now = latest if not self.now else 0.9 * self.now + 0.1 * latest
        self._last = now


class Progress(_EpochLog):
    """Show bars for training and validation on a terminal, and log two lines per epoch.

    The bar tells the epoch, how far it is and the time it still takes, and, as far as the terminal has room, the loss
    (smoothed over some ten steps), the Dice of the last validation and patches per second; during validation the loss
    and Dice of the blocks so far. Without a terminal (a file, a cluster's log) there is no bar, only the lines, which
    tell how long the rest of the run will take. While a bar is shown, log lines are written above it.

    Args:
        optimizer: for the learning rate.
        validator: the evaluator, whose progress is shown too.
        running: returns the validation's metrics so far by name, of which "mean_dice" is shown.
        stream: the output stream of the bars; standard error by default.
        show: True or False to force or forbid the bars; None shows them on a terminal.
        kinds: target to kind, for the units of errors.
        length: unit of surface distances.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        validator: Workflow | None = None,
        running: Callable[[], Mapping[str, float]] | None = None,
        stream: TextIO | None = None,
        show: bool | None = None,
        kinds: Mapping[str, str] | None = None,
        length: str = "voxels",
    ) -> None:
        super().__init__(optimizer)
        self.kinds = dict(kinds or {})
        self.length = length
        self.validator = validator
        self.running = running
        self.stream = stream
        self.show = show
        self._bar: Any = None
        self._redirect: Any = None
        self._speed = Speed()
        self._loss = Smoothed()
        self._last_dice: float | None = None
        self._began: tuple[float, int] | None = None

    def attach(self, engine: Workflow) -> None:
        """Follow the trainer and the evaluator, in the first process only."""
        if not distributed.is_main():
            return
        self._speed.attach(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        # The bar must end before the epoch's other handlers log their lines.
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_bar)
        engine.add_event_handler(Events.COMPLETED, self._end_bar)
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda _engine, _error: self._end_bar())
        if self.validator is not None:
            self.validator.add_event_handler(Events.EPOCH_STARTED, self._start_validation, engine)
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._advance_validation)
            self.validator.add_event_handler(Events.EPOCH_COMPLETED, self._end_bar)
        super().attach(engine)

    def _start_epoch(self, engine: Workflow) -> None:
        state = engine.state
        if self._began is None:
            self._began = time.perf_counter(), state.iteration
        self._show_bar(_epoch_name(engine), state.epoch_length, state.iteration % state.epoch_length, "step")

    def _start_validation(self, validator: Workflow, trainer: Workflow) -> None:
        self._end_bar()
        self._loss = Smoothed(share=None)
        self._show_bar(f"{_epoch_name(trainer)}, validation", validator.state.epoch_length, 0, "block")

    def _show_bar(self, name: str, total: int | None, done: int, unit: str) -> None:
        stream = self.stream or sys.stderr
        if not (stream.isatty() if self.show is None else self.show):
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            file=stream,
            leave=False,
            dynamic_ncols=True,
            unit=f" {unit}s",
            bar_format=BAR_FORMAT,
        )
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()

    def _advance(self, engine: Workflow) -> None:
        losses = engine.state.output["losses"]
        if losses.is_cheap or engine.state.iteration % READ_EVERY == 0:
            self._loss.add(losses["loss"])
        if self._bar is not None:
            self._show_numbers([*self._loss_and_dice(self._last_dice), f"{self._speed.now:.3g} patches/s"])

    def _advance_validation(self, validator: Workflow) -> None:
        if self._bar is not None:
            self._loss.add(validator.state.output.get("losses", {}).get("loss", math.nan))
            self._show_numbers(self._loss_and_dice(self.running().get("mean_dice") if self.running else None))

    def _loss_and_dice(self, dice: float | None) -> list[str]:
        parts = [] if math.isnan(self._loss.value) else [f"loss {self._loss.value:.4f}"]
        return parts if dice is None or math.isnan(dice) else [*parts, f"Dice {dice:.3f}"]

    def _show_numbers(self, parts: Sequence[str]) -> None:
        self._bar.set_postfix_str(", ".join(fitting(parts, self._bar)), refresh=False)
        self._bar.update()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._redirect.__exit__(None, None, None)

    def log(self, engine: Workflow, numbers: dict[str, float]) -> None:
        """Write an epoch's line, and one for its validation."""
        parts = [training_line(numbers)]
        self._loss = Smoothed()
        self._last_dice = numbers.get("val/mean_dice", self._last_dice)
        # An epoch that was resumed after its last step has no speed.
        if self._speed.epoch:
            parts.append(f"{self._speed.epoch:.3g} patches/s")
        if rest := self._rest(engine):
            parts.append(f"{span(rest)} left")
        logger.info("%s: %s", _epoch_name(engine), ", ".join(parts))
        scores = validation_line(numbers, self.kinds, self.length)
        if scores:
            logger.info("  validation: %s", scores)

    def _rest(self, engine: Workflow) -> float:
        """Return the estimated seconds for the rest of the run, at the mean speed of this process; 0 if unknown."""
        state = engine.state
        steps = state.iteration - self._began[1] if self._began else 0
        if not self._began or not steps:
            return 0.0
        pace = (time.perf_counter() - self._began[0]) / steps
        return pace * (state.max_epochs * state.epoch_length - state.iteration)


def fitting(parts: Sequence[str], bar: Any) -> list[str]:
    """Return as many of the first parts as a bar has room for beside its own numbers and a few blocks.

    Args:
        parts: texts, the most important first.
        bar: a `tqdm` bar of `BAR_FORMAT`.
    """
    columns = bar.dynamic_ncols(bar.fp)[0] if callable(bar.dynamic_ncols) else bar.ncols
    numbers = len(str(bar.total)) * 2 + len(": 100%|| / [00:00:00 left]")
    room = (columns or 80) - len(bar.desc) - numbers - FEWEST_BLOCKS
    kept: list[str] = []
    for part in parts:
        room -= len(part) + len(", ")
        if room < 0:
            break
        kept.append(part)
    return kept


class Smoothed:
    """An exponential moving average, which ignores NaN; NaN before the first value.

    Args:
        share: weight of the newest value; None is the plain mean.
    """

    def __init__(self, share: float | None = 0.1) -> None:
        self.share = share
        self.value = math.nan
        self._count = 0

    def add(self, value: float) -> None:
        """Include a value."""
        if math.isfinite(value):
            self._count += 1
            share = max(self.share or 0.0, 1 / self._count)
            self.value = value if self._count == 1 else self.value + share * (value - self.value)


def span(seconds: float) -> str:
    """Format a duration for people: "40 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _epoch_name(engine: Workflow) -> str:
    return f"epoch {engine.state.epoch}/{engine.state.max_epochs}"


def training_line(numbers: Mapping[str, float]) -> str:
    """Return the log line of an epoch's training: the loss, each target's loss, the learning rate."""
    targets = {name.split("/")[1]: value for name, value in numbers.items() if _is_target_loss(name)}
    losses = ", ".join(f"{_words(name)} {value:.4g}" for name, value in targets.items())
    loss = f"loss {numbers.get('loss', math.nan):.4g}"
    return (
        f"{loss} ({losses}), learning rate {numbers['learning_rate']:.3g}"
        if len(targets) > 1
        else (f"{loss}, learning rate {numbers['learning_rate']:.3g}")
    )


def validation_line(
    numbers: Mapping[str, float], kinds: Mapping[str, str] | None = None, length: str = "voxels"
) -> str:
    """Return what an epoch's validation gave, target by target; classes one by one are in the files.

    Args:
        numbers: metrics by name.
        kinds: target to kind, for the units of errors.
        length: unit of surface distances.
    """
    texts = []
    if "val/loss" in numbers:
        texts.append(f"loss {numbers['val/loss']:.4g}")
    scores: dict[str, list[str]] = {}
    for name, value in numbers.items():
        parts = name.split("/")
        if parts[0] == "val" and len(parts) == 3 and parts[1] != "loss":
            unit = metric_unit(parts[2], (kinds or {}).get(parts[1], ""), length)
            scores.setdefault(parts[1], []).append(f"{_words(parts[2])} {value:.3g} {unit}".rstrip())
    texts += [f"{_words(target)} {' '.join(values)}" for target, values in scores.items()]
    return ", ".join(texts)


def _is_target_loss(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "loss" and len(parts) == 2


def _words(name: str) -> str:
    return name.replace("_", " ")
