"""The folder of a suggested box: the image around it, its uncertainty, and a label to paint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from volumen.data.formats.volumes import Region, Volume
from volumen.suggestion.crops import write_volume
from volumen.suggestion.labelled import LabelledImage
from volumen.suggestion.record import BOXES, DONE, IMAGE, UNCERTAINTY, SuggestedBox
from volumen.suggestion.subject import FULL, Subject
from volumen.suggestion.table import UNIT, entropies
from volumen.utils.boxes import Box

HALO_SHARE = 0.5
"""Context around a box on each side, as a share of the box."""


def write_box(
    folder: Path,
    box: SuggestedBox,
    volume: LabelledImage,
    predicted: Mapping[str, Volume],
    subjects: Sequence[Subject],
) -> None:
    """Write `boxes/<folder>`: `image.zarr` and `uncertainty.zarr` with context, `<target>.zarr` of the box itself.

    A label to paint holds the earlier label where that is known, and the prediction elsewhere. A folder that an
    interrupted call left is written again, as nobody has painted it: the record names it only at the end.

    Args:
        folder: of the suggestions.
        box: the box.
        volume: its image and labels.
        predicted: probabilities by target as stored.
        subjects: the targets.
    """
    place = folder / BOXES / box.folder
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    image = volume.image
    around = with_halo(box.box, image.shape)
    start = [part.start for part in around]
    write_volume(place / f"{IMAGE}.zarr", image.read(around), image.geometry, start)
    mean = np.mean(
        [entropies(predicted[subject.name].read(around), subject)[0] for subject in subjects], axis=0
    )
    uncertainty = np.rint(np.clip(mean / UNIT, 0, 1) * FULL).astype(np.uint8)[None]
    write_volume(place / f"{UNCERTAINTY}.zarr", uncertainty, image.geometry, start)
    inside = tuple(slice(*side) for side in box.box)
    for subject in subjects:
        label = subject.decide(predicted[subject.name].read(inside))
        earlier, known = volume.labels[subject.name].read(inside)
        if earlier is not None:
            label = np.where(known, earlier, label).astype(np.result_type(earlier.dtype, label.dtype))
        # The names of the files of a box are those of its targets, so they must not be taken otherwise.
        write_volume(
            place / f"{label_name(subject.name)}.zarr", label, image.geometry, [p.start for p in inside]
        )


def label_name(target: str) -> str:
    """Return the file name, without suffix, of the label of a target in the folder of a box."""
    return f"{target}_label" if target in (IMAGE, UNCERTAINTY, DONE) else target


def with_halo(box: Box, shape: Sequence[int]) -> Region:
    """Return a box with its context, inside the volume."""
    halos = [round(HALO_SHARE * (stop - start)) for start, stop in box]
    return tuple(
        slice(max(0, start - halo), min(n, stop + halo))
        for (start, stop), halo, n in zip(box, halos, shape, strict=True)
    )
