"""Instances of one region by many settings, made from its stored probabilities as a prediction makes them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volumen.inference.postprocess.block_files import BlockFiles
from volumen.inference.postprocess.blocks import Region, aligned_block
from volumen.inference.postprocess.instance_output import BLOCK_VOXELS, MUTEX_BLOCK_VOXELS
from volumen.inference.postprocess.instances import InstanceSegmenter
from volumen.inference.postprocess.stitch import Stitching
from volumen.inference.rules import InstanceRules
from volumen.tuning.scratch import scratch_array

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume


class InstanceMaps:
    """Makes instance numbers (1, *space) uint32 in a file, block by block; steps that two settings share are done once.

    Args:
        probabilities: head to its stored output, 255 is 1.
        rules: how instances are made, resolved.
        spacing: voxel size.
        offsets: of the affinities, () for boundaries.
        chunk: shape of the blocks that the prediction wrote.
        folder: where the files go.
        mask: no instance is where this is 0; None for none.
        origin: first voxel of the region in the mask.
    """

    def __init__(
        self,
        probabilities: Mapping[str, Volume],
        rules: InstanceRules,
        spacing: tuple[float, ...],
        offsets: tuple[tuple[int, ...], ...],
        chunk: Sequence[int],
        folder: Path,
        mask: Volume | None = None,
        origin: Sequence[int] = (),
    ) -> None:
        self._probabilities, self._rules, self._offsets = probabilities, rules, offsets
        self._spacing, self._mask, self._origin = spacing, mask, origin
        self._shape = next(iter(probabilities.values())).shape
        most = MUTEX_BLOCK_VOXELS if rules.affinities else BLOCK_VOXELS
        self._block = aligned_block(rules.block or (), self._shape, chunk, most)
        self._files = BlockFiles(folder / "blocks")
        folder.mkdir(parents=True)
        self._local, self._final = (
            scratch_array(folder / f"{name}.npy", np.uint32, (1, *self._shape)) for name in ("local", "final")
        )
        self._segmented_of: InstanceRules | None = None

    def __call__(self, settings: Mapping[str, float]) -> np.ndarray:
        """Return the instances by settings; they are valid until the next call.

        Args:
            settings: `threshold`, `merge_threshold` and `min_size`.
        """
        rules = replace(
            self._rules, threshold=settings["threshold"], merge_threshold=settings["merge_threshold"]
        )
        segmenter = InstanceSegmenter(rules, self._spacing, self._offsets)
        stitching = Stitching(self._shape, self._block, segmenter.halo, self._files)
        if self._segmented_of != rules:
            self._segment(stitching, segmenter)
            self._segmented_of = rules
        stitching.join(int(settings["min_size"]))
        for number in range(stitching.count):
            box, numbers = stitching.numbered(number, lambda box: np.asarray(self._local[(0, *box)]))
            self._final[(0, *box)] = numbers
        return self._final

    def _segment(self, stitching: Stitching, segmenter: InstanceSegmenter) -> None:
        """Segment every block; finished blocks of other settings are forgotten."""
        shutil.rmtree(self._files.folder, ignore_errors=True)
        self._files.folder.mkdir()

        def write(box: Region, numbers: np.ndarray) -> None:
            self._local[(0, *box)] = numbers

        for number in range(stitching.count):
            stitching.segment(number, lambda box: self._found(segmenter, box), write, lambda: None)

    def _found(self, segmenter: InstanceSegmenter, box: Region) -> np.ndarray:
        probabilities = {
            name: volume.read(box).astype(np.float32) / 255 for name, volume in self._probabilities.items()
        }
        found = segmenter(probabilities)
        if self._mask is not None:
            there = tuple(
                slice(part.start + first, part.stop + first)
                for part, first in zip(box, self._origin, strict=True)
            )
            found[~self._mask.read(there).any(axis=0)] = 0
        return found
