"""Instances of one region by many settings, made from its stored probabilities as a prediction makes them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from volumen.inference.postprocess.blocks import Region, aligned_block
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import VolumeGraph
from volumen.inference.postprocess.instance_output import BLOCK_VOXELS
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
        self._block = aligned_block(rules.block or (), self._shape, chunk, BLOCK_VOXELS)
        self._folder = folder
        folder.mkdir(parents=True)
        self._local, self._final = (
            scratch_array(folder / f"{name}.npy", np.uint32, (1, *self._shape)) for name in ("local", "final")
        )
        self._threshold: float | None = None

    def __call__(self, settings: Mapping[str, float]) -> np.ndarray:
        """Return the instances by settings; they are valid until the next call.

        Args:
            settings: `threshold`, `merge_threshold` and `min_size`.
        """
        rules = replace(
            self._rules,
            threshold=settings["threshold"],
            merge_threshold=settings["merge_threshold"],
            min_size=int(settings["min_size"]),
        )
        source = Source(rules, self._spacing, self._offsets)
        graph = VolumeGraph(self._shape, self._block, source, self._folder / "graph")
        if self._threshold != rules.threshold:
            self._find_edges(graph)
            self._threshold = rules.threshold
        graph.agglomerate()
        for number in range(graph.count):
            box, numbers = graph.numbered(number, self._labels)
            self._final[(0, *box)] = numbers
        return self._final

    def _find_edges(self, graph: VolumeGraph) -> None:
        """Find the fragments and edges of every block; files of other settings are removed."""
        shutil.rmtree(graph.folder, ignore_errors=True)
        graph.create()

        def write(box: Region, numbers: np.ndarray) -> None:
            self._local[(0, *box)] = numbers

        for number in range(graph.count):
            graph.find_fragments(number, self._heads, self._allowed, write, lambda: None)
        graph.join()
        for number in range(graph.count):
            graph.find_edges(number, self._labels, self._heads, self._allowed, lambda: None)

    def _labels(self, box: Region) -> np.ndarray:
        return np.asarray(self._local[(0, *box)])

    def _heads(self, box: Region) -> dict[str, np.ndarray]:
        return {name: volume.read(box) for name, volume in self._probabilities.items()}

    def _allowed(self, box: Region) -> np.ndarray | None:
        if self._mask is None:
            return None
        there = tuple(
            slice(part.start + first, part.stop + first)
            for part, first in zip(box, self._origin, strict=True)
        )
        return np.asarray(self._mask.read(there).any(axis=0))
