"""Cleans the label maps of a prediction on disk by passes over their blocks.

The first pass finds the components of every block and writes them to a file per block. The main process joins them
across blocks and writes a table of the components that remain. The second pass writes the labels. Holes are filled
before, by another pair of passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from volumen.inference.arrays import cleaned_specs, filled_arrays, final_arrays, raw_arrays, work_folder
from volumen.inference.postprocess.block_files import BlockFiles
from volumen.inference.postprocess.blocks import Region, aligned_block, block_box, block_counts
from volumen.inference.postprocess.components import (
    background,
    combine,
    fill_chosen,
    keep_chosen,
    kept_components,
    small_holes,
    survey_block,
)
from volumen.inference.postprocess.passes import CancellationCheck, Run

if TYPE_CHECKING:
    from volumen.inference.output.ome_zarr import ZarrOutput
    from volumen.inference.volume_work import VolumeWork

BLOCK_VOXELS = 1 << 21
"""Voxels of a block."""


@dataclass(frozen=True)
class _LabelPass:
    """A pass over the blocks of the label maps that are cleaned.

    Args:
        work: the volume's prediction.
        holes: whether the pass fills holes; otherwise it removes small components.
    """

    work: VolumeWork
    holes: bool
    is_light = True

    @property
    def count(self) -> int:
        return math.prod(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks per axis."""
        return block_counts(self.work.plan.output_shape, self._block)

    @property
    def _block(self) -> tuple[int, ...]:
        plan = self.work.plan
        return aligned_block((), plan.output_shape, plan.block_shape, BLOCK_VOXELS)

    def box(self, number: int) -> Region:
        """Return the region of a block."""
        return block_box(number, self.work.plan.output_shape, self._block)

    @property
    def channels(self) -> tuple[tuple[str, int], ...]:
        """Target and channel of every label map."""
        return tuple((item.head.name, c) for item in cleaned_specs(self.work) for c in range(item.channels))

    @property
    def source(self) -> ZarrOutput:
        """The arrays that the pass reads."""
        if self.holes or not self.work.rules.fill_holes:
            return raw_arrays(self.work)
        return filled_arrays(self.work)

    def files(self, name: str, channel: int) -> BlockFiles:
        """Return the files that `SurveyPass` writes for a label map."""
        kind = "holes" if self.holes else "components"
        return BlockFiles(work_folder(self.work) / kind / f"{name}-{channel}")


class SurveyPass(_LabelPass):
    """Finds the components, or the holes, of every block."""

    @property
    def title(self) -> str:
        return "finding holes" if self.holes else "finding components"

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        box = self.box(number)
        read: dict[str, np.ndarray] = {}
        for name, channel in self.channels:
            files = self.files(name, channel)
            if files.has(number):
                continue
            if name not in read:
                read[name] = self.source.read(name, box)
            data = background(read[name][channel]) if self.holes else read[name][channel]
            survey = survey_block(data, box, self.work.plan.output_shape)
            raise_if_cancelled()
            files.save(number, survey)

    def join(self) -> None:
        """Join the components of all blocks, and write the table of those that remain or are filled."""
        rules = self.work.rules
        for name, channel in self.channels:
            files = self.files(name, channel)
            if files.has_table:
                continue
            components = combine(files.load, self.counts)
            chosen = (
                small_holes(components, rules.fill_holes)
                if self.holes
                else kept_components(components, rules)
            )
            files.save_table(components.offsets, chosen[1:])


class ChoosePass(_LabelPass):
    """Writes every block with its holes filled, or without small components."""

    @property
    def title(self) -> str:
        return "filling holes" if self.holes else "cleaning"

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        box = self.box(number)
        target = filled_arrays(self.work) if self.holes else final_arrays(self.work)
        choose = fill_chosen if self.holes else keep_chosen
        for item in cleaned_specs(self.work):
            name = item.head.name
            data = self.source.read(name, box)
            chosen = [self.files(name, channel).table(number) for channel in range(item.channels)]
            raise_if_cancelled()
            target.write(name, box, np.stack([choose(*pair) for pair in zip(data, chosen, strict=True)]))


def clean_labels(work: VolumeWork, run: Run) -> None:
    """Clean the label maps of a volume.

    Args:
        work: the volume's prediction, of which all blocks are written.
        run: computes the blocks of a pass.
    """
    for holes in (True, False):
        if holes and not work.rules.fill_holes:
            continue
        survey = SurveyPass(work, holes)
        for name, channel in survey.channels:
            survey.files(name, channel).folder.mkdir(parents=True, exist_ok=True)
        run(survey)
        survey.join()
        run(ChoosePass(work, holes))
