"""A view of a volume with its axes permuted and reversed."""

from __future__ import annotations

import copy

import numpy as np

from volumen.data.formats.volumes import HasGeometry, Region, Volume, check_region, describe_volume
from volumen.data.space.geometry import AxisTurn


class TurnedVolume(HasGeometry):
    """A view of a volume with its axes permuted and reversed; each region is read first and reoriented then.

    Args:
        volume: the volume that is read.
        turn: permutation and reversal of its axes.
    """

    def __init__(self, volume: Volume, turn: AxisTurn) -> None:
        self.volume, self.turn = volume, turn
        self.source = volume.source
        self.shape = turn.of_axes(volume.shape)
        self.channels = volume.channels
        self.dtype = volume.dtype
        self.remark = getattr(volume, "remark", "")
        self.chunks = turn.of_axes(volume.chunks)
        self.geometry = volume.geometry.turned(turn, volume.shape)
        self.affine = _turned_affine(volume.affine, turn, volume.shape)

    @property
    def path(self) -> str:
        """Path of the volume."""
        return self.volume.path

    @path.setter
    def path(self, path: str) -> None:
        self.volume = copy.copy(self.volume)
        self.volume.path = path

    def __repr__(self) -> str:
        return describe_volume(self)

    def fingerprint(self) -> str:
        """Return a hash of the volume's content and of the turn."""
        from volumen.data.caching.fingerprints import digest

        return digest([self.volume.fingerprint(), self.turn.order, self.turn.flips])

    def read(self, region: Region) -> np.ndarray:
        region = check_region(region, self.shape)
        block = self.volume.read(self.turn.source(region, self.volume.shape))
        return np.ascontiguousarray(self.turn.apply(block))


def _turned_affine(affine: np.ndarray | None, turn: AxisTurn, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the (4, 4) affine over (X, Y, Z) indices of the reoriented array."""
    if affine is None or len(shape) != 3:
        return affine
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1.0
    for axis, (source, flip) in enumerate(zip(turn.order, turn.flips, strict=True)):
        matrix[2 - source, 2 - axis] = -1.0 if flip else 1.0
        matrix[2 - source, 3] = shape[source] - 1 if flip else 0
    return affine @ matrix
