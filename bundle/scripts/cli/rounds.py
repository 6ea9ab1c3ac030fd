"""`volumen train --rounds N`: self-training, in which each round learns from what the one before it is sure of.

Round 1 trains on the labels. Then it predicts the images of the training part, and what it predicts with enough
confidence where nobody labelled becomes pseudo-labels; the thresholds, one per class, are calibrated on the validation
part (`volumen.suggestion.pseudo_labels`). The next round starts from its weights and trains on both: every batch has as
many patches with pseudo-labels as labelled ones. All rounds have the same validation part; the best by the key metric
is what `volumen predict -m` takes.

The folder of the run holds `rounds.json`, the settings of each round, a run per round (`round_1`, ...) and its
pseudo-labels (`pseudo_1`, ...), which a person can open and correct. The same command goes on where an earlier one
ended, however that ended.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from volumen.cli.folds import MEMBER, locked, refuse_foreign_files, run_folder, shared_sections, wait_for
from volumen.cli.running.launch import run_passing_signals
from volumen.inference.run_files import ENSEMBLE
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

logger = logging.getLogger(__name__)

RECORD, EXPERIMENT = "rounds.json", "experiment.yaml"
PREDICTION_SHARE = 0.1
"""Share of a time budget for the predictions between the rounds."""
LEAST_SHARE = 0.05
"""Share of a time budget that must be left for another round to begin."""


def train_rounds(options: argparse.Namespace, sections: Mapping[str, Any], origin: str) -> int:
    """Train every round that is not trained yet.

    Args:
        options: the parsed options of `volumen train`.
        sections: the merged sections.
        origin: name of the file that they come from.

    Returns:
        Exit code: 0 when all is done, that of a round that failed, 130 or 143 when a signal stopped it.

    Raises:
        VolumenError: settings that do not go together, or a folder of another experiment.
    """
    _check(options, sections, origin)
    folder = run_folder(options, sections)
    with locked(folder):
        rounds = Rounds.of(options, sections, folder)
        for number in range(1, rounds.count + 1):
            if rounds.is_out_of_time(number):
                break
            code = rounds.train(number) or (rounds.label(number) if number < rounds.count else 0)
            if code:
                if rounds.final(number).is_file():
                    rounds.choose()  # so that what is trained can be used, even if nothing is sure enough to go on
                return code
        rounds.choose()
    return 0


def _check(options: argparse.Namespace, sections: Mapping[str, Any], origin: str) -> None:
    """Refuse settings that do not go together."""
    if options.rounds < 2:
        raise VolumenError("--rounds", expected="at least 2", found=options.rounds)
    if options.folds is not None:
        raise VolumenError("--rounds", "does not go with --folds", remedy="give one of them")
    if options.nproc > 1 or "RANK" in os.environ:
        raise VolumenError("--rounds", "trains in one process", remedy="leave --nproc and torchrun out")
    if options.resume:
        raise VolumenError(
            "--resume", "names one checkpoint", remedy="leave it out: the same command goes on by itself"
        )
    if sections["tr_setup"].get("compute_loss_on_labeled_only"):
        raise VolumenError(
            f"{origin}: tr_setup.compute_loss_on_labeled_only",
            "teaches no background, so pseudo-labels would be foreground alone",
            remedy="give masks, or train without --rounds",
        )
    if sections["dataset_config"].get("target_spacing") is not None:
        raise VolumenError(
            f"{origin}: dataset_config.target_spacing",
            "resamples the voxels on which pseudo-labels lie",
            remedy="leave it out, or train without --rounds",
        )
    if (sections["tr_config"].get("unlabelled") or {}).get("pseudo_labels"):
        raise VolumenError(
            f"{origin}: tr_config.unlabelled.pseudo_labels", "is what --rounds writes", remedy="leave it out"
        )


@dataclass
class Rounds:
    """What is trained.

    Args:
        folder: of the run.
        options: the parsed options of `volumen train`.
        count: rounds.
        budget: seconds for all of it; None for no limit.
        record: content of `rounds.json`.
    """

    folder: Path
    options: argparse.Namespace
    count: int
    budget: float | None
    record: dict[str, Any]

    @classmethod
    def of(cls, options: argparse.Namespace, sections: Mapping[str, Any], folder: Path) -> Rounds:
        """Return the rounds of a folder, which begin where there are none.

        Raises:
            VolumenError: the folder holds another run, or rounds of other settings.
        """
        from volumen.time_budget.duration import parse_duration

        text = sections["tr_config"].get("time_budget")
        settings = shared_sections(sections, options, keeps_split=True)
        # Unlabelled images and voxels are what the rounds learn from.
        settings["dataset_config"]["allow_unlabeled_data"] = True
        asked = {"rounds": options.rounds, "time_budget": text}
        path, content = folder / EXPERIMENT, yaml.safe_dump(settings, sort_keys=False)
        if (folder / RECORD).is_file():
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if any(record.get(key) != value for key, value in asked.items()) or path.read_text() != content:
                raise VolumenError(
                    folder,
                    "holds rounds that were started with other settings",
                    remedy="give the same command to go on, or another --model-name or output folder",
                )
        else:
            refuse_foreign_files(folder, (".lock", EXPERIMENT))
            write_atomically(path, content.encode())
            record = {**asked, "budgets": {}, "spent": 0.0}
        try:
            budget = None if text is None else parse_duration(text)
        except ValueError:
            raise VolumenError(
                "tr_config.time_budget", expected="a time above 0, such as 35m or 12h", found=repr(text)
            ) from None
        found = cls(folder, options, options.rounds, budget, record)
        found.save()
        return found

    def save(self) -> None:
        """Write `rounds.json`."""
        write_atomically(self.folder / RECORD, (json.dumps(self.record, indent=1) + "\n").encode())

    def run_of(self, number: int) -> Path:
        """Return the folder of a round's run."""
        return self.folder / f"round_{number}"

    def final(self, number: int) -> Path:
        """Return the checkpoint with which a round ends."""
        return self.run_of(number) / f"round_{number}_final.pth"

    def _best(self, number: int) -> Path:
        """Return the checkpoint of a round that predicts best, by its key metric."""
        best = self.run_of(number) / f"round_{number}_best.pth"
        return best if best.is_file() else self.final(number)

    def pseudo_labels(self, number: int) -> Path:
        """Return the folder of the pseudo-labels that a round writes."""
        return self.folder / f"pseudo_{number}"

    def is_out_of_time(self, number: int) -> bool:
        """Whether the time budget is used up before a further round begins, which is logged."""
        if self.budget is None or number == 1 or str(number) in self.record["budgets"]:
            return False
        over = self.budget - self.record["spent"] < LEAST_SHARE * self.budget
        if over:
            logger.warning("the time budget is used up before round %d of %d", number, self.count)
        return bool(over)

    def train(self, number: int) -> int:
        """Train a round unless it is trained; return an exit code."""
        if self.final(number).is_file():
            return 0
        wait_for(self.run_of(number))
        logger.info("round %d of %d: training in %s", number, self.count, self.run_of(number))
        words = [
            "train", "--config-path", str(self._settings_of(number)), "-o", str(self.folder),
            "--model-name", f"round_{number}", "--device", self.options.device or "auto", "--resume",
        ]  # fmt: skip
        for overlay in self.options.config_file:
            words += ["--config-file", overlay]
        if self.options.tracking:
            words += ["--tracking", self.options.tracking]
        seconds = self._seconds_of(number)
        if seconds is not None:
            words += ["--time-budget", f"{seconds:.0f}s"]
        return self._run(words)

    def label(self, number: int) -> int:
        """Write the pseudo-labels of a round unless they are written; return an exit code."""
        from volumen.suggestion.pseudo_labels import RECORD as WRITTEN

        folder = self.pseudo_labels(number)
        if (folder / WRITTEN).is_file():
            return 0
        logger.info("round %d of %d: pseudo-labels in %s", number, self.count, folder)
        return self._run(["pseudo", str(self.run_of(number)), str(folder), self.options.device or "auto"])

    def choose(self) -> None:
        """Write which round is best by the key metric of its best epoch; of equal ones the later."""
        scores = {
            number: self._score(number) for number in range(1, self.count + 1) if self.final(number).is_file()
        }
        best = max(scores, key=lambda number: (scores[number], number))
        content = {"members": [f"round_{best}"]}
        write_atomically(self.folder / ENSEMBLE, (json.dumps(content, indent=1) + "\n").encode())
        shown = ", ".join(f"{number}: {score:.4g}" for number, score in scores.items())
        logger.info(
            "the best of %d rounds is %d (key metric, larger is better: %s): volumen predict -m %s",
            len(scores),
            best,
            shown,
            self.folder,
        )

    def _score(self, number: int) -> float:
        """Return the key metric of a round's best epoch, negative if smaller is better."""
        from volumen.checkpoints.file import load_checkpoint
        from volumen.handlers.metric import KeyMetric

        content = load_checkpoint(self.final(number))
        value = content.get("best_metric")
        if value is None:
            return float("-inf")
        metric = KeyMetric(content.get("ranking_metric") or "val/mean_dice")
        return -float(value) if metric.smaller_is_better(None) else float(value)

    def _settings_of(self, number: int) -> Path:
        """Return the experiment file of a round: later ones have the first one's targets, network and split."""
        if number == 1:
            return self.folder / EXPERIMENT
        path = self.folder / f"round_{number}.yaml"
        if path.is_file():
            return path
        first = self.run_of(1)
        settings = yaml.safe_load((first / "round_1_config.yaml").read_text(encoding="utf-8"))
        ours = yaml.safe_load((self.folder / EXPERIMENT).read_text(encoding="utf-8"))
        settings["tr_setup"].update(
            checkpoint_path=str(self._best(number - 1)), load_weights_only=True,
            seed=int(settings["tr_setup"]["seed"]) + number - 1, ckpt_out_base=None,
        )  # fmt: skip
        unlabelled = dict(settings["tr_config"].get("unlabelled") or {})
        settings["tr_config"].update(
            unlabelled={**unlabelled, "pseudo_labels": str(self.pseudo_labels(number - 1))},
            time_budget=None, time_budget_choice=None, ema_decay=ours["tr_config"].get("ema_decay"),
        )  # fmt: skip
        settings["dataset_config"].update(
            split_path=str(first / "round_1_split.json"),
            val_volumes=None,
            val_path=None,
            fold=None,
            group_by=None,
        )
        write_atomically(path, yaml.safe_dump(settings, sort_keys=False).encode())
        return path

    def _seconds_of(self, number: int) -> float | None:
        """Return the time budget of a round, which it keeps when it is continued."""
        if self.budget is None:
            return None
        given = self.record["budgets"].get(str(number))
        if given is None:
            left = max(0.0, self.budget - self.record["spent"])
            share = 1.0 if number == self.count else 1 - PREDICTION_SHARE
            given = max(1.0, left / (self.count - number + 1) * share)
            self.record["budgets"][str(number)] = given
            self.save()
        return float(given)

    def _run(self, words: list[str]) -> int:
        """Run a process of a round; return its exit code."""
        flags = [flag for flag in ("--quiet", "--verbose") if getattr(self.options, flag[2:])]
        started = time.monotonic()
        code = run_passing_signals([*MEMBER, *words, *flags], ends_with_parent=True)
        self.record["spent"] += time.monotonic() - started
        self.save()
        return 128 - code if code < 0 else code
