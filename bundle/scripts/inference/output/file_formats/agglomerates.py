"""Writes agglomerate files of WEBKNOSSOS: which segments of a layer belong together, HDF5.

Datasets, all uint64 but for the last one: `segment_to_agglomerate`, by number of the segment; for each agglomerate its
segments, ascending, in `agglomerate_to_segments` and a voxel (x, y, z) of each in `agglomerate_to_positions`, from the
place in `agglomerate_to_segments_offsets` on; pairs of places among these segments in `agglomerate_to_edges` and how
certain they are, 0 to 1, in `agglomerate_to_affinities`, from the place in `agglomerate_to_edges_offsets` on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volumen.data.formats.extra.library import library

FOLDER, SUFFIX = "agglomerates", ".hdf5"


@dataclass(frozen=True)
class Mapping:
    """Segments and what they belong to.

    Args:
        agglomerate: number of each segment's agglomerate, from 1 without a gap, 0 for none, int64 (segments + 1,); the
            place 0 is the background.
        positions: a voxel (x, y, z) of each segment, int64 (segments + 1, 3).
        edges: segments that touch and belong together, int64 (n, 2).
        affinities: certainty of each edge, 0 to 1, (n,).
    """

    agglomerate: np.ndarray
    positions: np.ndarray
    edges: np.ndarray
    affinities: np.ndarray


def agglomerate_arrays(mapping: Mapping) -> dict[str, np.ndarray]:
    """Return the datasets of an agglomerate file."""
    owner = mapping.agglomerate
    count = int(owner.max(initial=0))
    segments = np.flatnonzero(owner)
    segments = segments[np.argsort(owner[segments], kind="stable")]
    first = np.searchsorted(owner[segments], np.arange(count + 2))
    place = np.zeros(len(owner), np.int64)
    place[segments] = np.arange(len(segments)) - first[owner[segments]]
    order = np.lexsort((place[mapping.edges[:, 1]], place[mapping.edges[:, 0]], owner[mapping.edges[:, 0]]))
    edges = mapping.edges[order]
    return {
        "segment_to_agglomerate": owner.astype(np.uint64),
        "agglomerate_to_segments_offsets": first.astype(np.uint64),
        "agglomerate_to_segments": segments.astype(np.uint64),
        "agglomerate_to_positions": mapping.positions[segments].astype(np.uint64),
        "agglomerate_to_edges_offsets": np.searchsorted(owner[edges[:, 0]], np.arange(count + 2)).astype(
            np.uint64
        ),
        "agglomerate_to_edges": place[edges].astype(np.uint64),
        "agglomerate_to_affinities": mapping.affinities[order].astype(np.float32),
    }


def write_agglomerates(path: Path, mapping: Mapping) -> None:
    """Write an agglomerate file.

    Args:
        path: the file; its folder is created.
        mapping: segments and what they belong to.

    Raises:
        VolumenError: h5py is not installed.
    """
    h5py = library("h5py", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in agglomerate_arrays(mapping).items():
            chunks = None if not values.size else tuple(min(n, 1 << 16) for n in values.shape)
            file.create_dataset(
                name, data=values, chunks=chunks, compression="gzip" if chunks is not None else None
            )
