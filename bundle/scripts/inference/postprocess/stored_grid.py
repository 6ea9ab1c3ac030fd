"""The pass that resamples blended values from the network's grid to the voxels of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from volumen.data.space.resampling import Resampling, nearest
from volumen.data.validity import inside_mask
from volumen.inference.arrays import block_sinks, grid_arrays
from volumen.inference.postprocess.blocks import Region, block_box, block_counts
from volumen.inference.postprocess.passes import CancellationCheck
from volumen.inference.resampling import length_factor, on_stored_grid
from volumen.inference.windows.plan import Box

if TYPE_CHECKING:
    from volumen.inference.volume_work import VolumeWork


@dataclass(frozen=True)
class StoredGridPass:
    """Resamples the blended values of every block of the output from the network's grid to the image's.

    Args:
        work: the volume's prediction, of which all blocks of the network's grid are finished.
    """

    work: VolumeWork
    is_light = False

    @property
    def title(self) -> str:
        return "resampling to the image's voxels"

    @property
    def count(self) -> int:
        plan = self.work.plan
        return math.prod(block_counts(plan.output_shape, plan.block_shape))

    def make(self, number: int, raise_if_cancelled: CancellationCheck) -> None:
        work, plan = self.work, self.work.plan
        assert work.resampling is not None
        box = block_box(number, plan.output_shape, plan.block_shape)
        region = tuple(
            slice(part.start + low, part.stop + low) for part, (low, _) in zip(box, plan.box, strict=True)
        )
        needed = work.resampling.resampled_box(tuple((part.start, part.stop) for part in region))
        local = tuple(
            slice(a - low, b - low) for (a, b), (low, _) in zip(needed, work.window_plan.box, strict=True)
        )
        mask = None if work.job.mask is None else inside_mask(work.job.mask.read(region))
        grid, sinks = grid_arrays(work), block_sinks(work)
        factor = length_factor(work.resampling, work.voxel_size)
        for stored in work.stored:
            name = stored.head.name
            blend, empty = _on_stored_grid(grid.read(name, local), work.resampling, region, needed)
            if stored.head.kind == "distance":
                blend *= np.float32(factor)
            result = stored.of_blend(torch.from_numpy(blend))
            result[:, empty if mask is None else empty | ~mask] = 0
            raise_if_cancelled()
            sinks[name].write(name, box, result)


def _on_stored_grid(
    blend: np.ndarray, resampling: Resampling, region: Region, place: Box
) -> tuple[np.ndarray, np.ndarray]:
    """Return values at stored voxels, and where nothing is predicted: (channels, *region), bool (*region).

    A stored voxel is empty if the nearest voxel of the network's grid is; else it is the mean of those around it that
    are not, by their weights, so that emptiness does not spread.

    Args:
        blend: blended values of the network's grid, NaN where nothing is predicted.
        resampling: the network's grid.
        region: stored voxels.
        place: where `blend` lies in the network's grid.
    """
    first = [start for start, _ in place]
    missing = np.isnan(blend).any(axis=0, keepdims=True)
    outside = resampling.outside(region)
    if not missing.any():
        values = on_stored_grid(blend, resampling, region, first)
        return values, np.zeros(values.shape[1:], bool) if outside is None else outside
    positions = [resampling.resampled_positions(axis, r.start, r.stop) for axis, r in enumerate(region)]
    empty = nearest(missing, positions, first)[0]
    values = on_stored_grid(np.where(missing, np.float32(0), blend), resampling, region, first)
    weight = on_stored_grid((~missing).astype(np.float32), resampling, region, first)[0]
    values /= np.where(empty, np.float32(1), weight)
    if outside is not None:
        empty |= outside
    values[:, empty] = 0
    return values, empty
