"""How far an estimate near unknown voxels is trusted, and the error that a confidence states."""

from __future__ import annotations

from dataclasses import dataclass

LEAST = 0.02
"""A smaller confidence counts as 0."""


@dataclass(frozen=True)
class Calibration:
    """The expected error of a type's estimates, and the confidence that states it.

    With a = |d| the estimated distance of a voxel from the surface and b its clearance, the distance to the nearest
    unknown voxel, both in the smallest voxel size, the root mean square error is

        E = worst * exp(-decay * b / (a + margin)),

    and the confidence is c = 1 / (1 + (E / unit)^2). So c states E = unit * sqrt(1 / c - 1): 1/2 states an error of
    `unit`, 0.9 a third of it, 0.1 three times as much. As a weight, c is the inverse of the variance for large errors,
    and nearly 1 for errors far below `unit`, which a network's own errors exceed.

    `benchmarks/calibrate_confidence.py` fits the numbers to volumes whose labels are known everywhere.

    Attributes:
        worst: E next to an unknown voxel.
        decay: how fast E falls with the clearance.
        margin: in the smallest voxel size, about the width of the filters.
        unit: of E.
        in_plane: E of the part within a plane that alone is known, for vectors and tensors.
    """

    worst: float
    decay: float
    margin: float
    unit: float
    in_plane: float = 0.0

    @property
    def plane_confidence(self) -> float:
        """c of the part within a plane that alone is known."""
        return 1 / (1 + (self.in_plane / self.unit) ** 2)

    def stated_error(self, confidence: float) -> float:
        """Return E of a confidence above 0, in the unit of `unit`."""
        return self.unit * (1 / confidence - 1) ** 0.5


NORMAL = Calibration(worst=42.0, decay=1.8, margin=1.6, unit=15.0, in_plane=27.0)
"""Surface normals: angle in degrees."""
AXIS = Calibration(worst=50.0, decay=1.9, margin=3.0, unit=15.0)
"""In-plane directions: angle in degrees, without sign."""
TENSOR = Calibration(worst=0.64, decay=1.75, margin=1.9, unit=0.25, in_plane=0.2)
"""Structure tensors: norm of the difference over the norm of the tensor."""
NEAREST = Calibration(worst=90.0, decay=2.3, margin=0.25, unit=15.0)
"""Directions to the nearest component: angle in degrees."""
SKELETON = Calibration(worst=0.29, decay=4.5, margin=4.6, unit=0.15)
"""Skeletons: root of the share of wrong voxels."""
DESCRIPTORS = Calibration(worst=1.4, decay=4.5, margin=13.5, unit=0.5)
"""Shape descriptors at the default sigma: root mean square difference in deviations of each channel; a is 0."""
