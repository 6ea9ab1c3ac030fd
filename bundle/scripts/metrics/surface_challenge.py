"""The score of the surface detection challenge of 2025/26: topology, surface Dice and variation of information.

Score = 0.30 TopoScore + 0.35 SurfaceDice at 2 voxels + 0.35 VOI score, as its public description defines them
(https://www.kaggle.com/competitions/vesuvius-challenge-surface-detection). Unknown voxels are background of both.
Two things differ from the program of the challenge: surfaces are counted by voxels rather than by triangles, and
features are matched as `match_features` says, in windows of `TOPOLOGY_WINDOW` voxels, which is one window for a volume
of the challenge.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from volumen.metrics.objects.partition import voi_merge, voi_split
from volumen.metrics.surface import SurfaceDistances, surface_dice
from volumen.metrics.topology.homology import match_features

TOPOLOGY_WINDOW = 320
"""Voxels per axis of the windows in which features are matched."""
TOLERANCE = 2.0
"""Of the surface Dice, in voxels."""
VOI_SCALE = 0.3
"""How fast the score of the variation of information falls: 1 / (1 + VOI_SCALE * VOI)."""
PARTS = (0.30, 0.35, 0.35)
"""Weights of topology, surface Dice and variation of information."""
DIMENSIONS = (0.34, 0.33, 0.33)
"""Weights of components, tunnels and cavities."""


@dataclass
class ChallengeTopology:
    """Features that prediction and truth have in common, added up over windows."""

    matched: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    pred: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    truth: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))

    def add(self, pred: np.ndarray, truth: np.ndarray) -> None:
        """Add a window, bool (Z, Y, X)."""
        found = match_features(pred, truth)
        self.matched += found.matched
        self.pred += found.pred
        self.truth += found.truth

    def merge(self, other: ChallengeTopology) -> None:
        """Add the windows of another accumulator."""
        self.matched += other.matched
        self.pred += other.pred
        self.truth += other.truth

    def score(self) -> float:
        """Return the weighted mean over dimensions with any feature of their F1; 1 where there is none.

        Of a dimension in which only the prediction has p features, the score is 0.5 / (p + 0.5).
        """
        total = weight = 0.0
        for matched, pred, truth, part in zip(self.matched, self.pred, self.truth, DIMENSIONS, strict=True):
            if pred + truth == 0:
                continue
            weight += part
            total += part * float(2 * matched / (pred + truth) if truth else 0.5 / (pred + 0.5))
        return total / weight if weight else 1.0


def challenge_score(distances: SurfaceDistances, table: np.ndarray, topology: ChallengeTopology) -> float:
    """Return the score, 0 to 1, 1 is perfect and also that of two empty volumes.

    Args:
        distances: between the surfaces, in voxels, the volume's border being one.
        table: overlaps of components, see `overlaps`.
        topology: matched features.
    """
    near = 1.0 if not len(table) else surface_dice(distances, TOLERANCE)
    voi = voi_split(table, "union") + voi_merge(table, "union") if len(table) else 0.0
    parts = (topology.score(), near, 1 / (1 + VOI_SCALE * voi))
    return sum(weight * part for weight, part in zip(PARTS, parts, strict=True))
