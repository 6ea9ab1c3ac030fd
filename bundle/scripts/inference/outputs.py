"""What a prediction leaves: arrays, cleaned labels, pyramids, files, and the mark that it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.inference.journal import OutputState
from scripts.inference.postprocess import CleaningRules, Read, Write, clean, fill
from scripts.inference.results import Stored
from scripts.inference.windows import PredictPlan
from scripts.inference.writers import ZarrOutput

if TYPE_CHECKING:
    from scripts.inference.jobs import Job
    from scripts.inference.predict import PredictRequest


class Outputs:
    """The outputs of one volume, from empty arrays to the finished mark.

    Label maps that are to be cleaned are first written below the state folder, so that cleaning can be
    repeated from the start after an interruption.

    Args:
        job: the volume, and where its prediction goes.
        state: state of the output folder.
        plan: windows and blocks.
        stored: what is stored of each head.
        rules: what is done to label maps.
        request: compression, pyramid, workers.
        spacing: voxel size where the image has none, or None.
    """

    def __init__(
        self,
        job: Job,
        state: OutputState,
        plan: PredictPlan,
        stored: Sequence[Stored],
        rules: CleaningRules,
        request: PredictRequest,
        spacing: tuple[float, ...] | None,
    ) -> None:
        self.stored = list(stored)
        self._job, self._state, self._plan = job, state, plan
        self._rules, self._request = rules, request
        self._spacing = job.image.spacing or spacing or (1.0,) * plan.ndim
        self._final = self._arrays(state.output, self.stored, pyramid=request.pyramid and job.export is None)
        cleaned = [] if rules.does_nothing else [item for item in stored if item.is_labels]
        self._raw = self._arrays(state.folder / "raw", cleaned) if cleaned else None
        self._filled = (
            self._arrays(state.folder / "filled", cleaned) if cleaned and rules.fill_holes else None
        )
        self.sinks = {item.head.name: self._final for item in stored}
        if self._raw is not None:
            self.sinks.update({item.head.name: self._raw for item in cleaned})

    def _arrays(self, root: Path, stored: Sequence[Stored], *, pyramid: bool = False) -> ZarrOutput:
        return ZarrOutput(
            root,
            stored,
            self._plan.output_shape,
            self._plan.block_shape,
            spacing=self._spacing,
            unit=self._job.image.unit,
            origin=tuple(start for start, _ in self._plan.box),
            compress=self._request.compress,
            pyramid=pyramid,
        )

    def create(self) -> None:
        """Create the arrays that are not there yet."""
        for arrays in (self._final, self._raw, self._filled):
            if arrays is not None:
                arrays.create()

    def complete(self) -> None:
        """Clean, coarsen, export, and mark the prediction as finished."""
        if self._raw is not None:
            for name in self._raw.stored:
                self._clean(name, self._raw)
        extra = {"corrupt": [[list(side) for side in box] for box in self._state.corrupt]}
        if self._job.export is None:
            self._final.build_pyramid(self._request.workers)
            self._state.complete(extra)
            return
        self._state.close()
        self._job.export.write(
            self._final,
            {"recipe": self._state.recipe, **extra},
            affine=self._job.image.affine,
            compress=self._request.compress != "none",
        )

    def _clean(self, name: str, raw: ZarrOutput) -> None:
        shape, block = self._plan.output_shape, self._plan.block_shape
        for channel in range(raw.stored[name].channels):
            source = raw
            if self._filled is not None:
                source = self._filled
                fill(
                    _reader(raw, name, channel),
                    _writer(source, name, channel),
                    shape,
                    block,
                    self._rules.fill_holes,
                )
            clean(
                _reader(source, name, channel), _writer(self._final, name, channel), shape, block, self._rules
            )


def _reader(arrays: ZarrOutput, name: str, channel: int) -> Read:
    return lambda box: arrays.read(name, box)[channel]


def _writer(arrays: ZarrOutput, name: str, channel: int) -> Write:
    return lambda box, values: arrays.write_channel(name, box, channel, values)
