"""`volumen train --folds K`: trains a network per fold, one after the other or several at once.

The folder of the run holds `ensemble.json` (its members), `splits.json` (what trains and validates in each fold),
`experiment.yaml` (the settings of all members), a run per fold and `out_of_fold/`, what each fold's network predicts of
the part that it has not seen. The same command goes on where an earlier one ended, however that ended.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from volumen.cli.running.launch import SIGNALS, send
from volumen.config.experiment_file import SECTION_NAMES
from volumen.inference.run_files import ENSEMBLE, OUT_OF_FOLD
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically
from volumen.utils.files.process_lock import LockHeldError, ProcessLock
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

SPLITS, EXPERIMENT = "splits.json", "experiment.yaml"
MEMBER: tuple[str, ...] = (sys.executable, "-m", "volumen.cli.member")
"""The process of a fold."""
OUT_OF_FOLD_SHARE = 0.05
"""Share of a time budget for the predictions of what the folds have not seen."""
WAIT_SECONDS = 600
"""How long a process of an earlier command, which has lost its parent, may take to save and end."""


def train_folds(options: argparse.Namespace, sections: Mapping[str, Any], origin: str) -> int:
    """Train every fold that is not trained yet, and predict what each has not seen.

    Args:
        options: the parsed options of `volumen train`.
        sections: the merged sections.
        origin: name of the file that they come from.

    Returns:
        Exit code: 0 when all is done, that of a fold that failed, 130 or 143 when a signal stopped it.

    Raises:
        VolumenError: settings that do not go together, or a folder of another experiment.
    """
    if "RANK" in os.environ:
        raise VolumenError(
            "--folds",
            "starts its own processes, so torchrun cannot start it",
            remedy="call volumen train --folds alone",
        )
    if options.folds < 2:
        raise VolumenError("--folds", expected="at least 2", found=options.folds)
    if sections["dataset_config"].get("fold"):
        raise VolumenError("--folds", "trains every fold, and --fold names one", remedy="give one of them")
    if options.resume:
        raise VolumenError(
            "--resume",
            "names one checkpoint",
            remedy="leave the file out: every fold goes on from its newest one",
        )
    folder = run_folder(options, sections)
    with locked(folder):
        plan = _plan(options, sections, origin, folder)
        return Supervisor(plan, options).run()


def run_folder(options: argparse.Namespace, sections: Mapping[str, Any]) -> Path:
    """Return the folder of a run that consists of several.

    Raises:
        VolumenError: none is given.
    """
    output = options.output or sections["tr_setup"].get("ckpt_out_base")
    if not output:
        raise VolumenError(
            "-o/--output", "no output folder is given", remedy="give -o or tr_setup.ckpt_out_base"
        )
    return Path(output) / sections["tr_setup"]["model_name"]


@dataclass
class Plan:
    """What is trained.

    Args:
        folder: of the run.
        count: folds.
        seed: of the first fold; each further one has the next.
        budget: seconds for all of it; None for no limit.
        parallel: folds at once.
        record: content of `ensemble.json`.
    """

    folder: Path
    count: int
    seed: int
    budget: float | None
    parallel: int
    record: dict[str, Any] = field(default_factory=dict)

    def name(self, number: int) -> str:
        """The name of a fold's run and folder."""
        return f"fold_{number}"

    def save(self) -> None:
        """Write `ensemble.json`."""
        write_atomically(self.folder / ENSEMBLE, (json.dumps(self.record, indent=1) + "\n").encode())

    def is_trained(self, number: int) -> bool:
        """Whether a fold's training is finished."""
        name = self.name(number)
        return (self.folder / name / f"{name}_final.pth").is_file()

    def is_predicted(self, number: int) -> bool:
        """Whether what a fold has not seen is predicted."""
        return number in self.record["predicted"]

    def seconds_of(self, number: int) -> float | None:
        """Return the time budget of a fold, which it keeps when it is continued."""
        if self.budget is None:
            return None
        given = self.record["budgets"].get(str(number))
        if given is None:
            started = len(self.record["budgets"])
            spent = sum(self.record["spent"].values()) / self.parallel
            rounds = math.ceil((self.count - started) / self.parallel)
            left = max(self.budget - spent, 0.0)
            given = max(1.0, left / rounds * (1 - OUT_OF_FOLD_SHARE))
            self.record["budgets"][str(number)] = given
            self.save()
        return float(given)

    def add_seconds(self, number: int, seconds: float) -> None:
        """Record time that was spent on a fold."""
        self.record["spent"][str(number)] = self.record["spent"].get(str(number), 0.0) + seconds
        self.save()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder of the run, so that no second command trains the same folds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = ProcessLock(folder / ".lock")
    except LockHeldError as error:
        raise VolumenError(folder, f"is being trained by {error}", remedy="wait for it") from None
    except OSError as error:
        raise VolumenError(
            folder, f"cannot be written to ({error.strerror})", remedy="give another -o"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _plan(options: argparse.Namespace, sections: Mapping[str, Any], origin: str, folder: Path) -> Plan:
    """Return the plan of the folder, made where there is none.

    Raises:
        VolumenError: the folder holds another run, or folds of other settings.
    """
    from volumen.time_budget.duration import parse_duration

    given = dict(sections)
    text = sections["tr_config"].get("time_budget")
    settings = shared_sections(given, options)
    budget = None
    if text is not None:
        try:
            budget = parse_duration(text)
        except ValueError:
            raise VolumenError(
                "tr_config.time_budget", expected="a time above 0, such as 35m or 12h", found=repr(text)
            ) from None
    plan = Plan(folder, options.folds, int(settings["tr_setup"]["seed"] or 0), budget, _parallel(options))
    asked = {"folds": options.folds, "time_budget": text, "split": _chooses(sections["dataset_config"])}
    if (folder / ENSEMBLE).is_file():
        plan.record = json.loads((folder / ENSEMBLE).read_text(encoding="utf-8"))
        _refuse_other(folder, asked, plan.record, settings)
        done = sum(map(plan.is_trained, range(plan.count)))
        logger.info("%s: going on, %d of %d folds are trained", folder, done, plan.count)
        return plan
    refuse_foreign_files(folder, (".lock", SPLITS, EXPERIMENT))
    splits, fingerprint = _splits(options, sections, origin)
    write_atomically(folder / SPLITS, (json.dumps(splits, indent=1) + "\n").encode())
    write_atomically(folder / EXPERIMENT, yaml.safe_dump(settings, sort_keys=False).encode())
    plan.record = {
        "members": [plan.name(number) for number in range(plan.count)],
        **asked,
        "fingerprint": fingerprint,
        "budgets": {},
        "spent": {},
        "predicted": [],
    }
    plan.save()
    return plan


def wait_for(run: Path, stopped: Callable[[], bool] = lambda: False) -> None:
    """Wait until a process that an earlier command has left behind has saved its run and ended.

    Args:
        run: folder of the run.
        stopped: whether to give up.
    """
    if not run.is_dir():
        return
    until, told = time.monotonic() + WAIT_SECONDS, False
    while time.monotonic() < until and not stopped():
        try:
            ProcessLock(run / ".lock").release()
            return
        except LockHeldError as error:
            if not told:
                logger.info("%s: waiting for %s, which saves it and ends", run, error)
            told = True
            time.sleep(0.5)


def refuse_foreign_files(folder: Path, ours: Sequence[str]) -> None:
    """Refuse a folder with other files than an interrupted start leaves.

    Raises:
        VolumenError: names such a file.
    """
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if foreign:
        raise VolumenError(
            folder,
            f"holds other files, such as {foreign[0]}",
            remedy="choose another --model-name or output folder",
        )


def shared_sections(
    sections: Mapping[str, Any], options: argparse.Namespace, *, keeps_split: bool = False
) -> dict[str, Any]:
    """Return the settings that all runs of a folder share, as plain values.

    Args:
        sections: the merged sections.
        options: the parsed options of `volumen train`.
        keeps_split: leave the settings of the split as they are.
    """
    settings = {name: dict(sections[name]) for name in SECTION_NAMES}
    settings["tr_config"].update(time_budget=None)
    settings["tr_setup"].update(resume=False, ckpt_out_base=None)
    data = options.input or settings["dataset_config"].get("data_path")
    several = [data] if isinstance(data, str) else list(data or [])
    settings["dataset_config"]["data_path"] = several[0] if len(several) == 1 else several or None
    if not keeps_split:
        settings["dataset_config"].update(group_by=None, split_path=None, fold=None)
    return settings


def _chooses(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: data.get(key) for key in ("split_path", "group_by")}


def _refuse_other(
    folder: Path, asked: Mapping[str, Any], record: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Refuse a command that asks for something else than what the folder holds."""
    differing = next((key for key in asked if asked[key] != record.get(key)), None)
    if differing is None:
        former = yaml.safe_load((folder / EXPERIMENT).read_text(encoding="utf-8"))
        differing = next(
            (
                f"{section}.{key}"
                for section, values in settings.items()
                for key in {**values, **former.get(section, {})}
                if values.get(key) != former.get(section, {}).get(key)
            ),
            None,
        )
    if differing is not None:
        raise VolumenError(
            folder,
            f"holds folds that were started with another {differing}",
            remedy="give the same command to go on, or another --model-name or output folder",
        )


def _splits(
    options: argparse.Namespace, sections: Mapping[str, Any], origin: str
) -> tuple[list[dict[str, Any]], str]:
    """Return the split of each fold, and the fingerprint of the data."""
    from volumen.config.manager import ConfigManager

    settings: dict[str, Any] = {name: dict(sections[name]) for name in SECTION_NAMES}
    settings["tr_setup"].update(resume=False)
    config = ConfigManager(**settings, dataset_dir=options.input, origin=origin)
    return [split.to_dict() for split in config.folds(options.folds)], config.fingerprint


def _parallel(options: argparse.Namespace) -> int:
    """Return how many folds are trained at once: --nproc, else one for each GPU that is not named."""
    if options.nproc > 1:
        return min(options.nproc, options.folds)
    if (options.device or "auto") not in ("auto", "cuda"):
        return 1
    import torch

    return max(1, min(torch.cuda.device_count(), options.folds)) if torch.cuda.is_available() else 1


@dataclass
class Running:
    """A process of a fold."""

    number: int
    process: subprocess.Popen
    device: str
    since: float
    trains: bool


class Supervisor:
    """Runs the processes of the folds, and passes signals on to them.

    Args:
        plan: what is trained.
        options: the parsed options of `volumen train`.
    """

    def __init__(self, plan: Plan, options: argparse.Namespace) -> None:
        self.plan, self.options = plan, options
        self.running: list[Running] = []
        self.signals: list[int] = []
        self.code = 0

    def run(self) -> int:
        """Run until all folds are trained and predicted, one fails, or a signal stops them; return an exit code."""
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        former = {number: signal.signal(number, self._receive) for number in heard}
        waiting = [n for n in range(self.plan.count) if not self.plan.is_predicted(n)]
        try:
            while (waiting and not self.code and not self.signals) or self.running:
                while waiting and len(self.running) < self.plan.parallel and not (self.code or self.signals):
                    self._start(waiting.pop(0))
                self._collect()
                time.sleep(0.05)
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if self.signals:
            return 128 + self.signals[0]
        if not self.code:
            self._tell_end()
        return self.code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = not self.signals
        self.signals.append(number)
        for entry in self.running:
            send(entry.process, number, first)

    def _start(self, number: int) -> None:
        used = {entry.device for entry in self.running}
        device = self.options.device or "auto"
        if self.plan.parallel > 1 and device in ("auto", "cuda") and self._gpus():
            device = next(f"cuda:{n}" for n in range(self._gpus()) if f"cuda:{n}" not in used)
        self._launch(number, device, trains=not self.plan.is_trained(number))

    def _gpus(self) -> int:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def _launch(self, number: int, device: str, *, trains: bool) -> None:
        plan, name = self.plan, self.plan.name(number)
        if trains:
            wait_for(plan.folder / name, lambda: bool(self.signals))
            logger.info("fold %d of %d: training in %s", number, plan.count, plan.folder / name)
            words = ["train", *self._train_words(number, device)]
        else:
            logger.info("fold %d of %d: predicting what it has not seen", number, plan.count)
            words = ["predict", str(plan.folder / name), str(plan.folder / OUT_OF_FOLD), device]
        words += [flag for flag in ("--quiet", "--verbose") if getattr(self.options, flag[2:])]
        # Several at once would write across each other.
        log = (plan.folder / f"{name}.log").open("ab") if plan.parallel > 1 else None
        process = subprocess.Popen(
            [*MEMBER, *words],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        if log is not None:
            log.close()
        self.running.append(Running(number, process, device, time.monotonic(), trains))
        if self.signals:
            send(process, self.signals[0], first=True)

    def _train_words(self, number: int, device: str) -> list[str]:
        plan, options = self.plan, self.options
        words = [
            "--config-path", str(plan.folder / EXPERIMENT), "-o", str(plan.folder),
            "--model-name", plan.name(number), "--seed", str(plan.seed + number), "--device", device,
            "--split", str(plan.folder / SPLITS), "--fold", f"{number}/{plan.count}", "--resume",
        ]  # fmt: skip
        for overlay in options.config_file:
            words += ["--config-file", overlay]
        if options.tracking:
            words += ["--tracking", options.tracking]
        seconds = plan.seconds_of(number)
        return words if seconds is None else [*words, "--time-budget", f"{seconds:.0f}s"]

    def _collect(self) -> None:
        for entry in list(self.running):
            code = entry.process.poll()
            if code is None:
                continue
            self.running.remove(entry)
            assert entry.process.stdin is not None
            entry.process.stdin.close()
            self.plan.add_seconds(entry.number, time.monotonic() - entry.since)
            if code:
                self.code = self.code or (128 - code if code < 0 else code)
                if not self.signals:
                    self._stop_others(entry)
            elif entry.trains and not self.signals:
                self._launch(entry.number, entry.device, trains=False)
            elif not entry.trains:
                self.plan.record["predicted"].append(entry.number)
                self.plan.save()

    def _stop_others(self, failed: Running) -> None:
        logger.error(
            "fold %d of %d failed; give the same command again to go on%s",
            failed.number,
            self.plan.count,
            f", and see {self.plan.folder / self.plan.name(failed.number)}.log"
            if self.plan.parallel > 1
            else "",
        )
        for entry in self.running:
            send(entry.process, signal.SIGTERM, first=True)

    def _tell_end(self) -> None:
        folder = self.plan.folder
        logger.info(
            "%s are trained: volumen predict -m %s averages them", counted(self.plan.count, "fold"), folder
        )
        logger.info("what each fold's network predicts of what it has not seen: %s", folder / OUT_OF_FOLD)
