"""Pairs labels and masks with images by name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from volumen.data.formats.listing import Entry
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

_ALL = "mask"
"""Suffix of the name of a mask that is valid for every target."""


@dataclass(frozen=True)
class Case:
    """One image with the paths of its labels and masks, each keyed by target."""

    name: str
    image: str
    labels: dict[str, str]
    masks: dict[str, str]


def pair_cases(
    where: str,
    images: Sequence[Entry],
    labels: Sequence[Entry],
    masks: Sequence[Entry],
    *,
    targets: Sequence[str] | None = None,
    allow_unlabeled: bool = False,
    partial: bool = False,
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Pair images, labels and masks by name; return the cases and the sorted targets.

    A label has the name `<image>_<target>`. A mask has the name `<image>_<target>`, or `<image>` or `<image>_mask`
    if it is for all targets. If several images fit, those that leave a requested target take precedence, then the
    longest name.

    Args:
        where: place of the labels, named in errors.
        images: all images, names unique.
        labels: all labels.
        masks: all masks.
        targets: targets to use; by default all that have a label.
        allow_unlabeled: accept images that lack the label of some target.
        partial: other folders may hold what is missing, so nothing is refused for it; the targets are all found.

    Raises:
        VolumenError: a label is missing or occurs twice, or a name fits no image but is similar to one that does.
    """
    names = dict.fromkeys(image.name for image in images)
    paired = _pair_labels(labels, names, targets)
    found = sorted({target for paths in paired.values() for target in paths})
    if not partial:
        check_targets(where, found, targets)
    chosen = tuple(name for name in found if not targets or name in targets)
    mask_paths = _pair_masks(masks, names, found)
    cases = tuple(
        Case(
            image.name,
            image.path,
            {target: paired[image.name][target] for target in chosen if target in paired[image.name]},
            _spread(mask_paths[image.name], chosen),
        )
        for image in images
    )
    if partial:
        return cases, tuple(found)
    if not allow_unlabeled:
        check_complete(cases, chosen)
    return cases, chosen


def check_targets(where: str, found: Sequence[str], targets: Sequence[str] | None) -> None:
    """Refuse labels without those of a target to use.

    Args:
        where: place of the labels, named in errors.
        found: targets that have a label.
        targets: targets to use; None: all that have a label.

    Raises:
        VolumenError: no label at all, or none of a target to use.
    """
    if not found:
        raise VolumenError(where, expected="labels named <image>_<target>", found="none", remedy="add them")
    for target in targets or ():
        if target not in found:
            raise VolumenError(
                where,
                expected=f"a label of target {target!r}",
                found=f"labels of {', '.join(found)}",
                remedy=f"add <image>_{target}, or take the target out of the configuration",
            )


def split_label_name(
    name: str, images: Collection[str], targets: Sequence[str] | None = None
) -> tuple[str, str] | None:
    """Split the name of a label into image and target by the longest image name that fits.

    Args:
        name: name of the label.
        images: names of the images; use a set or dictionary if there are many.
        targets: an image that leaves one of these as target is preferred.

    Returns:
        Image and target; None if the name does not begin with an image's name and an underscore.
    """
    ends = [position for position, letter in enumerate(name[:-1]) if letter == "_"]
    fits = [name[:end] for end in ends if name[:end] in images]
    if targets is not None:
        fits = [image for image in fits if name[len(image) + 1 :] in targets] or fits
    if not fits:
        return None
    image = max(fits, key=len)
    return image, name[len(image) + 1 :]


def _pair_labels(
    entries: Sequence[Entry], images: Collection[str], targets: Sequence[str] | None
) -> dict[str, dict[str, str]]:
    paired: dict[str, dict[str, str]] = {image: {} for image in images}
    for entry in entries:
        if entry.name in paired and split_label_name(entry.name, images) is None:
            raise VolumenError(
                entry.path,
                "names no target: a label is called <image>_<target>",
                remedy=f"rename it {entry.name}_<target>",
            )
        owner = split_label_name(entry.name, images, targets)
        if owner is None:
            _report_orphan(entry, images)
        else:
            _add(paired[owner[0]], owner[1], entry)
    return paired


def _pair_masks(
    entries: Sequence[Entry], images: Collection[str], found: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Return each image's masks by target; the key "" is the mask for all targets."""
    paired: dict[str, dict[str, str]] = {image: {} for image in images}
    known = [*found, _ALL, *(f"{target}_{_ALL}" for target in found)]
    for entry in entries:
        owner = split_label_name(entry.name, images, known)
        if entry.name in paired and (owner is None or owner[1] not in known):
            _add(paired[entry.name], "", entry)
        elif owner is None:
            _report_orphan(entry, images)
        else:
            _add(paired[owner[0]], _masked_target(entry, owner[1], found), entry)
    return paired


def _masked_target(entry: Entry, said: str, found: Sequence[str]) -> str:
    for target in (said, said.removesuffix(f"_{_ALL}")):
        if target in found:
            return target
    if said == _ALL:
        return ""
    raise VolumenError(
        entry.path,
        expected=f"a mask of target {', '.join(found)}, or one for all called <image>_{_ALL}",
        found=f"target {said!r}",
        remedy="rename it",
    )


def _add(paths: dict[str, str], target: str, entry: Entry) -> None:
    if target in paths:
        raise VolumenError(entry.path, f"stands for the same as {paths[target]}", remedy="remove one of them")
    paths[target] = entry.path


def _report_orphan(entry: Entry, images: Collection[str]) -> None:
    folded = {image.casefold(): image for image in images}
    similar = split_label_name(entry.name.casefold(), folded)
    if similar is not None:
        image = folded[similar[0]]
        raise VolumenError(
            entry.path, f"differs from image {image!r} in upper and lower case", remedy="rename one of them"
        )
    logger.warning("%s belongs to no image and is left out", entry.path)


def _spread(paths: dict[str, str], targets: Sequence[str]) -> dict[str, str]:
    """Use the mask for all targets for each target that has no separate mask."""
    masks = {target: paths.get(target, paths.get("")) for target in targets}
    return {target: path for target, path in masks.items() if path is not None}


def check_complete(cases: Sequence[Case], targets: Sequence[str]) -> None:
    """Refuse a case that lacks the label of a target.

    Raises:
        VolumenError: naming the image and the label.
    """
    for case in cases:
        missing = [target for target in targets if target not in case.labels]
        if missing:
            raise VolumenError(
                case.image,
                expected=f"a label {case.name}_{missing[0]}",
                found=f"labels of {', '.join(case.labels) or 'no target'}",
                remedy="add it, or set dataset_config.allow_unlabeled_data: true",
            )
