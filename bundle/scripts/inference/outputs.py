"""What a prediction leaves: arrays, cleaned labels, pyramids, files, and the mark that it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.inference.instance_output import instance_stored, make_instances
from scripts.inference.journal import OutputState
from scripts.inference.postprocess import Read, Write, clean, fill
from scripts.inference.results import Stored
from scripts.inference.writers import Coarsen, ZarrOutput

if TYPE_CHECKING:
    from scripts.inference.work import State, VolumeWork


class Outputs:
    """The outputs of one volume, from empty arrays to the finished mark.

    Label maps that are to be cleaned are first written below the state folder, so that cleaning can be
    repeated from the start after an interruption.

    Args:
        work: the volume, and what is stored of it and how.
        state: the output folder, and who is told of finished blocks.
    """

    def __init__(self, work: VolumeWork, state: State) -> None:
        self.stored = list(work.stored)
        self._work, self._rules, self._plan = work, work.rules, work.plan
        self._final = final_arrays(work, state.output)
        cleaned = [] if work.rules.does_nothing else [item for item in work.stored if item.is_labels]
        self._raw = _arrays(work, state.folder / "raw", cleaned) if cleaned else None
        self._filled = (
            _arrays(work, state.folder / "filled", cleaned) if cleaned and work.rules.fill_holes else None
        )
        self._instances = work.request.instances
        self._local = (
            None
            if self._instances is None
            else _arrays(work, state.folder / "instances", instance_stored(self._instances))
        )
        self.sinks = {item.head.name: self._final for item in work.stored}
        if self._raw is not None:
            self.sinks.update({item.head.name: self._raw for item in cleaned})

    def create(self) -> None:
        """Create the arrays that are not there yet."""
        for arrays in (self._final, self._raw, self._filled, self._local):
            if arrays is not None:
                arrays.create()

    def complete(self, state: OutputState, coarsen: Coarsen | None = None) -> None:
        """Clean, coarsen, export, and mark the prediction as finished.

        Args:
            state: state of the output folder.
            coarsen: writes boxes of a pyramid's level; None to do it here.
        """
        if self._raw is not None:
            for name in self._raw.stored:
                self._clean(name, self._raw)
        if self._instances is not None and self._local is not None:
            make_instances(
                self._instances,
                self._final,
                self._local,
                state.recipe,
                mask=self._work.job.mask,
                workers=self._work.request.workers,
            )
        extra = {"corrupt": [[list(side) for side in box] for box in state.corrupt]}
        job, request = self._work.job, self._work.request
        if job.export is None:
            self._final.build_pyramid(request.workers, coarsen)
            state.complete(extra)
            return
        state.close()
        job.export.write(
            self._final,
            {"recipe": state.recipe, **extra},
            affine=job.image.affine,
            compress=request.compress != "none",
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


def final_arrays(work: VolumeWork, output: Path) -> ZarrOutput:
    """Return the arrays that a prediction leaves."""
    stored = (*work.stored, *instance_stored(work.request.instances))
    return _arrays(work, output, stored, pyramid=work.request.pyramid and work.job.export is None)


def _arrays(work: VolumeWork, root: Path, stored: Sequence[Stored], *, pyramid: bool = False) -> ZarrOutput:
    return ZarrOutput(
        root,
        stored,
        work.plan.output_shape,
        work.plan.block_shape,
        spacing=work.job.image.spacing or work.spacing or (1.0,) * work.plan.ndim,
        unit=work.job.image.unit,
        origin=tuple(start for start, _ in work.plan.box),
        compress=work.request.compress,
        pyramid=pyramid,
    )


def _reader(arrays: ZarrOutput, name: str, channel: int) -> Read:
    return lambda box: arrays.read(name, box)[channel]


def _writer(arrays: ZarrOutput, name: str, channel: int) -> Write:
    return lambda box, values: arrays.write_channel(name, box, channel, values)
