"""State of the widget without Qt: the settings of its fields, and the progress of a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from volumen.napari_plugin.jobs import Event, free_name
from volumen.utils.errors import VolumenError

#: Derived targets that a checkbox adds to a labelled target: the suffix of their name, and their settings.
ALSO: dict[str, dict[str, Any]] = {
    "distance": {
        "type": "distance_transform",
        "loss_weight": 0.1,
        "losses": [{"name": "SignedDistanceLoss", "kwargs": {"rho": 6, "beta": 1, "eikonal": True}}],
    },
    "normals": {
        "type": "surface_normals",
        "loss_weight": 0.1,
        "losses": [{"name": "CosineSimilarityLoss", "kwargs": {"dim": 1}}],
    },
}

NEW, RESUME, FINETUNE = "new", "resume", "finetune"


@dataclass(frozen=True)
class TrainingForm:
    """The fields of the training part.

    Args:
        output: folder for runs.
        model_name: the run's name; a number is appended if a new run's name is already used.
        start: "new", "resume" (continue the run of this name) or "finetune" (from the weights of `checkpoint`).
        checkpoint: for "finetune".
        epochs: epochs.
        steps: steps per epoch.
        batch_size: patches per step.
        patch_size: "64,64,64", or "" for one that fits the data.
        also: keys of `ALSO`.
        experiment: an experiment file, or ""; the fields take precedence over its settings.
        device: auto, cpu, cuda or cuda:N.
    """

    output: str
    model_name: str = "model"
    start: str = NEW
    checkpoint: str = ""
    epochs: int = 100
    steps: int = 50
    batch_size: int = 2
    patch_size: str = ""
    also: tuple[str, ...] = ()
    experiment: str = ""
    device: str = "auto"

    def settings(self, targets: Iterable[str]) -> dict[str, Any]:
        """Return the experiment's sections.

        Args:
            targets: the labelled targets, each of which gets the ticked derived targets.

        Raises:
            VolumenError: the value of a field is impossible, or the experiment file is wrong.
        """
        from volumen.cli.train import parse_patch_size
        from volumen.config.experiment_file import merge, read_experiment

        if not self.output.strip():
            raise VolumenError("output folder", "missing", remedy="choose where runs go")
        name = self.model_name.strip() or "model"
        setup: dict[str, Any] = {"model_name": name}
        if self.start == NEW:
            setup["model_name"] = free_name(Path(self.output), name)
        elif self.start == RESUME:
            setup["resume"] = True
        elif not self.checkpoint:
            raise VolumenError("model", "missing", remedy="choose the .pth file whose weights to start from")
        else:
            setup.update(
                model_name=free_name(Path(self.output), name),
                checkpoint_path=self.checkpoint,
                load_weights_only=True,
            )
        training: dict[str, Any] = {
            "max_epoch": self.epochs,
            "max_steps_per_epoch": self.steps,
            "batch_size": self.batch_size,
        }
        if self.patch_size.strip():
            training["patch_size"] = parse_patch_size(self.patch_size)
        tasks = {
            f"{target}_{key}": {**ALSO[key], "source_target": target}
            for target in targets
            for key in self.also
        }
        own = {"tr_setup": setup, "tr_config": training, "auxiliary_tasks": tasks}
        if not self.experiment.strip():
            return own
        return dict(merge(read_experiment(self.experiment.strip()), own))


def fields_of(experiment: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values that an experiment file has for the fields of `TrainingForm`, to show them there."""
    setup, training = experiment.get("tr_setup", {}), experiment.get("tr_config", {})
    found = {
        "model_name": setup.get("model_name"),
        "epochs": training.get("max_epoch"),
        "steps": training.get("max_steps_per_epoch"),
        "batch_size": training.get("batch_size"),
        "patch_size": ",".join(map(str, training.get("patch_size") or ())) or None,
    }
    return {name: value for name, value in found.items() if value is not None}


@dataclass
class Progress:
    """Progress of a job, and the curves of its training.

    Args:
        losses: number of steps and loss at this point.
        scores: number of steps and score at this point, one per validation.
        score_name: name of the score.
        run: the run's folder.
        path: the run's folder or the prediction, when the job is done.
        text: the latest message.
        kinds: kind of every predicted target.
        warnings: logged warnings.
        state: "running", "done", "stopped" or "failed".
        share: finished share of the job, 0 to 1.
    """

    losses: list[tuple[float, float]] = field(default_factory=list)
    scores: list[tuple[float, float]] = field(default_factory=list)
    score_name: str = ""
    run: str = ""
    path: str = ""
    text: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    state: str = "running"
    share: float = 0.0

    def take(self, event: Event) -> None:
        """Process an event of the job."""
        getattr(self, f"_{event['event']}")(event)

    def _message(self, event: Event) -> None:
        if event.get("level") in ("warning", "error"):
            self.warnings.append(event["text"])
        self.text = str(event["text"]).splitlines()[0]

    def _started(self, event: Event) -> None:
        self.run = event["run"]

    def _step(self, event: Event) -> None:
        done = event["epoch"] - 1 + event["step"] / event["steps"]
        self.share = done / event["epochs"]
        if event["loss"] is not None:
            self.losses.append((done, event["loss"]))
        loss = "not a number" if event["loss"] is None else f"{event['loss']:.4g}"
        where = f"epoch {event['epoch']} of {event['epochs']}, step {event['step']} of {event['steps']}"
        self.text = f"{where}: loss {loss}"

    def _epoch(self, event: Event) -> None:
        self.share = event["epoch"] / event["epochs"]
        name = score_of(event["numbers"])
        if name is not None:
            self.score_name = name.removeprefix("val/").replace("_", " ").replace("/", " ")
            self.scores.append((float(event["epoch"]), event["numbers"][name]))

    def _progress(self, event: Event) -> None:
        self.share = event["done"] / max(1, event["total"])
        self.text = f"{event['done']} of {event['total']} windows"

    def _heads(self, event: Event) -> None:
        self.kinds = event["kinds"]

    def _done(self, event: Event) -> None:
        self.state, self.path, self.share, self.text = "done", event["path"], 1.0, "done"

    def _stopped(self, _event: Event) -> None:
        self.state, self.text = "stopped", "stopped"

    def _failed(self, event: Event) -> None:
        self.state, self.text = "failed", event["message"]

    @property
    def checkpoint(self) -> str:
        """The run's best checkpoint, else its newest; "" if there is none."""
        return best_checkpoint(Path(self.run)) if self.run else ""


def score_of(numbers: Mapping[str, float | None]) -> str | None:
    """Return the metric that is drawn: mean Dice, else the first score of the validation; None if there is none."""
    if numbers.get("val/mean_dice") is not None:
        return "val/mean_dice"
    scores = [
        name
        for name, value in sorted(numbers.items())
        if name.startswith("val/") and not name.startswith("val/loss") and value is not None
    ]
    return scores[0] if scores else None


def best_checkpoint(run: Path) -> str:
    """Return the best checkpoint of a run's folder, else the newest one, else ""."""
    best = run / f"{run.name}_best.pth"
    if best.is_file():
        return str(best)
    others = sorted(run.glob(f"{run.name}_*.pth"), key=lambda path: path.stat().st_mtime)
    return str(others[-1]) if others else ""
