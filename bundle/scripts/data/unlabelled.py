"""Where volumes have neither a label nor an empty image: a view that is read like a label."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import digest, fingerprint_of
from volumen.data.formats.label_view import LabelView
from volumen.data.formats.volumes import Region
from volumen.data.layout import OpenCase
from volumen.data.validity import known_voxels, labelled_voxels

UNLABELLED = "unlabelled"
"""Name of the view among the labels of a case."""
BLOCK = 8
"""Voxels per axis of a block that is empty or not as a whole; the grid of blocks starts at the volume's origin."""


class UnlabelledVolume(LabelView):
    """A view of an image that is 1 where some target's label is unknown and the image is not empty, else 0.

    A label is unknown where its mask is 0, where it has the ignore value, and everywhere if there is none; with
    `labelled_only` also where it is 0. A block of `BLOCK` voxels per axis is empty if the standard deviation of its
    intensities is at most `min_contrast` times that of the volume, in every channel.

    Args:
        case: the image with its labels and masks.
        targets: names of the targets.
        ignore_labels: label value that means unknown, by target.
        labelled_only: voxels with the label 0 count as unknown (`compute_loss_on_labeled_only`).
        min_contrast: share of the volume's standard deviation, at least 0.
        deviation: returns the standard deviation of an image per channel, (C,); called once, at the first read.
    """

    def __init__(
        self,
        case: OpenCase,
        targets: tuple[str, ...],
        *,
        ignore_labels: Mapping[str, int] | None = None,
        labelled_only: bool = False,
        min_contrast: float = 0.1,
        deviation: Callable[[Any], np.ndarray],
    ) -> None:
        super().__init__(case.image, 1)
        self.case, self.targets = case, targets
        self.ignore_labels = dict(ignore_labels or {})
        self.labelled_only, self.min_contrast = labelled_only, min_contrast
        self.dtype = np.dtype(np.uint8)
        self._deviation = deviation
        self._limits: np.ndarray | None = None
        self._lock = threading.Lock()

    def fingerprint(self) -> str:
        """Return a hash of all that determines the values."""
        volumes = [self.case.image, *(v for t in self.targets for v in self._volumes(t) if v is not None)]
        rules = (
            sorted(self.ignore_labels.items()),
            self.labelled_only,
            self.min_contrast,
            BLOCK,
            self.targets,
        )
        return digest([*(fingerprint_of(volume) for volume in volumes), *rules, sorted(self.case.masks)])

    def read(self, region: Region) -> np.ndarray:
        """Return uint8 (1, *region)."""
        unknown = self._unknown(region)
        if unknown.any():
            unknown &= self._filled(region)
        return unknown[None].view(np.uint8)

    def _volumes(self, target: str) -> tuple[Any, Any]:
        return self.case.labels.get(target), self.case.masks.get(target)

    def _unknown(self, region: Region) -> np.ndarray:
        """Return where some target's label is unknown: bool (*region)."""
        shape = tuple(part.stop - part.start for part in region)
        unknown = np.zeros(shape, bool)
        for target in self.targets:
            label, mask = self._volumes(target)
            if label is None:
                return np.ones(shape, bool)
            ignore = self.ignore_labels.get(target)
            values = label.read(region) if self.labelled_only or ignore is not None else None
            known = known_voxels(values, None if mask is None else mask.read(region), ignore)
            if self.labelled_only:
                assert values is not None
                known = labelled_voxels(values, known)
            if known is not None:
                unknown |= ~known
        return unknown

    def _filled(self, region: Region) -> np.ndarray:
        """Return the blocks that are not empty: bool (*region)."""
        starts = [part.start // BLOCK * BLOCK for part in region]
        stops = [min(-(-part.stop // BLOCK) * BLOCK, n) for part, n in zip(region, self.case.image.shape)]
        image = np.asarray(self.case.image.read(tuple(map(slice, starts, stops))))
        limit = self._limit().reshape(-1, *(1,) * len(starts))
        filled: np.ndarray = np.asarray((block_deviations(image) > limit).any(axis=0))
        for axis in range(filled.ndim):
            filled = filled.repeat(BLOCK, axis)
        return filled[tuple(slice(p.start - a, p.stop - a) for p, a in zip(region, starts))]

    def _limit(self) -> np.ndarray:
        with self._lock:
            if self._limits is None:
                self._limits = self.min_contrast * np.asarray(self._deviation(self.case.image), np.float64)
        return self._limits


def block_deviations(image: np.ndarray) -> np.ndarray:
    """Return the standard deviation of every block of an image.

    Values that are not finite count as 0; an incomplete block at the end is completed with its last voxels.

    Args:
        image: (C, *space).

    Returns:
        float32 (C, *ceil(space / BLOCK)).
    """
    space = image.shape[1:]
    values = image.astype(np.float32)
    if image.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    values -= values.mean(dtype=np.float64)
    padded = np.pad(values, [(0, 0), *((0, -size % BLOCK) for size in space)], mode="edge")
    shape = [len(image)]
    for size in padded.shape[1:]:
        shape += [size // BLOCK, BLOCK]
    blocks, inner = padded.reshape(shape), tuple(range(2, 2 * len(space) + 1, 2))
    mean = blocks.mean(axis=inner)
    return np.sqrt(np.maximum(np.square(blocks).mean(axis=inner) - mean**2, 0.0))


def unlabelled_case(case: OpenCase, view: UnlabelledVolume) -> OpenCase:
    """Return a case whose only label is the view, so that it is searched for patches like a labelled one."""
    return replace(case, labels={UNLABELLED: view}, masks={})


def has_no_label(case: OpenCase, targets: tuple[str, ...]) -> bool:
    """Whether a case has no label of any target."""
    return not any(target in case.labels for target in targets)
