"""One volume's prediction as a value: everything that decides its blocks; it can be sent to another process."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from volumen.data.resampled import ResampledVolume, TouchedMask
from volumen.data.space.geometry import AxisTurn
from volumen.data.space.resampling import Resampling
from volumen.inference.gain import Labels
from volumen.inference.jobs import Job
from volumen.inference.output.stored import OutputSpec
from volumen.inference.rules import CleaningRules
from volumen.inference.windows.plan import Box, PredictPlan

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.nnunet.preparation import Prepared
    from volumen.inference.request import PredictRequest


class State(Protocol):
    """Records finished blocks and unreadable boxes: `OutputState` or `WorkerState`."""

    output: Path
    folder: Path
    corrupt: list[Box]

    def record(self, block: tuple[int, ...]) -> None: ...
    def note_corrupt(self, box: Box) -> None: ...


@dataclass(frozen=True)
class MemberWork:
    """What another member of an ensemble does for the volume.

    Args:
        plan: its windows, over the same blocks.
        normalizer: maps the volume's raw values to float32.
        turn: how windows are turned for it; None for not.
    """

    plan: PredictPlan
    normalizer: Callable[[np.ndarray], np.ndarray]
    turn: AxisTurn | None = None


@dataclass(frozen=True)
class VolumeWork:
    """Everything that decides one volume's prediction; another process with access to the same files can use it.

    Args:
        job: the volume, and where its prediction is written.
        request: the settings.
        plan: windows and blocks.
        stored: how each output is stored.
        rules: how label maps are cleaned.
        normalizer: maps the volume's raw values to float32.
        precision: "float32", "bfloat16" or "float16".
        spacing: voxel size for an image that states none, per axis of the image, or None.
        nonfinite: "zero" or "refuse", for NaN and infinity in the image.
        labels: the truth by target, which measures an augmentation's gain.
        turn: how windows are turned to the axis directions of the training volumes; None: not turned.
        classes: names of classes by target.
        others: what the further members of an ensemble do; empty for a single network.
        resampling: the network's grid, for an image whose voxel size is not that of the training; None for the
            image's own voxels.
        grid_plan: windows and blocks on that grid; those of `plan` are of the image's voxels.
        prepared: what a network of another program sees of the image; None: the image itself, or resampled.
    """

    job: Job
    request: PredictRequest
    plan: PredictPlan
    stored: tuple[OutputSpec, ...]
    rules: CleaningRules
    normalizer: Callable[[np.ndarray], np.ndarray]
    precision: str
    spacing: tuple[float, ...] | None
    nonfinite: str = "zero"
    labels: Mapping[str, Labels] = field(default_factory=dict)
    turn: AxisTurn | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    others: tuple[MemberWork, ...] = ()
    resampling: Resampling | None = None
    grid_plan: PredictPlan | None = None
    prepared: Prepared | None = None

    @property
    def members(self) -> tuple[MemberWork, ...]:
        """What each network does; one of them unless it is an ensemble."""
        return (MemberWork(self.window_plan, self.normalizer, self.turn), *self.others)

    @property
    def window_plan(self) -> PredictPlan:
        """The windows that the network sees, and the blocks that they are blended into."""
        return self.grid_plan or self.plan

    @property
    def window_image(self) -> Volume:
        """The image as windows are read from it."""
        image = self.job.image
        if self.prepared is not None:
            return self.prepared.view(image)
        return image if self.resampling is None else ResampledVolume(image, self.resampling)

    @property
    def window_mask(self) -> Volume | None:
        """The mask as windows are chosen by it; that of the image counts for its voxels."""
        mask = self.job.mask
        if mask is None or self.resampling is None:
            return mask
        return TouchedMask(mask, self.resampling)

    @property
    def voxel_size(self) -> tuple[float, ...]:
        """Voxel size that computations use: the image's, else that of the training volumes, else 1."""
        return self.job.image.spacing or self.spacing or (1.0,) * self.plan.ndim

    def with_absolute_paths(self) -> VolumeWork:
        """Return a copy for a process with another working directory."""
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
