"""A view of a volume with its axes permuted and reversed."""

from __future__ import annotations

import numpy as np

from volumen.data.formats.volumes import Region, Volume, check_region
from volumen.data.space.geometry import AxisTurn
from volumen.data.views import VolumeView


class TurnedVolume(VolumeView):
    """A view of a volume with its axes permuted and reversed; each region is read first and reoriented then.

    Args:
        volume: the volume that is read.
        turn: permutation and reversal of its axes.
    """

    def __init__(self, volume: Volume, turn: AxisTurn) -> None:
        super().__init__(volume)
        self.turn = turn
        self.shape = turn.of_axes(volume.shape)
        self.dtype = volume.dtype
        self.chunks = turn.of_axes(volume.chunks)
        self.geometry = volume.geometry.turned(turn, volume.shape)
        self.affine = _turned_affine(volume.affine, turn, volume.shape)

    def inner_region(self, region: Region) -> Region:
        return self.turn.source(region, self.volume.shape)

    def fingerprint(self) -> str:
        """Return a hash of the volume's content and of the turn."""
        from volumen.data.caching.fingerprints import digest

        return digest([self.volume.fingerprint(), self.turn.order, self.turn.flips])

    def read(self, region: Region) -> np.ndarray:
        region = check_region(region, self.shape)
        block = self.volume.read(self.inner_region(region))
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
