"""Pictures of where a case is wrong: planes of the image, painted with what was found, missed, broken and joined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from volumen.evaluation.case_scores import MaskReader, instances_at
from volumen.evaluation.cases import Details, ScoredCase
from volumen.evaluation.html.pictures.planes import SHOWN_FLAT, Plane, planes_through
from volumen.evaluation.html.pictures.worst_place import worst_place
from volumen.evaluation.html.report_drawing import COLOURS, PARTS, ColourBar, outline, png, ramp_colours
from volumen.evaluation.place_tables import betti_errors
from volumen.inference.windows.heads import PROBABILITIES
from volumen.metrics.objects.numbering import ObjectNumbers
from volumen.metrics.units import metric_unit
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

CLOSE = 192
"""Pictures of single errors show at most so many voxels of the smallest side,"""
MARGIN = 3
"""those of windows so many times the window's side if that is more."""
MOST_ANGLE = 90.0
"""Angular error in degrees at the upper end of the colour bar."""
_PAINT = 0.7
"""How much of the image the paint hides."""
_RIGHT = (150, 160, 170)
"""Objects that are right, or whose errors are not listed."""

Numbering = Callable[[tuple[slice, ...]], tuple[np.ndarray, np.ndarray]]
"""Gives the predicted and the true object at every voxel of a box of the prediction, in its own axes."""


@dataclass(frozen=True)
class View:
    """Planes through one place of a case.

    Args:
        title: what is wrong there.
        where: the place, in voxels of the label's volume and as lengths.
        legend: which colours it has: "overlap", "objects" or "value".
        planes: what each shows, see `_drawn`.
        bar: what the colours mean, of values.
    """

    title: str
    where: str
    legend: str
    planes: list[dict[str, Any]]
    bar: ColourBar | None = None


def family(case: ScoredCase) -> str:
    """Return how a case is drawn: "label", "instances" or "value"."""
    return "label" if case.kind in PROBABILITIES else "instances" if case.kind == "instances" else "value"


def views_of(
    case: ScoredCase,
    threshold: float,
    details: Mapping[str, Details],
    numbers: Mapping[str, ObjectNumbers],
) -> list[View]:
    """Return the pictures of a case: its most wrong place, then its worst errors of topology and of objects.

    Args:
        case: what to show.
        threshold: probability from which on a voxel is foreground.
        details: class to what stands behind its scores; {} where nothing was measured.
        numbers: class to the numbers of its objects; {} of instances, which have their own.
    """
    case = _with_readable_image(case)
    kind = family(case)
    views = []
    if kind != "instances":
        views.append(_most_wrong(case, threshold))
    label = _worst_class(details)
    if label is None:
        return views or [_most_wrong(case, threshold)]
    of_class = f", class {label}" if label else ""
    for size, windows in list(details[label].get("windows", {}).items())[:1]:
        if windows and windows[0]["place"] is not None:
            views.append(_window_view(case, threshold, windows[0], size, of_class))
    rows = details[label]["objects"]
    for row in _worst_objects(rows):
        numbering = _numbering(case, threshold, label, numbers)
        if numbering is not None:
            views.append(_object_view(case, row, rows, numbering, of_class))
    return views or [_most_wrong(case, threshold)]


def _worst_class(details: Mapping[str, Details]) -> str | None:
    """Return the class with the most voxels of wrong objects, None without details."""
    return max(
        details, key=lambda label: sum(row["wrong"] for row in details[label]["objects"]), default=None
    )


def _worst_objects(rows: Sequence[Details]) -> list[Details]:
    """Return the worst merged and the worst broken object, else the worst missed and added one."""
    first: dict[str, Details] = {}
    for row in rows:
        if row["place"] is not None:
            first.setdefault(row["error"], row)
    chosen = [first[error] for error in ("merged", "broken") if error in first]
    return chosen or [first[error] for error in ("missed", "added") if error in first]


def _most_wrong(case: ScoredCase, threshold: float) -> View:
    """Return the planes through the place where errors lie densest."""
    errors = partial(_errors, threshold=threshold)
    place = worst_place(case, errors)
    planes = planes_through(place, case.prediction.shape, _start(case), case.scale_of_voxels)
    if family(case) == "value":
        return _value_view(case, place, planes)
    title = "Errors lie densest here"
    if family(case) == "instances":
        return View(title, _where(case, place), "objects", _drawn(case, planes, [None] * len(planes)))
    paints = [_overlap(case, plane.box, threshold) for plane in planes]
    return View(title, _where(case, place), "overlap", _drawn(case, planes, paints))


def _errors(case: ScoredCase, box: tuple[slice, ...], threshold: float) -> np.ndarray:
    """Return the error of every voxel of a box, at least 0; 0 where nothing is known."""
    values, truth, known = case.read(box)
    if case.kind == "instances":
        wrong = edges(values[0]) != edges(truth[0])
        return (wrong & known & (truth[0] > 0)).astype(np.float64)
    if case.kind in PROBABILITIES:
        return ((classes(values, case, threshold) != true_classes(truth, case)) & known).astype(np.float64)
    return np.asarray(_voxel_errors(values, truth, case) * known, np.float64)


def edges(labels: np.ndarray) -> np.ndarray:
    """Return where a voxel differs from the next one along the last two axes."""
    found = np.zeros(labels.shape, bool)
    for axis in (-1, -2):
        moved, out = np.moveaxis(labels, axis, 0), np.moveaxis(found, axis, 0)
        out[:-1] |= moved[1:] != moved[:-1]
    return found


def classes(values: np.ndarray, case: ScoredCase, threshold: float) -> np.ndarray:
    """Return the predicted class of every voxel, 0 for background; 1 for all of several labels that may overlap."""
    if case.kind == "multiclass":
        return np.asarray(values[0] if len(values) == 1 else values.argmax(axis=0))
    return np.asarray((values >= threshold if case.scale else values > 0).any(axis=0)).astype(np.uint8)


def true_classes(truth: np.ndarray, case: ScoredCase) -> np.ndarray:
    """Return the true class of every voxel, as `classes` returns the predicted one."""
    return np.asarray(truth[0] if case.kind == "multiclass" else (truth > 0).any(axis=0).astype(np.uint8))


def _voxel_errors(values: np.ndarray, truth: np.ndarray, case: ScoredCase) -> np.ndarray:
    """Return the error of every voxel: an angle in degrees, or the mean absolute error over channels."""
    from volumen.metrics.regression import angles

    truth = np.where(np.isfinite(truth), truth, 0)
    if case.kind in ("vector", "axis"):
        size = len(case.prediction.shape)
        parts = [slice(i, i + size) for i in range(0, len(values), size)]
        return np.mean([angles(values[p], truth[p], signed=case.kind == "vector") for p in parts], axis=0)
    return np.abs(values.astype(np.float32) - truth).mean(axis=0)


def _start(case: ScoredCase) -> list[int]:
    return [part.start for part in case.region]


def _where(case: ScoredCase, place: Sequence[int]) -> str:
    """Return a voxel of the prediction as a place in the label's volume, in voxels and lengths."""
    there = [at + start for at, start in zip(place, _start(case), strict=True)]
    scale = case.scale_of_voxels
    names = ", ".join("zyx"[-len(there) :])
    words = f"voxel ({', '.join(map(str, there))}) of ({names})"
    if scale.spacing:
        words += f", at ({', '.join(scale.lengths(there)[-len(there) :])}) {scale.unit} from the first voxel"
    return words


def _inside(case: ScoredCase, voxel: Sequence[int]) -> tuple[int, ...]:
    """Return a place of the label's volume as a voxel of the prediction."""
    return tuple(int(at) - start for at, start in zip(voxel, _start(case), strict=True))


def _overlap(case: ScoredCase, box: tuple[slice, ...], threshold: float) -> np.ndarray:
    """Return the paint of found, missed and falsely predicted voxels of a box, uint8 (*box, 4)."""
    values, truth, known = case.read(box)
    found, wanted = classes(values, case, threshold), true_classes(truth, case)
    both = (found > 0) & (wanted > 0)
    paint = np.zeros((*found.shape, 4), np.uint8)
    for name, where in (
        ("both", both & (found == wanted)),
        ("class", both & (found != wanted)),
        ("missed", (found == 0) & (wanted > 0)),
        ("false", (found > 0) & (wanted == 0)),
    ):
        _brush(paint, where & known, COLOURS[name])
    paint[~known] = (0, 0, 0, 150)
    return paint


def _brush(
    paint: np.ndarray, where: np.ndarray, colour: tuple[int, int, int], opacity: float = _PAINT
) -> None:
    paint[where] = (*colour, round(255 * opacity))


def _window_view(case: ScoredCase, threshold: float, row: Details, size: str, of_class: str) -> View:
    """Return the planes through the most wrong voxel of a window with errors of topology, which has a frame."""
    place = _inside(case, row["place"])
    box = [slice(a, b) for a, b in zip(_inside(case, row["low"]), _inside(case, row["high"]), strict=True)]
    shown = min(max(MARGIN * int(size), CLOSE), SHOWN_FLAT)
    planes = planes_through(place, case.prediction.shape, _start(case), case.scale_of_voxels, shown)
    drawn = _drawn(case, planes, [_overlap(case, plane.box, threshold) for plane in planes])
    for plane, found in zip(planes, drawn, strict=True):
        part = plane.inside(box)
        if part is not None:
            found["frame"] = [part[1].start, part[0].start, part[1].stop, part[0].stop]
    title = f"Window of {size} voxels with the largest error of topology{of_class}: {betti_words(row)}"
    return View(title, _where(case, place), "overlap", drawn)


def betti_words(window: Details) -> str:
    """Return the errors of topology of a window in words."""
    words = []
    for error, one, many in zip(
        betti_errors(window),
        ("component", "tunnel", "cavity"),
        ("components", "tunnels", "cavities"),
        strict=True,
    ):
        if error:
            words.append(
                f"{abs(error)} {one if abs(error) == 1 else many} too {'many' if error > 0 else 'few'}"
            )
    return ", ".join(words) or "none"


def object_words(row: Details) -> str:
    """Return a wrong object in words."""
    count = len(row["parts"])
    what = {
        "merged": f"Merged: one predicted object of {count} true ones",
        "broken": f"Broken: one true object in {count} parts",
        "missed": "Missed: a true object",
        "added": "Added: a predicted object that is none",
    }[row["error"]]
    return f"{what}, {row['wrong']:,} wrong voxels of {row['voxels']:,}"


def _numbering(
    case: ScoredCase, threshold: float, label: str, numbers: Mapping[str, ObjectNumbers]
) -> Numbering | None:
    """Return what gives the objects of a box of the prediction."""
    axes = len(case.region)
    if case.kind == "instances":
        return partial(_in_own_axes, partial(instances_at, case), axes)
    if label not in numbers:
        return None
    masks = partial(MaskReader.of(case, threshold).of_class, label)
    return partial(_in_own_axes, partial(numbers[label].read, masks=masks), axes)


def _in_own_axes(
    read: Callable[[tuple[slice, ...]], tuple[np.ndarray, np.ndarray]], axes: int, box: tuple[slice, ...]
) -> tuple[np.ndarray, np.ndarray]:
    pred, truth = read((slice(0, 1),) * (3 - axes) + box)
    shape = pred.shape[3 - axes :]
    return pred.reshape(shape), truth.reshape(shape)


def _object_view(
    case: ScoredCase, row: Details, rows: Sequence[Details], numbering: Numbering, of_class: str
) -> View:
    """Return the map of splits and merges through the place of a wrong object."""
    place = _inside(case, row["place"])
    planes = planes_through(place, case.prediction.shape, _start(case), case.scale_of_voxels, CLOSE)
    maps = [_map(numbering(plane.box), rows) for plane in planes]
    drawn = _drawn(case, planes, [paint for paint, _ in maps])
    for plane, found, (_, merged) in zip(planes, drawn, maps, strict=True):
        found["outline"] = outline(merged.reshape(plane.shape))
    return View(object_words(row) + of_class, _where(case, place), "objects", drawn)


def _map(objects: tuple[np.ndarray, np.ndarray], rows: Sequence[Details]) -> tuple[np.ndarray, np.ndarray]:
    """Return the paint of splits and merges, uint8 (*box, 4), and where merged objects are, bool (*box).

    Args:
        objects: predicted and true objects of a box.
        rows: wrong objects, see `Details`.
    """
    pred, truth = objects
    paint = np.zeros((*pred.shape, 4), np.uint8)
    _brush(paint, (pred != 0) & (truth != 0), _RIGHT, 0.45)
    merged = np.zeros(pred.shape, bool)
    listed = {error: [row for row in rows if row["error"] == error] for error in _ERRORS}
    for row in listed["added"]:
        _brush(paint, pred == row["number"], COLOURS["false"])
    for row in listed["missed"]:
        _brush(paint, truth == row["number"], COLOURS["missed"])
    # True objects within a merged one; broken ones show their parts, whatever these are merged with.
    for error, own, other, gap in (("merged", pred, truth, "false"), ("broken", truth, pred, "missed")):
        for row in listed[error]:
            here = own == row["number"]
            if not here.any():
                continue
            _brush(paint, here & (other == 0), COLOURS[gap])
            for place, part in enumerate(row["parts"]):
                _brush(paint, here & (other == part), PARTS[place % len(PARTS)])
            if error == "merged":
                merged |= here
    return paint, merged


_ERRORS = ("merged", "broken", "missed", "added")


def _value_view(case: ScoredCase, place: Sequence[int], planes: Sequence[Plane]) -> View:
    """Return the planes of a regression's error, the lighter the larger."""
    found = []
    for plane in planes:
        values, truth, known = case.read(plane.box)
        found.append((_voxel_errors(values, truth, case) * known, known))
    most = MOST_ANGLE
    if case.kind not in ("vector", "axis"):
        most = max(float(np.percentile(np.concatenate([error.ravel() for error, _ in found]), 99)), 1e-6)
    paints = []
    for error, known in found:
        colours = ramp_colours(error / most) * known[..., None]
        opacity = np.full((*error.shape, 1), 255, np.float32)
        paints.append(np.concatenate([colours, opacity], axis=-1).round().astype(np.uint8))
    bar = ColourBar(
        "0", f"{most:.3g}{'' if case.kind in ('vector', 'axis') else ' or more'}", _error_words(case)
    )
    return View("Errors are largest here", _where(case, place), "value", _drawn(case, planes, paints), bar)


def _error_words(case: ScoredCase) -> str:
    if case.kind in ("vector", "axis"):
        return "angular error, degrees"
    unit = metric_unit("mae", case.kind)
    return "absolute error" + (f", {unit}" if unit else "")


def _drawn(
    case: ScoredCase, planes: Sequence[Plane], paints: Sequence[np.ndarray | None]
) -> list[dict[str, Any]]:
    """Return what the page shows of planes: the image as PNG, the paint over it as PNG, and the plane itself."""
    drawn = []
    for plane, grey, paint in zip(planes, _backgrounds(case, planes), paints, strict=True):
        drawn.append(
            {
                "plane": plane,
                "rows": plane.shape[0],
                "columns": plane.shape[1],
                "image": png(grey),
                "paint": "" if paint is None else png(paint.reshape(*plane.shape, 4)),
                "outline": "",
                "frame": None,
            }
        )
    return drawn


def _backgrounds(case: ScoredCase, planes: Sequence[Plane]) -> list[np.ndarray]:
    """Return the image in the planes, uint8, with the same grey values in all; where it is gone, the label."""
    found = _of_image(case, planes)
    if found is None:
        return [_of_label(case, plane) for plane in planes]
    low, high = np.percentile(np.concatenate([values.ravel() for values in found]), [1, 99])
    width = max(high - low, 1e-6)
    return [((values - low) / width * 255).clip(0, 255).astype(np.uint8) for values in found]


def _with_readable_image(case: ScoredCase) -> ScoredCase:
    """Return the case without its image where that is gone or is no longer the one that was predicted."""
    from volumen.data.formats.opening import open_volume

    if case.image is None:
        return case
    try:
        shape = open_volume(case.image, ndim=len(case.region)).shape
        if tuple(shape) == tuple(case.label.shape):
            return case
        reason = f"shape {tuple(shape)}, not {tuple(case.label.shape)}"
    except (VolumenError, OSError) as error:
        reason = str(error)
    logger.warning("%s: no image in the report (%s)", case.image, reason)
    return replace(case, image=None)


def _of_image(case: ScoredCase, planes: Sequence[Plane]) -> list[np.ndarray] | None:
    """Return the image's values in the planes, the mean over its channels; None without an image."""
    from volumen.data.formats.opening import open_volume

    if case.image is None:
        return None
    volume = open_volume(case.image, ndim=len(case.region))
    found = []
    for plane in planes:
        there = tuple(
            slice(b.start + r.start, b.stop + r.start) for b, r in zip(plane.box, case.region, strict=True)
        )
        values = volume.read(there).astype(np.float32).mean(axis=0).reshape(plane.shape)
        found.append(np.nan_to_num(values))
    return found


def _of_label(case: ScoredCase, plane: Plane) -> np.ndarray:
    _, truth, _ = case.read(plane.box)
    # Edges between touching instances stay visible.
    inner = (np.nan_to_num(truth) != 0).any(axis=0).reshape(plane.shape)
    return np.where(inner, 190, 110).astype(np.uint8)
