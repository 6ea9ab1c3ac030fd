"""The unit of a metric's values, which people need beside every error."""

from __future__ import annotations

from collections.abc import Sequence

from volumen.metrics.score_names import LENGTH, score_of

SHORT = {
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "angstrom": "Å",
}


def short_unit(unit: str | None) -> str:
    """Return a unit of length as it is written behind a number; "voxels" where none is known."""
    return SHORT.get(unit or "", unit or "voxels")


def length_unit(unit: str | None, spacing: Sequence[float] | None) -> str | None:
    """Return the unit of surface distances; None where they count voxels.

    Args:
        unit: that of the voxel size, such as "micrometer"; None if it is not known.
        spacing: voxel size; None if it is not known.
    """
    if spacing is None or (unit is None and set(spacing) == {1.0}):
        return None
    return unit or "units of the spacing"


def metric_unit(metric: str, kind: str, length: str = "voxels") -> str:
    """Return the unit of a metric, "" for shares and for values of an unknown meaning.

    Args:
        metric: its name without target and class, such as "hd95".
        kind: the target's kind: binary, distance, vector and so on.
        length: unit of surface distances.
    """
    if metric == "mae":
        # Distances are learned in units of the smallest voxel side.
        return "voxels" if kind == "distance" else ""
    score = score_of(metric)
    unit = score.unit if score else ""
    return length if unit == LENGTH else unit
