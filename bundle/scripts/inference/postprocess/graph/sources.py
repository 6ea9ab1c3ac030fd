"""How heads become a landscape for fragments and statistics of edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from volumen.derived.arrays.affinities import overlap
from volumen.derived.extents import gaussian_radius, in_voxels
from volumen.inference.postprocess.graph.edges import EdgeSums
from volumen.inference.postprocess.graph.landscape import (
    CERTAIN,
    DEPTH_SIGMA,
    DESCRIPTOR_JUMP,
    SHEET_SIGMA,
    Heads,
    Landscape,
    as_level,
    converging_wall,
    depth_landscape,
    levels,
    walls_landscape,
    walls_reach,
)
from volumen.inference.rules import InstanceRules


@dataclass(frozen=True)
class Source:
    """What the rules read from the heads of a region.

    Args:
        rules: heads and parameters.
        spacing: voxel size per axis.
        offsets: offsets of the affinities, voxels per axis in array order, one per channel; () for other heads.
    """

    rules: InstanceRules
    spacing: tuple[float, ...]
    offsets: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def steps(self) -> tuple[float, ...]:
        """Voxel size in units of the smallest."""
        return in_voxels(self.spacing)

    @property
    def threshold(self) -> int:
        """The lowest wall that separates."""
        return as_level(self.rules.threshold)

    @property
    def halo(self) -> tuple[int, ...]:
        """Voxels per axis around a block on which its fragments depend."""
        if self.rules.distance is not None:
            reach = gaussian_radius(self._depth_sigma, self.steps)
        else:
            reach = walls_reach(self.rules.halo, self.steps)
        # A voxel compares the heights of its neighbours, and a wall the fields on both sides of it.
        return tuple(radius + 2 for radius in reach)

    @property
    def edge_halo(self) -> tuple[tuple[int, int], ...]:
        """Voxels before and behind a block, per axis, whose fragments its edges reach."""
        if self.offsets:
            axes = list(zip(*self.offsets, strict=True))
            return tuple((max(0, *(-step for step in axis)), max(1, *axis)) for axis in axes)
        return ((0, 1),) * len(self.spacing)

    @property
    def neck_power(self) -> int:
        """Power by which a neck between two fragments counts as a wall: 0 where no distances are predicted.

        The depth of thin sheets, which normals describe, varies by as much as it is: there narrow ones count less.
        """
        if self.rules.distance is None:
            return 0
        return 1 if self.rules.normals is None else 2

    @property
    def agglomeration(self) -> str:
        """How fragments merge: "mean", "mutex" or "multicut"."""
        if self.rules.agglomeration != "auto":
            return self.rules.agglomeration
        return "mean" if all(is_step(offset) for offset in self.offsets) else "mutex"

    def landscape(self, heads: Heads, mask: np.ndarray | None = None) -> Landscape:
        """Return the landscape of a region.

        Args:
            heads: stored outputs of the heads.
            mask: bool (*space), where instances may be; None: everywhere.
        """
        rules = self.rules
        inside = mask
        if rules.foreground is not None:
            found = levels(heads[rules.foreground]).max(axis=0) >= self.threshold
            inside = found if inside is None else inside & found
        if rules.distance is not None:
            signed = heads[rules.distance][0]
            wall = self._wall(heads)
            return depth_landscape(signed, wall, inside, self.steps, self.threshold, self._depth_sigma)
        if rules.affinities is None:
            return walls_landscape(self._wall(heads), inside, self.steps, self.threshold, rules.halo)
        links = self._links(levels(heads[rules.affinities]))
        if rules.foreground is None:
            found = _bound(links, as_level(1 - rules.threshold))
            inside = found if inside is None else inside & found
        # Noise below the threshold would make a fragment of every few voxels.
        links[links < self.threshold] = 0
        found = walls_landscape(links.max(axis=0), inside, self.steps, self.threshold, rules.halo)
        return replace(found, links=links)

    def add_edges(self, sums: EdgeSums, landscape: Landscape, heads: Heads, owned: tuple[slice, ...]) -> None:
        """Add the edges of a block to its sums.

        Args:
            sums: the sums, with the labels of the block and its surroundings.
            landscape: of the same region.
            heads: stored outputs of the block.
            owned: the block as a part of the region.
        """
        if self.rules.affinities is None:
            sums.add_faces(landscape.wall, landscape.height)
            return
        sums.add_faces(None, landscape.height, landscape.links)
        affinities = levels(heads[self.rules.affinities])
        for values, offset in zip(affinities, self.offsets, strict=True):
            sums.add_offset(np.uint16(CERTAIN) - values, offset, far=not is_step(offset))

    @property
    def _depth_sigma(self) -> float:
        return DEPTH_SIGMA if self.rules.normals is None else SHEET_SIGMA

    def _wall(self, heads: Heads) -> np.ndarray:
        """Return the highest of the walls that the heads state, uint16 (*space)."""
        rules, axes = self.rules, len(self.spacing)
        found = []
        if rules.boundary is not None:
            found.append(levels(heads[rules.boundary]).max(axis=0))
        if rules.normals is not None:
            found.append(converging_wall(heads[rules.normals][:axes], 2.0))
        if rules.descriptors is not None:
            # Offsets to the mean of an object point away from its border, normals point at it.
            found.append(converging_wall(-heads[rules.descriptors][:axes], DESCRIPTOR_JUMP))
        if found:
            return np.maximum.reduce(found)
        if rules.distance is not None:
            return np.zeros(heads[rules.distance].shape[1:], np.uint16)
        return np.uint16(CERTAIN) - levels(heads[rules.foreground or ""]).max(axis=0)

    def _links(self, affinities: np.ndarray) -> np.ndarray:
        """Return the wall between each voxel and the previous one, uint16 (axes, *space); 0 where there is none."""
        links = np.zeros((len(self.spacing), *affinities.shape[1:]), np.uint16)
        for values, offset in zip(affinities, self.offsets, strict=True):
            if is_step(offset):
                axis = next(number for number, step in enumerate(offset) if step)
                here, there = overlap(values.shape, offset)
                # The affinity is stored at the voxel of `here`; the later voxel of the two holds the link.
                later = here if offset[axis] < 0 else there
                links[axis][later] = np.uint16(CERTAIN) - values[here]
        return links


def is_step(offset: Sequence[int]) -> bool:
    """Whether an offset leads to a neighbour across a face."""
    return sum(abs(step) for step in offset) == 1


def _bound(links: np.ndarray, level: int) -> np.ndarray:
    """Return bool (*space): voxels with a wall of at most `level` to a neighbour across a face."""
    found = np.zeros(links.shape[1:], bool)
    for axis, link in enumerate(links):
        later = (slice(None),) * axis + (slice(1, None),)
        before = (slice(None),) * axis + (slice(None, -1),)
        open_here = link[later] <= level
        found[later] |= open_here
        found[before] |= open_here
    return found
