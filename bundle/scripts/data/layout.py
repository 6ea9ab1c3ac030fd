"""The folders that a user brings: which label and which mask belong to which image.

data/
  images/  image1.zarr            one file per image
  labels/  image1_ink.zarr        one file per image and target
  masks/   image1_ink.zarr        optional: where the target's label is to be believed
           image1_mask.zarr       (or image1.zarr) the same for every target of the image
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath

import numpy as np

from scripts.data.formats import SUFFIXES
from scripts.data.listing import Entry, child, folder_exists, list_volumes, names_in
from scripts.data.volumes import Volume, open_volume
from scripts.errors import VolumenError

logger = logging.getLogger(__name__)

FORMATS = (*SUFFIXES, "napari")
ALL_TARGETS = ""
"""Key of a mask that holds for every target, while names are being paired."""


@dataclass(frozen=True)
class Case:
    """One image with the paths of its labels and masks, each keyed by target."""

    name: str
    image: str
    labels: dict[str, str]
    masks: dict[str, str]


@dataclass(frozen=True)
class Layout:
    """All cases of a data folder; `targets` is the sorted union over cases."""

    root: str
    format: str
    cases: tuple[Case, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class OpenCase:
    """A case whose volumes are open (lazily) and have been checked against each other.

    `spacing` has one value per spatial axis, (Z, Y, X) or (Y, X); 1 where nothing is known.
    """

    name: str
    image: Volume
    labels: dict[str, Volume]
    masks: dict[str, Volume]
    spacing: tuple[float, ...]


def discover(
    root: str | PathLike,
    *,
    format: str | None = None,
    targets: Sequence[str] | None = None,
    allow_unlabeled: bool = False,
) -> Layout:
    """Find images, labels and masks below a folder and pair them by name.

    A label `<image>_<target>` belongs to the image with the longest name that fits, so both parts may contain
    underscores. Names are compared case-sensitively, after Unicode normalisation (NFC).

    Args:
        root: folder (or URL) with `images/`, `labels/` and, optionally, `masks/`.
        format: "zarr", "tif", "nifti" or "napari"; by default what `images/` holds.
        targets: targets to use; by default all that have a label.
        allow_unlabeled: accept images that lack the label of some target.

    Raises:
        VolumenError: a folder, an image or a label is missing, or names do not fit.
    """
    root = fspath(root)
    if format is not None and format not in FORMATS:
        raise VolumenError("--format", expected=f"one of {', '.join(FORMATS)}", found=repr(format))
    images, labels, masks = _entries(root, format)
    cases, chosen = match(child(root, "labels"), images, labels, masks, targets, allow_unlabeled)
    return Layout(root, format or images[0].format, cases, chosen)


def match(
    where: str,
    images: Sequence[Entry],
    labels: Sequence[Entry],
    masks: Sequence[Entry],
    targets: Sequence[str] | None,
    allow_unlabeled: bool,
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Pair images, labels and masks by name; return the cases and the targets, see `discover`.

    Args:
        where: what holds the labels, named in errors.
    """
    names = [image.name for image in images]
    by_image = _pair(labels, names, targets, "label")
    found = sorted({target for paths in by_image.values() for target in paths})
    chosen = _choose_targets(where, found, targets)
    mask_paths = _pair_masks(masks, names, found, chosen)
    cases = tuple(
        Case(
            image.name,
            image.path,
            {target: path for target, path in sorted(by_image[image.name].items()) if target in chosen},
            mask_paths[image.name],
        )
        for image in images
    )
    _check_complete(cases, chosen, allow_unlabeled)
    return cases, chosen


def open_cases(
    layout: Layout,
    *,
    axes: str | None = None,
    level: int = 0,
    spacing: Sequence[float] | None = None,
) -> list[OpenCase]:
    """Open every volume of a layout and check that they fit each other.

    Args:
        layout: what `discover` found.
        axes: `dataset_config.axes`, see `open_volume`.
        level: `dataset_config.ome_zarr_resolution`.
        spacing: voxel size per spatial axis, instead of the files' own.

    Raises:
        VolumenError: a volume cannot be opened, or shapes, channels or types do not fit.
    """
    cases = [_open_case(case, axes, level, spacing) for case in layout.cases]
    check_same_kind(cases)
    return cases


def check_same_kind(cases: Sequence[OpenCase]) -> None:
    """Refuse cases that differ in dimensions or channels."""
    first = cases[0]
    for case in cases[1:]:
        if len(case.image.shape) != len(first.image.shape) or case.image.channels != first.image.channels:
            raise VolumenError(
                case.image.path,
                expected=f"{_describe(first.image)}, as in {first.image.path}",
                found=_describe(case.image),
                remedy="train on images of one kind",
            )


def _describe(volume: Volume) -> str:
    return f"{len(volume.shape)}D with {volume.channels} channel{'s' * (volume.channels != 1)}"


def _open_case(case: Case, axes: str | None, level: int, spacing: Sequence[float] | None) -> OpenCase:
    image = open_volume(case.image, axes=axes, level=level)
    ndim = len(image.shape)
    labels: dict[str, Volume] = {}
    masks: dict[str, Volume] = {}
    for opened, paths in ((labels, case.labels), (masks, case.masks)):
        for target, path in paths.items():
            label = open_volume(path, axes=axes, level=level, ndim=ndim)
            opened[target] = as_integers(check_shape(image, label))
    return OpenCase(case.name, image, labels, masks, _spacing(image, labels, spacing))


def check_shape(image: Volume, label: Volume) -> Volume:
    """Return the label if it lies on the image's grid."""
    if label.shape != image.shape:
        raise VolumenError(
            label.path,
            expected=f"shape {image.shape} of {image.path}",
            found=f"{label.shape}",
            remedy="resample it to the image's grid",
        )
    return label


def as_integers(volume: Volume) -> Volume:
    """Return the volume itself if it holds integers, else a view that casts floats and refuses fractions."""
    from scripts.data.integral import IntegralVolume

    return volume if np.dtype(volume.dtype).kind in "ui" else IntegralVolume(volume)


def _spacing(image: Volume, labels: dict[str, Volume], spacing: Sequence[float] | None) -> tuple[float, ...]:
    ndim = len(image.shape)
    if spacing is None:
        own = [volume.spacing for volume in (image, *labels.values()) if volume.spacing is not None]
        return own[0] if own else (1.0,) * ndim
    if len(spacing) != ndim or not all(value > 0 for value in spacing):
        raise VolumenError(
            "dataset_config.spacing", expected=f"{ndim} positive values", found=str(list(spacing))
        )
    return tuple(float(value) for value in spacing)


def _entries(root: str, format: str | None) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """List images, labels and masks of one format."""
    images_folder = child(root, "images")
    if not folder_exists(images_folder):
        if format == "napari" and folder_exists(root):
            return _split_layers(root)
        raise VolumenError(root, "has no images/ folder", remedy=_hint(root))
    wanted = "tif" if format == "napari" else format
    listed = [
        list_volumes(folder) if folder_exists(folder) else []
        for folder in (images_folder, child(root, "labels"), child(root, "masks"))
    ]
    images = [entry for entry in listed[0] if wanted in (None, entry.format)]
    if not images:
        _refuse_empty(images_folder, wanted)
    kinds = sorted({entry.format for entry in images})
    if len(kinds) > 1:
        raise VolumenError(
            images_folder,
            expected="one format",
            found=" and ".join(kinds),
            remedy=f"pass --format {kinds[0]}",
        )
    _refuse_twins(images)
    labels, masks = (
        [entry for entry in entries if wanted in (None, entry.format)] for entries in (listed[1], listed[2])
    )
    return images, labels + _group_labels(images), masks


def _group_labels(images: list[Entry]) -> list[Entry]:
    """List the labels in the images' own `labels/` groups (OME-Zarr), named like those of a folder."""
    from scripts.data.ome_zarr import label_names
    from scripts.data.zarr_volume import open_attributes

    entries = []
    for image in images:
        if image.format != "zarr" or not folder_exists(child(image.path, "labels")):
            continue
        group = child(image.path, "labels")
        for name in label_names(open_attributes(group) or {}):
            entries.append(Entry(f"{image.name}_{name}", "zarr", child(group, name)))
    return entries


def _split_layers(root: str) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Tell images, labels and masks apart in a folder of layers that napari saved: by their names alone."""
    entries = [entry for entry in list_volumes(root) if entry.format == "tif"]
    if not entries:
        _refuse_empty(root, "tif")
    names = [entry.name for entry in entries]
    images = [entry for entry in entries if _owner(entry.name, names) is None]
    rest = [entry for entry in entries if entry not in images]
    masks = [entry for entry in rest if entry.name.endswith("_mask")]
    return images, [entry for entry in rest if entry not in masks], masks


def _hint(root: str) -> str:
    if not folder_exists(root):
        return "there is no such folder: check the path"
    names = names_in(root)
    below = [name for name in names if folder_exists(child(root, name, "images"))]
    if below:
        return f"did you mean {child(root, below[0])}?"
    if root.rstrip("/").rsplit("/", 1)[-1] in ("images", "labels", "masks"):
        return f"give the folder above it, {root.rstrip('/').rsplit('/', 1)[0]}"
    return "put the images into images/ and their labels into labels/, named <image>_<target>"


def _refuse_empty(folder: str, wanted: str | None) -> None:
    names = [name for name in names_in(folder) if not name.startswith(".")]
    kinds = [wanted] if wanted else list(SUFFIXES)
    endings = ", ".join(ending for kind in kinds for ending in SUFFIXES[kind])
    found = f"only {', '.join(names[:3])}{', ...' * (len(names) > 3)}" if names else "an empty folder"
    raise VolumenError(folder, expected=f"images ({endings})", found=found, remedy="add or convert images")


def _refuse_twins(images: Iterable[Entry]) -> None:
    seen: dict[str, str] = {}
    for entry in images:
        if entry.name in seen:
            raise VolumenError(
                entry.path,
                f"has the name {entry.name!r} that {seen[entry.name]} has too",
                remedy="rename one",
            )
        seen[entry.name] = entry.path


def _owner(name: str, images: Iterable[str], targets: Sequence[str] | None = None) -> tuple[str, str] | None:
    """Split a label's name into image and target: the longest image name that fits."""
    fits = [image for image in images if name.startswith(image + "_") and len(name) > len(image) + 1]
    if targets is not None:
        fits = [image for image in fits if name[len(image) + 1 :] in targets] or fits
    if not fits:
        return None
    image = max(fits, key=len)
    return image, name[len(image) + 1 :]


def _pair(
    entries: Sequence[Entry], images: list[str], targets: Sequence[str] | None, what: str
) -> dict[str, dict[str, str]]:
    paired: dict[str, dict[str, str]] = {image: {} for image in images}
    for entry in entries:
        owner = _owner(entry.name, images, targets)
        if owner is None:
            _report_orphan(entry, images, what)
            continue
        image, target = owner
        if target in paired[image]:
            if entry.path.startswith(paired[image][target].rsplit("/", 1)[0]):
                raise VolumenError(
                    entry.path, f"is a second {what} like {paired[image][target]}", remedy="remove one"
                )
            logger.info("%s is used instead of %s", paired[image][target], entry.path)
            continue
        paired[image][target] = entry.path
    return paired


def _report_orphan(entry: Entry, images: list[str], what: str) -> None:
    name = entry.name
    if name in images:
        raise VolumenError(
            entry.path,
            f"names no target: a {what} is called <image>_<target>",
            remedy=f"rename it {name}_<target>",
        )
    similar = _owner(name.casefold(), [image.casefold() for image in images])
    if similar is not None:
        image = next(image for image in images if image.casefold() == similar[0])
        raise VolumenError(
            entry.path, f"differs from image {image!r} in upper and lower case", remedy="rename one of them"
        )
    logger.warning("%s belongs to no image and is left out", entry.path)


def _choose_targets(labels: str, found: list[str], targets: Sequence[str] | None) -> tuple[str, ...]:
    if not found:
        raise VolumenError(
            labels, "holds no label", expected="labels named <image>_<target>", remedy="add them"
        )
    for target in targets or ():
        if target not in found:
            raise VolumenError(
                labels,
                expected=f"a label of target {target!r}",
                found=f"labels of {', '.join(found)}",
                remedy=f"add <image>_{target}, or take the target out of the configuration",
            )
    return tuple(sorted(targets or found))


def _pair_masks(
    entries: Sequence[Entry], images: list[str], found: Sequence[str], chosen: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """Give each image's masks by target; one for all targets yields to one of a single target."""
    paired: dict[str, dict[str, str]] = {image: {} for image in images}
    for entry in entries:
        if entry.name in images:
            paired[entry.name][ALL_TARGETS] = entry.path
            continue
        known = [*found, "mask", *(f"{target}_mask" for target in found)]
        owner = _owner(entry.name, images, known)
        if owner is None:
            _report_orphan(entry, images, "mask")
            continue
        image, target = owner
        if target not in found and target.removesuffix("_mask") in found:
            target = target.removesuffix("_mask")
        if target not in found and target != "mask":
            raise VolumenError(
                entry.path,
                expected=f"the name of an image and of a target ({', '.join(found)}), or <image>_mask",
                found=f"target {target!r}",
                remedy="rename it",
            )
        paired[image][target if target in found else ALL_TARGETS] = entry.path
    return {image: _spread(paths, chosen) for image, paths in paired.items()}


def _spread(paths: dict[str, str], chosen: tuple[str, ...]) -> dict[str, str]:
    general = paths.get(ALL_TARGETS)
    masks = {target: paths.get(target, general) for target in chosen}
    return {target: path for target, path in masks.items() if path is not None}


def _check_complete(cases: Sequence[Case], targets: Sequence[str], allow_unlabeled: bool) -> None:
    if allow_unlabeled:
        return
    for case in cases:
        missing = [target for target in targets if target not in case.labels]
        if missing:
            raise VolumenError(
                case.image,
                expected=f"a label {case.name}_{missing[0]}",
                found=f"labels of {', '.join(case.labels) or 'no target'}",
                remedy="add it, or set dataset_config.allow_unlabeled_data: true",
            )
