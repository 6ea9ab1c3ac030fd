"""The images of a data folder with what is labelled in them, on the voxels of the stored images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Region, Volume
from volumen.data.joining import discover_any
from volumen.data.labels.label_channels import LabelRule, open_label
from volumen.data.layout import Layout, fit_label
from volumen.data.pairing import Case
from volumen.data.validity import known_voxels, labelled_voxels
from volumen.suggestion.subject import LabelForm

MARK = "volumen_accepted"
"""Attribute of the volumes that an acceptance wrote."""


@dataclass(frozen=True)
class Labelling:
    """What is labelled of a target in an image, by the same rule as in training.

    Args:
        label: the label on the image's grid; None: there is none, so nothing is labelled.
        mask: where it is valid; None: everywhere.
        ignore: label value that means unknown, or None.
        labelled_only: only voxels above 0 count as labelled (`compute_loss_on_labeled_only`).
        is_accepted: the mask was written by an acceptance, which says what a person has looked at: with
            `labelled_only`, too, 0 is then an answer inside it, and its boxes are not suggested again.
    """

    label: Volume | None
    mask: Volume | None = None
    ignore: int | None = None
    labelled_only: bool = False
    is_accepted: bool = False

    def read(self, region: Region) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the label (channels, *space), None if there is none, and where it is known: bool (*space)."""
        shape = tuple(part.stop - part.start for part in region)
        if self.label is None:
            return None, np.zeros(shape, bool)
        label = self.label.read(region)
        mask = None if self.mask is None else self.mask.read(region)
        known = known_voxels(label, mask, self.ignore)
        if self.labelled_only and not self.is_accepted:
            return label, labelled_voxels(label, known)
        return label, np.ones(shape, bool) if known is None else known

    def fingerprint(self) -> list[Any]:
        """Return what identifies the labelled part."""
        volumes = [None if volume is None else volume.fingerprint() for volume in (self.label, self.mask)]
        return [*volumes, self.ignore, self.labelled_only, self.is_accepted]


@dataclass(frozen=True)
class LabelledImage:
    """An image with the labelled part of each target.

    Args:
        files: paths of the image, its labels and masks.
        image: the image as stored.
        labels: by target.
    """

    files: Case
    image: Volume
    labels: Mapping[str, Labelling]

    @property
    def name(self) -> str:
        """Name of the image."""
        return self.files.name


@dataclass(frozen=True)
class HowOpened:
    """How images and labels are opened.

    Args:
        axes: `dataset_config.axes`.
        level: `dataset_config.ome_zarr_resolution`.
        labelled_only: `tr_setup.compute_loss_on_labeled_only`.
    """

    axes: str | None = None
    level: int = 0
    labelled_only: bool = False

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> HowOpened:
        """Return how a training opened its data, from its snapshot."""
        dataset, setup = config.get("dataset_config") or {}, config.get("tr_setup") or {}
        return cls(
            dataset.get("axes"),
            int(dataset.get("ome_zarr_resolution") or 0),
            bool(setup.get("compute_loss_on_labeled_only")),
        )


def find_images(data: str) -> Layout:
    """Return the images of a data folder, labelled or not.

    Raises:
        VolumenError: no images, or names that do not fit.
    """
    return discover_any(data, allow_unlabeled=True, partial=True)


def open_images(layout: Layout, forms: Sequence[LabelForm], how: HowOpened) -> list[LabelledImage]:
    """Open the images of a data folder with the labels of some targets.

    Labels are read on the grid of the stored image, whatever `target_spacing` or the orientation of other images is.

    Raises:
        VolumenError: a volume cannot be opened, or a label does not fit its image.
    """
    return [_open(case, forms, how) for case in layout.cases]


def is_accepted(path: str) -> bool:
    """Whether an acceptance wrote a label or a mask, so that a later one may change it."""
    import zarr

    if not (Path(path) / "zarr.json").is_file():
        return False
    return MARK in zarr.open(str(path), mode="r").attrs


def _open(case: Case, forms: Sequence[LabelForm], how: HowOpened) -> LabelledImage:
    image = open_volume(case.image, axes=how.axes, level=how.level)
    labels = {}
    for form in forms:
        paths = case.labels.get(form.name), case.masks.get(form.name)
        label, mask = (
            None if path is None else _fitted(path, image, rule, how, mask=rule is None)
            for path, rule in zip(paths, (form.rule, None), strict=True)
        )
        accepted = paths[1] is not None and is_accepted(paths[1])
        labels[form.name] = Labelling(label, mask, form.ignore, how.labelled_only, accepted)
    return LabelledImage(case, image, labels)


def _fitted(path: str, image: Volume, rule: LabelRule | None, how: HowOpened, *, mask: bool) -> Volume:
    opened = open_label(path, axes=how.axes, level=how.level, ndim=len(image.shape), rule=rule)
    return fit_label(image, opened, mask=mask)
