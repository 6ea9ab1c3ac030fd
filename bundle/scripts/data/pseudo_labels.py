"""Pseudo-labels beside a person's labels: joined while they are read, never in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from volumen.data.formats.label_view import LabelView
from volumen.data.formats.volumes import Region, Volume
from volumen.data.layout import Layout, OpenCase
from volumen.data.pairing import Case
from volumen.data.validity import inside_mask, known_voxels


def pseudo_layout(folder: Path, layout: Layout) -> Layout:
    """Return the same images with the pseudo-labels of a folder in place of labels and masks.

    Args:
        folder: has `labels/<image>_<target>.zarr` and `masks/<image>_<target>.zarr`.
        layout: the images and targets.
    """
    cases = []
    for case in layout.cases:
        files = {target: f"{case.name}_{target}.zarr" for target in layout.targets}
        found = {target: name for target, name in files.items() if (folder / "masks" / name).exists()}
        labels, masks = (
            {target: str(folder / kind / name) for target, name in found.items()}
            for kind in ("labels", "masks")
        )
        cases.append(Case(case.name, case.image, labels, masks))
    return replace(layout, cases=tuple(cases), stated={})


def with_pseudo_labels(case: OpenCase, pseudo: OpenCase, ignore_labels: Mapping[str, int]) -> OpenCase:
    """Return a case whose labels are a person's where these are known, and pseudo-labels elsewhere inside their masks.

    Args:
        case: the image with a person's labels and masks.
        pseudo: the same image with pseudo-labels and their masks.
        ignore_labels: value of a person's label that means unknown, by target.
    """
    labels, masks = dict(case.labels), dict(case.masks)
    for target in pseudo.labels:
        joined = _Joined(
            case.labels.get(target),
            case.masks.get(target),
            ignore_labels.get(target),
            pseudo.labels[target],
            pseudo.masks[target],
        )
        labels[target], masks[target] = JoinedLabel(joined), JoinedMask(joined)
    return replace(case, labels=labels, masks=masks)


class _Joined:
    """A person's label with its mask, and a pseudo-label with its mask."""

    def __init__(
        self, label: Volume | None, mask: Volume | None, ignore: int | None, pseudo: Volume, trusted: Volume
    ) -> None:
        self.label, self.mask, self.ignore = label, mask, ignore
        self.pseudo, self.trusted = pseudo, trusted

    def known(self, region: Region) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the person's label (C, *region), if there is one, and where it is known, bool (*region)."""
        shape = tuple(part.stop - part.start for part in region)
        if self.label is None:
            return None, np.zeros(shape, bool)
        label = self.label.read(region)
        known = known_voxels(label, None if self.mask is None else self.mask.read(region), self.ignore)
        return label, np.ones(shape, bool) if known is None else known


class JoinedLabel(LabelView):
    """A view of a person's label where it is known, and of a pseudo-label elsewhere."""

    def __init__(self, joined: _Joined) -> None:
        super().__init__(joined.pseudo, joined.pseudo.channels)
        self._joined = joined
        own = joined.label
        self.dtype = np.dtype(
            joined.pseudo.dtype if own is None else np.result_type(own.dtype, joined.pseudo.dtype)
        )

    def read(self, region: Region) -> np.ndarray:
        """Return (1, *region)."""
        label, known = self._joined.known(region)
        pseudo = self._joined.pseudo.read(region).astype(self.dtype)
        return pseudo if label is None else np.where(known, label.astype(self.dtype), pseudo)


class JoinedMask(LabelView):
    """A view that is 1 where a person's label is known, or a pseudo-label inside its mask."""

    def __init__(self, joined: _Joined) -> None:
        super().__init__(joined.trusted, 1)
        self._joined = joined
        self.dtype = np.dtype(np.uint8)

    def read(self, region: Region) -> np.ndarray:
        """Return uint8 (1, *region)."""
        known = self._joined.known(region)[1]
        return np.asarray(known | inside_mask(self._joined.trusted.read(region)))[None].view(np.uint8)
