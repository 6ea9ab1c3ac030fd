"""Creates and completes the outputs of a prediction: arrays, cleaned labels, pyramids, files, the finished mark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volumen.inference.arrays import (
    block_sinks,
    cleaned_specs,
    filled_arrays,
    final_arrays,
    grid_arrays,
    local_arrays,
    raw_arrays,
)
from volumen.inference.output.block_log import OutputState
from volumen.inference.output.stored import OutputSpec, instance_specs
from volumen.inference.postprocess.cleaning import clean_labels
from volumen.inference.postprocess.instance_output import make_instances
from volumen.inference.postprocess.instance_table import describe_instances
from volumen.inference.postprocess.passes import LevelPass, Run
from volumen.inference.postprocess.stored_grid import StoredGridPass

if TYPE_CHECKING:
    from volumen.inference.volume_work import VolumeWork


class Outputs:
    """The outputs of one volume, from empty arrays to the finished mark.

    Label maps that will be cleaned are first written below the state folder, so that cleaning can be
    repeated from the start after an interruption.

    Args:
        work: the volume's prediction.
        sparse: coarsen only the chunks that have a file, since most have none.
    """

    def __init__(self, work: VolumeWork, *, sparse: bool = False) -> None:
        self._sparse = sparse
        self._work = work
        self._final = final_arrays(work)
        cleaned = cleaned_specs(work)
        raw = raw_arrays(work) if cleaned else None
        self._arrays = [
            self._final,
            *([raw] if raw else []),
            *([filled_arrays(work)] if raw and work.rules.fill_holes else []),
            *([local_arrays(work)] if work.request.instances else []),
        ]
        self.stored: list[OutputSpec] = list(work.stored)
        self.sinks = block_sinks(work)
        if work.resampling is not None:
            grid = grid_arrays(work)
            self._arrays.append(grid)
            self.stored = list(grid.stored.values())
            self.sinks = dict.fromkeys(grid.stored, grid)

    def create(self) -> None:
        """Create the arrays that do not exist yet."""
        for arrays in self._arrays:
            arrays.create()

    def complete(self, state: OutputState, run: Run) -> None:
        """Clean, coarsen, export, and mark the prediction as finished.

        Args:
            state: state of the output folder.
            run: computes the blocks of a pass.
        """
        if self._work.resampling is not None:
            run(StoredGridPass(self._work))
        if cleaned_specs(self._work):
            clean_labels(self._work, run)
        if self._work.request.instances is not None:
            make_instances(self._work, state.provenance, run)
        extra = {"corrupt": [[list(side) for side in box] for box in state.corrupt]}
        job, request = self._work.job, self._work.request
        for level in range(1, len(self._final.factors) + 1):
            boxes = self._final.boxes_with_content(level) if self._sparse else None
            run(LevelPass(self._work, level, boxes))
        if job.export is None:
            for item in instance_specs(request.instances):
                describe_instances(self._final, item.head.name)
            state.complete(extra)
            return
        state.close()
        job.export.write(
            self._final,
            {"recipe": state.provenance, **extra},
            image=job.image,
            compress=request.compress,
            classes=self._work.classes,
        )
