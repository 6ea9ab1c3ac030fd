"""What an evaluation finds of where and why predictions are wrong: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from volumen.metrics.geometry.suspects import Suspect
from volumen.metrics.geometry.tally import GeometryTally
from volumen.utils import distributed


@dataclass(frozen=True)
class Listed:
    """A suspect with what it is of.

    Args:
        case, target, label: image, target and class; the class is "" where there is one only.
        suspect: the suspect, in voxels of the prediction.
        number: its number in the case's volume of suspects.
        place: a voxel of it, the one nearest to the centre of its box.
        low, high: the box in voxels of the label's volume, in its own axes.
        physical_low, physical_high: the box in space, in `unit`.
        size: volume (of an image: area) in `unit`.
        unit: short name of the unit of length, "voxels" where none is known.
    """

    case: str
    target: str
    label: str
    suspect: Suspect
    number: int
    place: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    physical_low: tuple[float, ...]
    physical_high: tuple[float, ...]
    size: float
    unit: str


@dataclass
class Diagnosis:
    """Errors by the geometry around them, and labels that may be wrong.

    Args:
        finest: smallest voxel side of all cases.
        folder: where volumes of suspects are written.
        tallies: target to class to counts of errors.
        suspects: labels that may be wrong.
        units: target to the short name of the unit of length.
    """

    finest: float
    folder: Path
    tallies: dict[str, dict[str, GeometryTally]] = field(default_factory=dict)
    suspects: list[Listed] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)

    def tally(self, target: str, label: str) -> GeometryTally:
        """Return the counts of a class, empty ones at first."""
        return self.tallies.setdefault(target, {}).setdefault(label, GeometryTally(self.finest))

    def gather(self) -> None:
        """Put together what all processes have found."""
        if not distributed.is_distributed():
            return
        states = distributed.gather((self.tallies, self.suspects, self.units))
        self.tallies, self.suspects, self.units = {}, [], {}
        for tallies, suspects, units in states:
            self.units |= units
            self.suspects += suspects
            for target, classes in tallies.items():
                for label, tally in classes.items():
                    self.tally(target, label).merge(tally)
