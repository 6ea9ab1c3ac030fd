"""Takes painted boxes back as labels with masks, without changing any file that the user made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from volumen.data.formats.listing import list_volumes
from volumen.data.formats.volumes import Volume
from volumen.data.labels.label_channels import open_label
from volumen.data.layout import Layout
from volumen.data.space.geometry import Geometry
from volumen.suggestion.crops import crop_geometry
from volumen.suggestion.labelled import HowOpened, LabelledImage, Labelling, find_images, open_images
from volumen.suggestion.record import BOXES, DONE, RECORD, SuggestedBox, Suggestions, read_record
from volumen.suggestion.request import AcceptRequest
from volumen.suggestion.store import Painted, new_data, write_in_place
from volumen.suggestion.subject import LabelForm
from volumen.suggestion.to_paint import label_name
from volumen.utils.boxes import box_extent, box_text
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass
class AcceptReport:
    """What was taken back.

    Args:
        data: the data folder with the labels.
        boxes: ranks of the boxes.
        new: newly labelled voxels by target.
        kept: by target, voxels whose earlier label differs from the painted one and stays.
        replaced: by target, voxels whose earlier label was replaced.
    """

    data: str
    boxes: tuple[int, ...]
    new: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the report in words."""
        several = f"{len(self.boxes)} box{'es' * (len(self.boxes) != 1)}"
        lines = [
            f"{self.data}: {counted(voxels, 'voxel')} of {target} newly labelled, from {several}"
            for target, voxels in self.new.items()
        ]
        lines += [
            f"{target}: {counted(voxels, 'earlier label')} replaced"
            for target, voxels in self.replaced.items()
            if voxels
        ]
        return [*lines, f"volumen train --finetune MODEL.pth -i {self.data} starts from them"]


def accept(request: AcceptRequest) -> AcceptReport:
    """Take painted boxes back as labels with masks.

    All boxes are checked before anything is written. A voxel that the box leaves at the ignore value stays unknown.
    An earlier label stays where it is known, unless the request says otherwise.

    Args:
        request: which boxes, and where their labels go.

    Raises:
        VolumenError: no box is painted, a label does not fit its box, the data are others, or files of the user would
            have to be changed.
    """
    folder = Path(request.suggestions)
    found = read_record(folder)
    boxes = _painted_boxes(folder, found, request.boxes)
    forms = _forms(folder, found)
    layout = find_images(request.input)
    how = HowOpened(**found.how)
    images = _images(layout, forms, how, found, boxes)
    report = AcceptReport(request.output or request.input, tuple(box.rank for box in boxes))
    painted: dict[tuple[str, str], list[Painted]] = {}
    for box in boxes:
        for form in forms:
            label = _read(folder / BOXES / box.folder, box, form, found)
            labelling = images[box.volume].labels[form.name]
            one = _merged(label, box, form, labelling, request, report)
            painted.setdefault((box.volume, form.name), []).append(one)
    for target, voxels in report.kept.items():
        if voxels:
            logger.warning(
                "%s: %s differ from what is painted, and stay; --overwrite-labels takes what is painted",
                target, counted(voxels, "earlier label"),
            )  # fmt: skip
    if request.output is None:
        write_in_place(Path(request.input), images, painted)
    else:
        if layout.stated:
            logger.warning(
                "%s: the classes and the ignore label of the description of %s are not part of it: give them in"
                " dataset_config.targets", request.output, layout.root,
            )  # fmt: skip
        new_data(Path(request.output), layout, images, painted)
    return report


def _painted_boxes(folder: Path, found: Suggestions, ranks: Sequence[int] | None) -> list[SuggestedBox]:
    """Return the boxes to take.

    Raises:
        VolumenError: none is marked as done, or a rank is no box.
    """
    by_rank = {box.rank: box for box in found.boxes}
    if ranks is not None:
        unknown = [rank for rank in ranks if rank not in by_rank]
        if unknown:
            raise VolumenError("--boxes", expected=f"ranks 1 to {len(by_rank)}", found=unknown[0])
        return [by_rank[rank] for rank in dict.fromkeys(ranks)]
    done = [box for box in found.boxes if (folder / BOXES / box.folder / DONE).exists()]
    if not done:
        raise VolumenError(
            folder / BOXES,
            expected=f"boxes that are marked as painted, by a file named {DONE} in their folder",
            found="none",
            remedy="mark them, or name their ranks with --boxes",
        )
    return done


def _forms(folder: Path, found: Suggestions) -> list[LabelForm]:
    """Return how the label of each target is painted, as the record says it.

    Raises:
        VolumenError: the record does not say it.
    """
    names = [item.name for item in fields(LabelForm)]
    try:
        return [
            LabelForm(**{**{name: entry[name] for name in names}, "values": tuple(entry["values"])})
            for entry in found.targets.values()
        ]
    except (KeyError, TypeError) as error:
        raise VolumenError(
            folder / RECORD, f"does not say how labels are painted ({error})", remedy="restore the file"
        ) from None


def _images(
    layout: Layout,
    forms: Sequence[LabelForm],
    how: HowOpened,
    found: Suggestions,
    boxes: Sequence[SuggestedBox],
) -> dict[str, LabelledImage]:
    """Open the images of the boxes and check that they are those of the suggestions.

    Raises:
        VolumenError: an image is missing, or has another shape or place.
    """
    cases = {case.name: case for case in layout.cases}
    images = {}
    for name in dict.fromkeys(box.volume for box in boxes):
        if name not in cases:
            raise VolumenError(
                layout.root, expected=f"the image {name} of the suggestions", found="no such image",
                remedy="give the data folder that the suggestions are of",
            )  # fmt: skip
        (image,) = open_images(Layout(layout.root, layout.format, (cases[name],), layout.targets), forms, how)
        expected = tuple(found.shapes[name])
        geometry = Geometry.from_plain(found.geometry[name])
        if image.image.shape != expected:
            raise VolumenError(
                image.image.source, expected=f"shape {expected}, as when the boxes were suggested",
                found=f"{image.image.shape}", remedy="give the data folder that the suggestions are of",
            )  # fmt: skip
        if image.image.geometry.plain() != geometry.plain():
            logger.warning(
                "%s: voxels of %s, but %s or another place when the boxes were suggested",
                image.image.source, image.image.geometry.text(), geometry.text(),
            )  # fmt: skip
        images[name] = image
    return images


def _read(folder: Path, box: SuggestedBox, form: LabelForm, found: Suggestions) -> np.ndarray:
    """Read the painted label of a box, (channels, *box).

    Raises:
        VolumenError: it is missing or twice there, or differs in shape, place or values.
    """
    volume = _open(folder, form, len(box.box))
    extent = box_extent(box.box)
    if volume.shape != extent or volume.channels != form.channels:
        raise VolumenError(
            volume.source,
            expected=f"shape {extent} of the box, {counted(form.channels, 'channel')}",
            found=f"{volume.shape}, {counted(volume.channels, 'channel')}",
            remedy="paint the label that volumen suggest wrote, without cropping it",
        )
    start = [first for first, _ in box.box]
    expected = crop_geometry(Geometry.from_plain(found.geometry[box.volume]), start)
    own = volume.geometry
    # Files of other programs may state no place, and its own scale of 1.
    stated = own.is_placed and own.frame == expected.frame and any(own.origin or ())
    if stated and not expected.covers(own):
        raise VolumenError(
            volume.source,
            expected=f"the place of the box {box_text(box.box)}, {_place(expected)}",
            found=_place(own),
            remedy="save the label under the name and place that it had",
        )
    label = volume.read(tuple(slice(0, n) for n in volume.shape))
    foreign = ~np.isin(label, form.values)
    if foreign.any():
        shown = ", ".join(map(str, np.unique(label[foreign])[:_SHOWN]))
        raise VolumenError(
            volume.source,
            expected=f"the values {', '.join(map(str, form.values))} of {form.name}",
            found=shown,
            remedy="paint these values only",
        )
    return label


def _open(folder: Path, form: LabelForm, ndim: int) -> Volume:
    if not folder.is_dir():
        raise VolumenError(
            folder, "the folder of a suggested box is missing", remedy="leave this box out with --boxes"
        )
    name = label_name(form.name)
    fitting = [entry.path for entry in list_volumes(str(folder)) if entry.name == name]
    if len(fitting) != 1:
        raise VolumenError(
            folder,
            expected=f"one painted label, {name}.zarr or another volume of this name",
            found=" and ".join(Path(path).name for path in fitting) or "none",
            remedy="keep the one that is painted" if fitting else "leave this box out with --boxes",
        )
    return open_label(fitting[0], ndim=ndim, rule=form.rule)


def _place(geometry: Geometry) -> str:
    return f"from {', '.join(f'{value:g}' for value in geometry.origin or ())}, voxels of {geometry.text()}"


def _merged(
    label: np.ndarray,
    box: SuggestedBox,
    form: LabelForm,
    labelling: Labelling,
    request: AcceptRequest,
    report: AcceptReport,
) -> Painted:
    """Return what a box writes: its label, and where; count what is new, kept and replaced."""
    region = tuple(slice(*side) for side in box.box)
    earlier, known = labelling.read(region)
    painted = np.ones(label.shape[1:], bool)
    if form.ignore is not None:
        painted = ~(label == form.ignore).any(axis=0)
    differs = np.zeros(known.shape, bool) if earlier is None else (earlier != label).any(axis=0)
    conflict = known & painted & differs
    written = painted & ~known
    counts = report.kept
    if request.overwrite_labels:
        written |= conflict
        counts = report.replaced
    name = form.name
    counts[name] = counts.get(name, 0) + int(conflict.sum())
    report.new[name] = report.new.get(name, 0) + int((painted & ~known).sum())
    return Painted(region, label, written)
