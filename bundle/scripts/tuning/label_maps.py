"""Label maps of one region by many settings, made from its stored probabilities as a prediction makes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.inference.postprocess.block_files import BlockFiles
from volumen.inference.postprocess.blocks import Region, block_box, block_counts
from volumen.inference.postprocess.cleaning import BLOCK_VOXELS
from volumen.inference.postprocess.components import (
    Components,
    background,
    combine,
    fill_chosen,
    keep_chosen,
    kept_components,
    small_holes,
    survey_block,
)
from volumen.inference.rules import CleaningRules
from volumen.tuning.scratch import scratch_array

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume

Prepare = Callable[[np.ndarray], np.ndarray]


class LabelMaps:
    """Makes label maps (C, *space) uint8 in a file, block by block; steps that two settings share are done once.

    Args:
        probabilities: stored output of the head.
        softmax: the label is the class of highest probability; else 0 or 1 by the threshold.
        keep_largest: components of each class that stay; None for all.
        folder: where the files go.
    """

    def __init__(
        self, probabilities: Volume, *, softmax: bool, keep_largest: int | None, folder: Path
    ) -> None:
        self._probabilities, self._softmax, self._keep_largest = probabilities, softmax, keep_largest
        self._shape = probabilities.shape
        side = max(1, round(BLOCK_VOXELS ** (1 / len(self._shape))))
        self._block = tuple(min(side, n) for n in self._shape)
        self._folder = folder
        folder.mkdir(parents=True)
        channels = 1 if softmax else probabilities.channels
        self._raw, self._filled, self._final = (
            scratch_array(folder / f"{name}.npy", np.uint8, (channels, *self._shape))
            for name in ("raw", "filled", "final")
        )
        self._raw_of: float | None = None
        self._filled_of: tuple[float, int] | None = None
        self._parts_of: tuple[float, int] | None = None
        self._holes: list[Components] = []
        self._parts: list[Components] = []

    def __call__(self, settings: Mapping[str, float]) -> np.ndarray:
        """Return the label map by settings; it is valid until the next call.

        Args:
            settings: `threshold` (not with a softmax), and, 0 where left out, `fill_holes` and `min_size`.
        """
        threshold, largest = settings.get("threshold", 0.5), int(settings.get("fill_holes", 0))
        rules = CleaningRules(int(settings.get("min_size", 0)), self._keep_largest)
        if self._raw_of != threshold:
            self._decide(threshold)
        labels = self._fill(threshold, largest) if largest else self._raw
        if rules.does_nothing:
            return labels
        if self._parts_of != (threshold, largest):
            self._parts = self._survey(labels, "components")
            self._parts_of = threshold, largest
        for channel, parts in enumerate(self._parts):
            kept = kept_components(parts, rules)[1:]
            self._write(labels, self._final, channel, parts, kept, keep_chosen)
        return self._final

    def _boxes(self) -> list[Region]:
        count = math.prod(block_counts(self._shape, self._block))
        return [block_box(number, self._shape, self._block) for number in range(count)]

    def _decide(self, threshold: float) -> None:
        """Write the labels before cleaning."""
        for box in self._boxes():
            values = self._probabilities.read(box).astype(np.float32)
            labels = values.argmax(axis=0)[None] if self._softmax else values >= threshold
            self._raw[(slice(None), *box)] = labels
        self._raw_of, self._filled_of, self._parts_of, self._holes = threshold, None, None, []

    def _fill(self, threshold: float, largest: int) -> np.ndarray:
        """Write the labels with their holes filled, and return them."""
        if not self._holes:
            self._holes = self._survey(self._raw, "holes", background)
        if self._filled_of != (threshold, largest):
            for channel, holes in enumerate(self._holes):
                chosen = small_holes(holes, largest)[1:]
                self._write(self._raw, self._filled, channel, holes, chosen, fill_chosen)
            self._filled_of = threshold, largest
        return self._filled

    def _survey(self, labels: Any, name: str, prepare: Prepare = np.asarray) -> list[Components]:
        """Return the components of every channel."""
        found = []
        for channel in range(len(labels)):
            files = BlockFiles(self._folder / f"{name}-{channel}")
            files.folder.mkdir(exist_ok=True)
            for number, box in enumerate(self._boxes()):
                data = prepare(labels[(channel, *box)])
                files.save(number, survey_block(data, box, self._shape))
            found.append(combine(files.load, block_counts(self._shape, self._block)))
        return found

    def _write(
        self,
        source: Any,
        target: Any,
        channel: int,
        parts: Components,
        chosen: np.ndarray,
        make: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        for number, box in enumerate(self._boxes()):
            of_block = chosen[parts.offsets[number] : parts.offsets[number + 1]]
            target[(channel, *box)] = make(np.asarray(source[(channel, *box)]), of_block)
