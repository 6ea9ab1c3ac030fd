"""Volumes in which suspects are numbered, and their places as points, for viewers."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.space.units import unit_name
from volumen.metrics.grid import Region
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

if TYPE_CHECKING:
    from volumen.evaluation.cases import ScoredCase
    from volumen.evaluation.diagnosis import Listed

CHUNK = {2: 1024, 3: 128}
MARK = "volumen_suspects"
"""Attribute of the volumes of suspects; a folder without it is not overwritten."""


class SuspectVolume:
    """The suspects of a class of a case as an OME-Zarr 0.5 label map of the label's shape, and as points.

    Only blocks with a suspect take room. The points are a CSV as napari reads it, in voxels of the label's volume.

    Args:
        case: what was scored.
        label: the class, "" where there is one only.
        folder: where `<case>_<target>[_<class>].zarr` and `.csv` are written.
        spacing: voxel size.
    """

    def __init__(self, case: ScoredCase, label: str, folder: Path, spacing: Sequence[float]) -> None:
        import zarr

        self._case = case
        name = "_".join(part.replace("/", "_") for part in (case.name, case.target, label) if part)
        self._path = folder / f"{name}.zarr"
        _remove_earlier(self._path)
        folder.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(self._path, mode="w-", zarr_format=3)
        group.attrs["ome"] = {"version": "0.5", "multiscales": [_multiscale(case, name, spacing)]}
        group.attrs[MARK] = {"case": case.name, "target": case.target, "class": label}
        shape = case.label.shape
        chunks = tuple(min(CHUNK[len(shape)], n) for n in shape)
        self._array: Any = group.create_array("0", shape=shape, chunks=chunks, dtype="uint16", fill_value=0)

    def add(self, box: Region, ranks: np.ndarray) -> None:
        """Add the numbers of suspects in a block.

        Args:
            box: the block, in voxels of the prediction, three axes.
            ranks: uint16 (Z, Y, X), 0 outside any.
        """
        if not ranks.any():
            return
        axes = len(self._case.region)
        there = self._case.place_of(box[3 - axes :])
        own = ranks.reshape([part.stop - part.start for part in there])
        self._array[there] = np.where(own > 0, own, self._array[there])

    def write_points(self, rows: Sequence[Listed]) -> None:
        """Write a point in each suspect, which napari reads."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        axes = [f"axis-{axis}" for axis in range(len(self._case.region))]
        table.writerow(["index", *axes, "number", "kind", "reason", "score", "voxels"])
        for index, row in enumerate(rows):
            found = row.suspect
            values = (row.number, found.kind, found.reason, f"{found.score:.4f}", found.voxels)
            table.writerow([index, *row.place, *values])
        write_atomically(self._path.with_suffix(".csv"), text.getvalue().encode())


def _remove_earlier(path: Path) -> None:
    """Remove a volume of suspects that an earlier evaluation wrote.

    Raises:
        VolumenError: something else lies there.
    """
    import zarr

    if not path.exists():
        return
    try:
        ours = MARK in zarr.open_group(path, mode="r").attrs
    except (OSError, ValueError, KeyError):
        ours = False
    if not ours:
        raise VolumenError(path, expected="nothing, or suspects of an earlier evaluation", found="something else",
                           remedy="give another -o")  # fmt: skip
    shutil.rmtree(path)


def _multiscale(case: ScoredCase, name: str, spacing: Sequence[float]) -> dict[str, Any]:
    """Return the metadata of one level, placed as the label is."""
    unit = unit_name(case.label.unit or case.prediction.unit)
    axes = [
        {"name": axis, "type": "space", **({"unit": unit} if unit else {})} for axis in "zyx"[-len(spacing) :]
    ]
    steps: list[dict[str, Any]] = [{"type": "scale", "scale": [float(side) for side in spacing]}]
    origin = case.label.geometry.origin
    if origin is not None and case.label.geometry.frame == "grid":
        steps.append({"type": "translation", "translation": [float(value) for value in origin]})
    level = {"path": "0", "coordinateTransformations": steps}
    return {"name": name, "axes": axes, "datasets": [level]}
