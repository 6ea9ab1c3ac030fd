"""The data sets of `ranking.py`, and the errors in them that a person counts and corrects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cc3d
import numpy as np

from volumen.data.layout import OpenCase, discover, open_cases
from volumen.data.validity import inside_mask
from volumen.inference.postprocess.graph.sources import Source
from volumen.inference.postprocess.graph.volume import instances_of
from volumen.inference.rules import InstanceRules
from volumen.metrics.objects.contingency import overlaps
from volumen.metrics.objects.errors import object_errors
from volumen.metrics.objects.partition import voi_merge, voi_split
from volumen.phantom.geometry import Roll, sheet_geometry
from volumen.phantom.volume import scan, write_ome_zarr
from volumen.utils.boxes import Box, whole_box

TRAIN, VALID, HELD_OUT = "train", "valid", "heldout"
DUST, FLAT_DUST = 100, 20
"""True objects of fewer voxels in a region are specks of the labelling, or cut by its border: they do not count."""
COUNTED = ("broken", "merged", "missed", "added", "errors", "corrections", "voi")
"""Errors of a part. `errors` is the sum of the first four; `corrections` counts the cuts and joins that set everything
right: a true object in three pieces needs two joins, a predicted one of three true ones two cuts, each missed or added
object one action. `voi` is the sum of both halves of the variation of information, in bits."""
PHANTOM_SHAPES = {TRAIN: (96, 160, 160), VALID: (96, 144, 144), HELD_OUT: (96, 144, 144)}
PHANTOM_NOISE = 0.10

Settings = Mapping[str, float]
Boxes = Mapping[str, Sequence[Box]]


@dataclass(frozen=True)
class Piece:
    """One region of a part, in memory.

    Args:
        image: (C, *space), as stored.
        label: integer (*space), 0 for background.
        known: bool (*space).
        objects: integer (*space), true objects where they are no components of the label.
        sure: bool (*space), where these are known.
    """

    image: np.ndarray
    label: np.ndarray
    known: np.ndarray
    objects: np.ndarray | None = None
    sure: np.ndarray | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set in three parts that share no voxel.

    Args:
        folder: with images/ and labels/.
        target: the labelled target.
        parts: part to the boxes of each image.
        patch: voxels per axis of a training patch.
        batch: patches per step.
        window: side of the windows in which objects are counted; None: the whole image. A sheet or a tree of vessels is
            one object as a whole, but several in a small window.
        objects: folder with the instance numbers of the objects that the target encloses; "" for none.
        grid: settings of a prediction that are tried, by name.
        dust: true objects of fewer voxels in a region do not count; predicted ones are removed, as a person who sees
            thousands of specks first does.
    """

    folder: str
    target: str
    parts: Mapping[str, Boxes]
    patch: tuple[int, ...]
    batch: int
    window: int | None
    objects: str
    grid: Mapping[str, Sequence[float]]
    dust: int = DUST

    def pieces(self, part: str) -> Iterator[Piece]:
        """Yield the regions of a part."""
        cases = {case.name: case for case in open_cases(discover(self.folder))}
        numbered = {case.name: case for case in open_cases(discover(self.objects))} if self.objects else {}
        for name, boxes in self.parts[part].items():
            for box in boxes:
                yield _piece(cases[name], numbered.get(name), self.target, box)

    def settings(self) -> list[dict[str, float]]:
        """Return all combinations of the grid; the first one is what a prediction does, without specks."""
        default = {"threshold": 0.5, "merge_threshold": 0.5, "min_size": self.dust}
        default = {name: default[name] for name in self.grid}
        tried = [dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]
        return [default, *(entry for entry in tried if entry != default)]

    def count(
        self, probabilities: Sequence[np.ndarray], pieces: Sequence[Piece], settings: Settings
    ) -> dict[str, float]:
        """Return the errors of a part, see `COUNTED`.

        Args:
            probabilities: (K, *space) of each piece.
            pieces: the part.
            settings: of the prediction.
        """
        tables = []
        for found, piece in zip(probabilities, pieces, strict=True):
            tables += list(self._tables(found, piece, settings))
        return counted_errors(tables)

    def _tables(self, found: np.ndarray, piece: Piece, settings: Settings) -> Iterator[np.ndarray]:
        if piece.objects is not None:
            yield overlaps(enclosed(self.target, found, settings), piece.objects, piece.sure)
            return
        for predicted, true in zip(classes_of(found, settings["threshold"]), classes_of_label(piece, found)):
            for window in windows(true.shape, self.window):
                known = piece.known[window].copy()
                pair = [components(mask[window] & known) for mask in (predicted, true)]
                known &= (pair[1] == 0) | (without_small(pair[1], self.dust) > 0)
                yield overlaps(without_small(pair[0], int(settings["min_size"])), pair[1], known)


def _piece(case: OpenCase, numbered: OpenCase | None, target: str, box: Box) -> Piece:
    region = tuple(slice(start, stop) for start, stop in box)
    label = case.labels[target].read(region)[0]
    known = (
        inside_mask(case.masks[target].read(region)) if target in case.masks else np.ones(label.shape, bool)
    )
    image = case.image.read(region)
    if numbered is None:
        return Piece(image, label, known)
    (numbers,) = (volume.read(region)[0] for volume in numbered.labels.values())
    # A neuron that the part's border cuts into several pieces is several objects there.
    objects = cc3d.connected_components(numbers, connectivity=26)
    return Piece(image, label, known, objects, np.bincount(objects.ravel())[objects] >= DUST)


def enclosed(target: str, found: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the instances that walls enclose, as `volumen predict --instances` makes them."""
    rules = InstanceRules(
        boundary=target, threshold=settings["threshold"], merge_threshold=settings["merge_threshold"]
    )
    made = instances_of({target: found}, Source(rules, (1.0,) * (found.ndim - 1)))
    return without_small(made, int(settings.get("min_size", 0)))


def classes_of(found: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Return the mask of each class but the background."""
    if len(found) == 1:
        return [found[0] >= threshold]
    index = found.argmax(axis=0)
    return [index == number for number in range(1, len(found))]


def classes_of_label(piece: Piece, found: np.ndarray) -> list[np.ndarray]:
    """Return the true mask of each class but the background."""
    if len(found) == 1:
        return [piece.label != 0]
    return [piece.label == number for number in range(1, len(found))]


def components(mask: np.ndarray) -> np.ndarray:
    """Return the numbered components of a mask, connected by corners."""
    return cc3d.connected_components(mask, connectivity=26 if mask.ndim == 3 else 8)


def without_small(objects: np.ndarray, size: int) -> np.ndarray:
    """Return objects without those of fewer voxels."""
    return np.where(np.bincount(objects.ravel())[objects] >= size, objects, 0) if size else objects


def windows(shape: Sequence[int], side: int | None) -> Iterator[tuple[slice, ...]]:
    """Yield windows of a side that together cover a volume; those at its end may be smaller."""
    if side is None:
        yield tuple(slice(0, n) for n in shape)
        return
    for place in itertools.product(*(range(0, n, side) for n in shape)):
        yield tuple(slice(start, min(start + side, n)) for start, n in zip(place, shape, strict=True))


def counted_errors(tables: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the errors of several regions together, see `COUNTED`.

    Args:
        tables: overlaps of the objects of each region, as of `overlaps`.
    """
    sums = dict.fromkeys(COUNTED, 0.0)
    information = []
    for table in tables:
        found = object_errors(table)
        for kind in ("broken", "merged", "missed", "added"):
            sums[kind] += len(getattr(found, kind))
        several = itertools.chain(found.broken, found.merged)
        sums["corrections"] += sum(len(error.parts) - 1 for error in several)
        sums["corrections"] += len(found.missed) + len(found.added)
        if found.true:
            information.append(voi_split(table) + voi_merge(table))
    sums["errors"] = sum(sums[kind] for kind in ("broken", "merged", "missed", "added"))
    sums["voi"] = float(np.mean(information)) if information else math.nan
    return sums


WALLS = {"threshold": (0.3, 0.5), "merge_threshold": (0.2, 0.35, 0.5, 0.65)}
LABELS = {"threshold": tuple(round(0.1 * step, 1) for step in range(1, 10)), "min_size": (0, 20, DUST)}


def fib25(folder: str, objects: str) -> DataSet:
    """Return membranes that enclose neurons: slabs of one volume.

    Args:
        folder: data set with the membrane.
        objects: data set with the numbers of the neurons in the same image.
    """
    (case,) = open_cases(discover(folder))
    z, y, x = case.image.shape
    ends = {TRAIN: (0, 120), VALID: (120, 185), HELD_OUT: (185, y)}
    parts = {part: {case.name: [((0, z), span, (0, x))]} for part, span in ends.items()}
    return DataSet(folder, "membrane", parts, (32, 32, 32), 1, None, objects, WALLS)


def vnc(folder: str) -> DataSet:
    """Return membranes in 13 thick sections: strips of one volume."""
    (case,) = open_cases(discover(folder))
    z, y, x = case.image.shape
    ends = {TRAIN: (0, y // 2), VALID: (y // 2, 3 * y // 4), HELD_OUT: (3 * y // 4, y)}
    parts = {part: {case.name: [((0, z), span, (0, x))]} for part, span in ends.items()}
    return DataSet(folder, "membrane", parts, (8, 96, 96), 1, 64, "", LABELS)


def phantom(folder: Path) -> DataSet:
    """Return rolled sheets, one roll for each part; written where the folder does not have them."""
    parts = {}
    for number, (part, shape) in enumerate(PHANTOM_SHAPES.items()):
        if not (folder / "labels" / f"{part}_surface.zarr").exists():
            geometry = sheet_geometry(Roll.draw(shape, number), shape)
            image = scan(geometry.distance, geometry.along, number, PHANTOM_NOISE)
            write_ome_zarr(folder / "images" / f"{part}.zarr", image)
            # Outside the last turn, where a sheet ends, are specks of a few voxels.
            label = (without_small(components(geometry.distance <= 0), DUST) > 0).astype(np.uint8)
            write_ome_zarr(folder / "labels" / f"{part}_surface.zarr", label)
        parts[part] = {part: [whole_box(shape)]}
    return DataSet(str(folder), "surface", parts, (32, 32, 32), 1, 24, "", LABELS)


def drive(folder: str) -> DataSet:
    """Return vessels of retina photographs: eight images train, five validate."""
    return DataSet(folder, "vessel", _whole_images(folder, 8, 5), (160, 160), 2, 48, "", LABELS, FLAT_DUST)


def hippocampus(folder: str) -> DataSet:
    """Return two parts of an organ in small volumes: thirty images train, twenty validate."""
    grid = {"threshold": (0.5,), "min_size": (0, 20, DUST)}
    return DataSet(
        folder, "hippocampus", _whole_images(folder, 30, 20), (32, 48, 32), 2, None, "", grid, dust=0
    )


def _whole_images(folder: str, train: int, valid: int) -> dict[str, Boxes]:
    cases = sorted(open_cases(discover(folder)), key=lambda case: case.name)
    ends = {TRAIN: (0, train), VALID: (train, train + valid), HELD_OUT: (train + valid, len(cases))}
    return {
        part: {case.name: [whole_box(case.image.shape)] for case in cases[start:stop]}
        for part, (start, stop) in ends.items()
    }


SETS: dict[str, Callable[..., DataSet]] = {
    "fib25": fib25, "phantom": phantom, "drive": drive, "hippocampus": hippocampus, "vnc": vnc,
}  # fmt: skip
