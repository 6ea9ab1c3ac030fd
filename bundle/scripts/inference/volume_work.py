"""One volume's prediction as a value: everything that decides its blocks, in this process or in another one."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from volumen.data.space.geometry import AxisTurn
from volumen.inference.gain import Labels
from volumen.inference.jobs import Job
from volumen.inference.output.stored import Stored
from volumen.inference.rules import CleaningRules
from volumen.inference.windows.plan import Box, PredictPlan

if TYPE_CHECKING:
    from volumen.inference.request import PredictRequest
    from volumen.transforms.normalize import Normalizer


class State(Protocol):
    """Where blocks go, and who is told of them: `OutputState` or `WorkerState`."""

    output: Path
    folder: Path
    corrupt: list[Box]

    def record(self, block: tuple[int, ...]) -> None: ...
    def note_corrupt(self, box: Box) -> None: ...


@dataclass(frozen=True)
class VolumeWork:
    """What is to be done for one volume; it can be sent to another process on a machine that sees the same files.

    Args:
        job: the volume, and where its prediction goes.
        request: how.
        plan: windows and blocks.
        stored: what is stored of each output.
        rules: what is done to label maps.
        normalizer: maps the volume's raw values to float32.
        precision: "float32", "bfloat16" or "float16".
        spacing: voxel size where the image has none, per axis of the image, or None.
        nonfinite: "zero" or "refuse", for NaN and infinity in the image.
        labels: the truth by target, with which an augmentation's gain is measured.
        turn: how windows are turned for the network, whose training volumes had their axes otherwise; None for not.
        classes: names of classes by target.
    """

    job: Job
    request: PredictRequest
    plan: PredictPlan
    stored: tuple[Stored, ...]
    rules: CleaningRules
    normalizer: Normalizer
    precision: str
    spacing: tuple[float, ...] | None
    nonfinite: str = "zero"
    labels: Mapping[str, Labels] = field(default_factory=dict)
    turn: AxisTurn | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def voxel_size(self) -> tuple[float, ...]:
        """Voxel size that computations use: the image's, else that of the training, else 1."""
        return self.job.image.spacing or self.spacing or (1.0,) * self.plan.ndim

    def with_absolute_paths(self) -> VolumeWork:
        """Return the same work for a process with another working directory."""
        job = self.job
        return replace(
            self,
            job=replace(
                job,
                image=_absolute(job.image),
                mask=None if job.mask is None else _absolute(job.mask),
                output=job.output.absolute(),
            ),
            labels={
                name: replace(
                    truth,
                    label=_absolute(truth.label),
                    mask=None if truth.mask is None else _absolute(truth.mask),
                )
                for name, truth in self.labels.items()
            },
        )


def _absolute(volume: Any) -> Any:
    if "://" in volume.path:
        return volume
    moved = copy.copy(volume)
    moved.path = os.path.abspath(volume.path)  # noqa: PTH100  (a path that does not exist stays as it is)
    return moved
