"""Meshes of objects in a label volume, block by block: the pieces of neighbouring blocks fit without a seam.

Marching cubes look at cells of 2 x 2 x 2 voxels. Every cell belongs to one block, and a vertex on the face between
two blocks follows from the voxels on that face, which both blocks read; so the union of all pieces is the mesh of the
whole.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from tqdm import tqdm

from volumen.data.formats.volumes import Volume
from volumen.inference.postprocess.blocks import block_box, block_counts
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.progress import hidden

logger = logging.getLogger(__name__)

BLOCK = 128
"""Voxels per axis of a block."""
MOST_OBJECTS = 20_000
"""More objects than this are not meshed unless they are chosen."""


class Meshes(AbstractContextManager["Meshes"]):
    """The meshes of a label volume.

    Pieces are stored in a temporary file; memory holds one block, the places of the pieces, and one object at a time.

    Args:
        volume: labels (Z, Y, X) with one channel.
        ids: objects to mesh; None: all.
        threshold: mesh the surface of what is at least this value, as object 1, instead of labels.
        block: voxels per axis of a block.

    Raises:
        VolumenError: zmesh is not installed, the volume is not 3D or has several channels, or it has too many objects.
    """

    def __init__(
        self,
        volume: Volume,
        ids: Collection[int] | None = None,
        threshold: float | None = None,
        block: int = BLOCK,
    ) -> None:
        if len(volume.shape) != 3 or volume.channels != 1:
            raise VolumenError(
                volume.source,
                expected="a volume (Z, Y, X) of one channel",
                found=f"{volume.channels} x {volume.shape}",
            )
        if threshold is None and volume.dtype.kind == "f":
            raise VolumenError(
                volume.source, expected="labels", found=str(volume.dtype), remedy="give --threshold"
            )
        self._volume, self._threshold = volume, threshold
        self._wanted = None if ids is None else np.array(sorted(ids), dtype=np.uint64)
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._block = block
        try:
            self._collect()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    @property
    def ids(self) -> list[int]:
        """The objects that have a surface."""
        return sorted(self._pieces)

    def mesh(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the mesh of an object, closed and with normals to the outside, if the space is right-handed (X, Y, Z).

        Args:
            number: one of `ids`.

        Returns:
            vertices: (N, 3) float64, voxels (Z, Y, X), 0 is the centre of the first voxel.
            triangles: (M, 3) int64 numbers of vertices.
        """
        points, triangles, count = [], [], 0
        for start, vertices, faces in self._pieces[number]:
            self._file.seek(start)
            data = self._file.read(12 * (vertices + faces))
            points.append(np.frombuffer(data, np.int32, 3 * vertices).reshape(-1, 3))
            triangles.append(np.frombuffer(data, np.int32, 3 * faces, 12 * vertices).reshape(-1, 3) + count)
            count += vertices
        unique, inverse = np.unique(np.concatenate(points), axis=0, return_inverse=True)
        corners = inverse.reshape(-1)[np.concatenate(triangles)]
        return _outward(unique / 2.0, corners.astype(np.int64))

    def _collect(self) -> None:
        counts = block_counts(self._volume.shape, (self._block,) * 3)
        total = int(np.prod(counts))
        for number in tqdm(range(total), "meshes", unit="block", leave=False, disable=hidden(True)):
            self._mesh_block(block_box(number, self._volume.shape, (self._block,) * 3))

    def _mesh_block(self, box: tuple[slice, ...]) -> None:
        labels = self._labels(box)
        if not labels.any():
            return
        mesher = _mesher()
        mesher.mesh(labels, close=False)
        for number in mesher.ids():
            mesh = mesher.get(number, normals=False, reduction_factor=0)
            if not len(mesh.faces):
                continue
            # One voxel before the block is read; vertices lie at halves.
            doubled = np.rint(mesh.vertices * 2).astype(np.int32) + [2 * (part.start - 1) for part in box]
            start = self._file.seek(0, 2)
            self._file.write(doubled.astype(np.int32).tobytes())
            self._file.write(np.ascontiguousarray(mesh.faces, dtype=np.int32).tobytes())
            self._pieces.setdefault(int(number), []).append((start, len(doubled), len(mesh.faces)))
        if self._wanted is None and len(self._pieces) > MOST_OBJECTS:
            raise VolumenError(
                self._volume.source,
                expected=f"at most {MOST_OBJECTS} objects",
                found="more",
                remedy="choose some with --ids",
            )

    def _labels(self, box: tuple[slice, ...]) -> np.ndarray:
        """Return the labels of a block, with the voxel before it along every axis, and 0 around the volume.

        At the end of an axis the voxel after it is added, so that every cell, also those around the volume, is in one
        block.
        """
        shape = self._volume.shape
        inside = tuple(slice(max(part.start - 1, 0), part.stop) for part in box)
        values = self._volume.read(inside)[0]
        if self._threshold is not None:
            values = (values >= self._threshold).astype(np.uint8)
        elif self._wanted is not None:
            values = np.where(np.isin(values.astype(np.uint64), self._wanted), values, 0)
        if values.dtype.kind == "i" or values.dtype == np.bool_:
            values = np.maximum(values, 0).astype(np.uint64)
        padding = [
            (int(part.start == 0), int(part.stop == size)) for part, size in zip(box, shape, strict=True)
        ]
        return np.ascontiguousarray(np.pad(values, padding))


def _mesher() -> Any:
    try:
        import zmesh
    except ImportError:
        raise VolumenError(
            "meshes", "zmesh is not installed", remedy="pip install 'volumen[meshes]'"
        ) from None
    return zmesh.Mesher((1, 1, 1))


def _outward(vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orient the triangles of a closed mesh: counted in (X, Y, Z), its volume is positive."""
    xyz = vertices[:, ::-1] - vertices[:, ::-1].mean(axis=0)
    corners = xyz[triangles]
    signed = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum()
    return vertices, triangles if signed >= 0 else triangles[:, ::-1]
