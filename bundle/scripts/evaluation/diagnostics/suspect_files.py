"""Volumes in which suspects are numbered, and their places as points, for viewers."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
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
NAME = "suspects.csv"
"""The list of all suspects of a report."""
MARK = "volumen_suspects"
"""Attribute of the volumes of suspects; a folder without it is not removed."""


class SuspectVolume:
    """The suspects of a class of a case as an OME-Zarr 0.5 label map of the label's shape, and as points.

    Only blocks with a suspect take room. The points are a CSV as napari reads it, in voxels of the label's volume.

    Args:
        case: what was scored.
        label: the class, "" where there is one only.
        folder: where `<target>/[<class>/]<case>.zarr` and `.csv` are written.
        spacing: voxel size.
    """

    def __init__(self, case: ScoredCase, label: str, folder: Path, spacing: Sequence[float]) -> None:
        import zarr

        self._case = case
        self._path = folder / case.target / label / f"{case.name}.zarr"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(self._path, mode="w-", zarr_format=3)
        group.attrs["ome"] = {"version": "0.5", "multiscales": [_multiscale(case, spacing)]}
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


def suspect_volumes(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the volumes of suspects in a folder, with their groups, in the order of their names."""
    import zarr

    for path in sorted(folder.rglob("*.zarr")):
        try:
            group: Any = zarr.open_group(path, mode="r")
        except (OSError, ValueError, KeyError):
            continue
        if MARK in group.attrs:
            yield path, group


def remove_earlier(folder: Path) -> None:
    """Remove the volumes of suspects, and their points, that an earlier evaluation wrote into a folder.

    Raises:
        VolumenError: the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise VolumenError(folder, expected="a folder", found="a file", remedy="give another -o")
    for path, _ in list(suspect_volumes(folder)):
        shutil.rmtree(path)
        path.with_suffix(".csv").unlink(missing_ok=True)


def _multiscale(case: ScoredCase, spacing: Sequence[float]) -> dict[str, Any]:
    """Return the metadata of one level, placed as the label is."""
    unit = unit_name(case.stated_unit)
    axes = [
        {"name": axis, "type": "space", **({"unit": unit} if unit else {})} for axis in "zyx"[-len(spacing) :]
    ]
    steps: list[dict[str, Any]] = [{"type": "scale", "scale": [float(side) for side in spacing]}]
    origin = case.label.geometry.origin
    if origin is not None and case.label.geometry.frame == "grid":
        steps.append({"type": "translation", "translation": [float(value) for value in origin]})
    level = {"path": "0", "coordinateTransformations": steps}
    return {"name": case.name, "axes": axes, "datasets": [level]}
