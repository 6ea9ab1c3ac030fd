"""Merges the fragments of a whole volume by the table of edges.

Mean: average linkage by the mean wall between fragments, Beier et al. 2017, Bailoni et al. 2019. Mutex: mutex watershed
on fragments, in which distant pairs repel, Wolf et al. 2018. Multicut: Kappes et al. 2011, Beier et al. 2017.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from volumen.inference.postprocess.graph.edges import (
    FACE_SUM,
    FACES,
    FIRST,
    LOWEST,
    PAIR_SUM,
    PAIRS,
    SECOND,
)
from volumen.inference.postprocess.graph.landscape import CERTAIN


def agglomerate(
    table: np.ndarray,
    fragments: int,
    how: str,
    threshold: float,
    lowest: np.ndarray | None = None,
    neck_power: int = 0,
) -> np.ndarray:
    """Return the cluster of each fragment, uint32 (fragments,), numbered from 0 in the order of their first fragments.

    Args:
        table: the edges, see `edges`.
        fragments: number of fragments.
        how: "mean", "mutex" or "multicut".
        threshold: mean wall below which fragments merge.
        lowest: the lowest height of each region; needed where necks count.
        neck_power: power by which a neck counts as a wall, see `_necks`; 0: it does not.
    """
    if lowest is not None and neck_power and len(table):
        table = _necks(table, lowest, neck_power)
    if not len(table) or not fragments:
        return np.arange(fragments, dtype=np.uint32)
    merged = {"mean": _mean, "mutex": _mutex, "multicut": _multicut}[how](table, fragments, threshold)
    _, first, clusters = np.unique(merged, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.uint32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.uint32)
    return rank[clusters]


def _necks(table: np.ndarray, lowest: np.ndarray, power: int) -> np.ndarray:
    """Return a table whose walls are at least as high as necks are narrow.

    A neck of depth d between fragments of depths a and b counts as a wall of (1 - d / min(a, b))^power, whatever their
    size: 0 within a tube of constant width, 1 where two objects barely touch.
    """
    depth = (CERTAIN - lowest).astype(np.float64)
    shallower = np.minimum(depth[table[:, FIRST] - 1], depth[table[:, SECOND] - 1])
    neck = 1 - np.clip((CERTAIN - table[:, LOWEST]) / np.maximum(shallower, 1), 0, 1)
    neck **= power
    higher = np.array(table)
    narrow = np.rint(neck * (2 * CERTAIN)).astype(np.int64) * table[:, FACES]
    higher[:, FACE_SUM] = np.maximum(table[:, FACE_SUM], narrow)
    return higher


def _graph(table: np.ndarray, fragments: int) -> Any:
    import bioimage_cpp as bic

    pairs = np.stack([table[:, FIRST] - 1, table[:, SECOND] - 1], axis=1).astype(np.uint64)
    return bic.graph.UndirectedGraph.from_unique_edges(fragments, pairs)


def _mean_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return sums / (2 * CERTAIN * np.maximum(counts, 1))


def _mean(table: np.ndarray, fragments: int, threshold: float) -> np.ndarray:
    import bioimage_cpp as bic

    count = table[:, FACES] + table[:, PAIRS]
    weights = threshold - _mean_of(table[:, FACE_SUM] + table[:, PAIR_SUM], count)
    # Fragments that do not touch may repel each other, but never attract.
    chosen = (table[:, FACES] > 0) | (weights < 0)
    policy = bic.graph.agglomeration.GaspClusterPolicy(linkage="mean")
    graph = _graph(table[chosen], fragments)
    sizes = count[chosen].astype(np.float64)
    return np.asarray(policy.optimize(graph, weights[chosen], edge_sizes=sizes))


def _mutex(table: np.ndarray, fragments: int, threshold: float) -> np.ndarray:
    import bioimage_cpp as bic

    touching, distant = table[table[:, FACES] > 0], table[table[:, PAIRS] > 0]
    attract = (1 - _mean_of(touching[:, FACE_SUM], touching[:, FACES])) / (1 - threshold)
    repel = _mean_of(distant[:, PAIR_SUM], distant[:, PAIRS]) / threshold
    pairs = (distant[:, :2] - 1).astype(np.uint64)
    return np.asarray(
        bic.graph.mutex_watershed.mutex_watershed_clustering(
            _graph(touching, fragments), attract, pairs, repel
        )
    )


def _multicut(table: np.ndarray, fragments: int, threshold: float) -> np.ndarray:
    from bioimage_cpp.graph import multicut

    count = table[:, FACES] + table[:, PAIRS]
    mean = np.clip(_mean_of(table[:, FACE_SUM] + table[:, PAIR_SUM], count), 0.001, 0.999)
    costs = (np.log((1 - mean) / mean) - np.log((1 - threshold) / threshold)) * count / count.max()
    chosen = (table[:, FACES] > 0) | (costs < 0)
    objective = multicut.MulticutObjective(_graph(table[chosen], fragments), costs[chosen])
    solver = multicut.ChainedMulticutSolvers(
        [multicut.GreedyAdditiveMulticut(), multicut.KernighanLinMulticut()]
    )
    return np.asarray(solver.optimize(objective))
