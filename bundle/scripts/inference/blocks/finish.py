"""Converts the weighted sums of a block to stored values and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from volumen.inference.gain import GainMeter
from volumen.inference.output.ome_zarr import ZarrOutput
from volumen.inference.output.stored import OutputSpec
from volumen.inference.windows.blending import axis_weight_sums, divide_by_weights
from volumen.inference.windows.heads import Head, split_channels
from volumen.inference.windows.plan import PredictPlan
from volumen.inference.windows.reader import WindowReader
from volumen.inference.windows.stream import Finished

if TYPE_CHECKING:
    from volumen.inference.volume_work import State


class BlockWriter:
    """Turns the weighted sums of a block into stored values and writes them.

    Args:
        plan: windows and blocks.
        heads: the outputs, in the order of the accumulated channels.
        stored: how each output is stored.
        reader: states which voxels the mask or damaged chunks exclude.
        sinks: target to the arrays that its values are written to.
        state: records every finished block.
        gain: compares the results with and without augmentation; the channels without it follow those with it. None:
            no comparison.
        joined: whether blocks come as means over an ensemble, which are divided by the windows' weights already.
    """

    def __init__(
        self,
        plan: PredictPlan,
        heads: tuple[Head, ...],
        stored: list[OutputSpec],
        reader: WindowReader,
        sinks: Mapping[str, ZarrOutput],
        state: State,
        gain: GainMeter | None = None,
        joined: bool = False,
    ) -> None:
        self._plan, self._heads, self._stored = plan, heads, stored
        self._reader, self._sinks, self._state = reader, sinks, state
        self._gain = gain
        self._sums = None if joined else axis_weight_sums(plan)

    def __call__(self, finished: Finished) -> None:
        block, values, empty = finished
        box = self._plan.block_box(block)
        for name, result in self.results(box, values, empty):
            self._sinks[name].write(name, box, result)
        self._state.record(block)

    def results(
        self, box: tuple[slice, ...], values: Any, empty: list[tuple[slice, ...]]
    ) -> list[tuple[str, np.ndarray]]:
        """Return the stored values of every target for a block, 0 where it is empty.

        Args:
            box: region of the block in the output.
            values: weighted sums (channels, *block_shape), an array or a tensor on any device; None: all is empty.
            empty: empty parts of the block.
        """
        shape = tuple(part.stop - part.start for part in box)
        if values is None:
            return [(s.head.name, np.full((s.channels, *shape), s.empty, s.dtype)) for s in self._stored]
        values = torch.as_tensor(values)[(slice(None), *(slice(0, n) for n in shape))].contiguous()
        if self._sums is not None:
            divide_by_weights(values, self._sums, box)
        half = len(values) // 2 if self._gain else len(values)
        parts = split_channels(self._heads, values[:half])
        plain = split_channels(self._heads, values[half:]) if self._gain else {}
        outside = self._reader.masked_out(box)
        empty = [*empty, *self._reader.empty_parts(box)]
        results = []
        for stored in self._stored:
            head = stored.head
            if self._gain is not None and head.name in self._gain:
                decoded, without = (head.decode(part[head.name]).cpu().numpy() for part in (parts, plain))
                self._gain.add(head.name, box, without, decoded)
            result = stored.of_blend(parts[head.name])
            for part in empty:
                result[(slice(None), *part)] = stored.empty
            if outside is not None:
                result[:, outside] = stored.empty
            results.append((head.name, result))
        return results
