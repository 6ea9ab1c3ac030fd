"""Segments instances from a network's outputs: walls and foreground by watershed, affinities by mutex watershed.

Walls: fragments grow by watershed from the maxima of the distance to the walls; then neighbours merge while the mean
wall probability on their common face is below a threshold (average linkage), as in Beier et al. 2017 and Wolny et al.
2020 (PlantSeg). Affinities with long offsets: mutex watershed, Wolf et al. 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from volumen.derived.extents import in_voxels
from volumen.inference.rules import InstanceRules

SEED_SIGMA = 2.0
"""Sigma of the Gaussian that smooths the distance to the walls before its maxima are found, in smallest voxel sides."""
DISTANCE_SHARE = 0.2
"""Weight of the distance in the height map of the watershed; the wall probability has the remaining weight."""


@dataclass(frozen=True)
class InstanceSegmenter:
    """Segments an array, or a block of it with context.

    Args:
        rules: heads and parameters.
        spacing: voxel size per axis.
        offsets: offsets of the affinities, voxels per axis in array order, one per channel; () for boundaries.
    """

    rules: InstanceRules
    spacing: tuple[float, ...]
    offsets: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def steps(self) -> tuple[float, ...]:
        """Voxel size in units of the smallest."""
        return in_voxels(self.spacing)

    @property
    def halo(self) -> tuple[int, ...]:
        """Context in voxels per axis, at least 1, and at least the reach of the affinities."""
        reach = [max((abs(o[axis]) for o in self.offsets), default=1) for axis in range(len(self.spacing))]
        return tuple(max(round(self.rules.halo / s), r, 1) for s, r in zip(self.steps, reach, strict=True))

    def __call__(self, probabilities: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return instance numbers from 1, 0 for none: uint32 (*space).

        Args:
            probabilities: head to float32 (C, *space) in [0, 1].
        """
        rules = self.rules
        inside = None
        if rules.foreground is not None:
            inside = probabilities[rules.foreground].max(axis=0) >= rules.threshold
        if rules.affinities is not None:
            affinities = probabilities[rules.affinities]
            if any(not _is_step(offset) for offset in self.offsets):
                return from_affinities(affinities, self.offsets, inside, threshold=rules.threshold)
            # Offsets of one voxel alone have no repulsive edges: a low affinity then is a wall.
            inside = _bound(affinities, self.offsets, rules.threshold, inside)
            walls = 1 - affinities.min(axis=0)
        elif rules.boundary is not None:
            walls = probabilities[rules.boundary].max(axis=0)
        else:
            walls = 1 - probabilities[rules.foreground or ""].max(axis=0)
        return from_boundary(
            walls, inside, self.steps, threshold=rules.threshold, merge_threshold=rules.merge_threshold
        )


def from_boundary(
    boundary: np.ndarray,
    inside: np.ndarray | None = None,
    steps: Sequence[float] | None = None,
    *,
    threshold: float = 0.5,
    merge_threshold: float = 0.5,
) -> np.ndarray:
    """Separate the regions that walls enclose, by watershed and agglomeration.

    Args:
        boundary: float32 (*space), probability of a wall.
        inside: bool (*space), voxels that instances may contain; None: all, walls included.
        steps: voxel size per axis in units of the smallest; None: 1.
        threshold: smallest probability of a wall voxel.
        merge_threshold: fragments merge while the mean probability on their common face is below this.

    Returns:
        uint32 (*space), numbers from 1 without a gap; 0 outside. Wall voxels belong to the nearest instance.
    """
    import bioimage_cpp as bic
    import edt
    from scipy import ndimage

    steps = tuple(steps or (1.0,) * boundary.ndim)
    inside = np.ones(boundary.shape, bool) if inside is None else inside
    free = inside & (boundary < threshold)
    if not free.any():
        return np.zeros(boundary.shape, np.uint32)
    if free.all():
        return np.ones(boundary.shape, np.uint32)
    distance = edt.edt(free, anisotropy=steps, parallel=1)
    smooth = ndimage.gaussian_filter(distance, [SEED_SIGMA / step for step in steps])
    top = free & (ndimage.maximum_filter(smooth, size=3) == smooth)
    # A free component that is thinner than the smoothing may have no maximum, but is an instance too.
    seeds = _with_lost_components(top, free)
    height = (1 - DISTANCE_SHARE) * boundary + DISTANCE_SHARE / (1 + smooth)
    fragments = bic.segmentation.watershed(height.astype(np.float32), seeds, mask=inside)
    return _merge(fragments.astype(np.uint32), boundary, merge_threshold)


def _with_lost_components(top: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return numbered seeds, int32: the connected maxima, and every free component without a maximum."""
    import cc3d

    faces: Literal[4, 6] = 6 if top.ndim == 3 else 4
    everything: Literal[8, 26] = 26 if top.ndim == 3 else 8
    components, count = cc3d.connected_components(free, connectivity=faces, return_N=True)
    has_maximum = np.zeros(count + 1, bool)
    has_maximum[np.unique(components[top])] = True
    has_maximum[0] = True
    seeds = top | ~has_maximum[components]
    return cc3d.connected_components(seeds, connectivity=everything).astype(np.int32)


def _merge(fragments: np.ndarray, boundary: np.ndarray, threshold: float) -> np.ndarray:
    """Merge neighbouring fragments by the mean boundary between them, average linkage."""
    import bioimage_cpp as bic

    graph = bic.graph.region_adjacency_graph(fragments, number_of_threads=1)
    if graph.number_of_edges == 0:
        return fragments
    features = bic.graph.features.edge_map_features(
        graph, fragments, np.ascontiguousarray(boundary, np.float32), number_of_threads=1
    )
    weights = threshold - features[:, 0].astype(np.float64)
    # The outside (0) never merges with an instance.
    weights[(graph.uv_ids() == 0).any(axis=1)] = -1.0
    policy = bic.graph.agglomeration.GaspClusterPolicy(linkage="mean")
    nodes = np.asarray(policy.optimize(graph, weights, edge_sizes=features[:, 1].astype(np.float64)))
    return renumber(nodes[fragments] + 1, fragments > 0)[0]


def from_affinities(
    affinities: np.ndarray,
    offsets: Sequence[Sequence[int]],
    inside: np.ndarray | None = None,
    *,
    threshold: float = 0.5,
) -> np.ndarray:
    """Separate instances by mutex watershed: neighbours attract by affinity, distant voxels repel by 1 - affinity.

    Args:
        affinities: float32 (K, *space) in [0, 1], probability that a voxel and the one at the offset belong to the
            same instance.
        offsets: voxels per axis, in array order, one per channel.
        inside: bool (*space), voxels that instances may contain; None: voxels with an affinity to a neighbour of at
            least `threshold`.
        threshold: see `inside`.

    Returns:
        uint32 (*space), numbers from 1 without a gap; 0 outside.
    """
    import bioimage_cpp as bic

    near = [channel for channel, offset in enumerate(offsets) if _is_step(offset)]
    far = [channel for channel in range(len(offsets)) if channel not in near]
    inside = _bound(affinities, offsets, threshold, inside)
    if not inside.any():
        return np.zeros(inside.shape, np.uint32)
    weights = np.concatenate([affinities[near], 1 - affinities[far]]).astype(np.float32, copy=False)
    labels = bic.segmentation.mutex_watershed(
        weights, [tuple(map(int, offsets[c])) for c in near + far], len(near), mask=inside
    )
    return renumber(labels, inside)[0]


def _is_step(offset: Sequence[int]) -> bool:
    return sum(abs(step) for step in offset) == 1


def _bound(
    affinities: np.ndarray,
    offsets: Sequence[Sequence[int]],
    threshold: float,
    inside: np.ndarray | None,
) -> np.ndarray:
    """Return `inside`; if None, the voxels whose affinity to a face neighbour reaches the threshold."""
    from volumen.derived.arrays.affinities import overlap

    if inside is not None:
        return inside
    found = np.zeros(affinities.shape[1:], bool)
    for channel, offset in enumerate(offsets):
        if _is_step(offset):
            here, there = overlap(found.shape, offset)
            connected = affinities[channel][here] >= threshold
            found[here] |= connected
            found[there] |= connected
    return found


def renumber(labels: np.ndarray, where: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Return labels as uint32 numbers from 1 without a gap, in the order of their values, and their count.

    Args:
        labels: integer, 0 for none.
        where: bool; labels elsewhere become 0.
    """
    if where is not None:
        labels = np.where(where, labels, 0)
    values, numbers = np.unique(labels, return_inverse=True)
    numbers = numbers.reshape(labels.shape)
    first = 0 if values.size and values[0] == 0 else 1
    return (numbers + first).astype(np.uint32), int(values.size - 1 + first)
