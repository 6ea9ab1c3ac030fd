"""The user's data folder, and the volumes in it.

data/
  images/  image1.zarr            one volume per image
  labels/  image1_ink.zarr        one volume per image and target
  masks/   image1_ink.zarr        optional: where the target's label is valid
           image1_mask.zarr       (or image1.zarr) the same for all targets of the image
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from os import PathLike, fspath
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from volumen.data.formats.axes import AmbiguousAxesError
from volumen.data.formats.detection import SUFFIXES, is_hidden
from volumen.data.formats.integral import IntegralVolume
from volumen.data.formats.listing import Entry, folder_exists, list_volumes, refuse_file
from volumen.data.formats.opening import open_volume
from volumen.data.formats.urls import child, is_url, local_path, names_in
from volumen.data.formats.volumes import Volume
from volumen.data.labels.label_channels import LabelRule, open_label
from volumen.data.pairing import Case, pair_cases, split_label_name
from volumen.data.placement import OBLIQUE_DEGREES, aligned_to_grid, common_spacings, refuse_impossible
from volumen.data.space.geometry import Geometry, nearest_turn
from volumen.data.turned import TurnedVolume
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.text import counted

logger = logging.getLogger(__name__)

FORMATS = (*SUFFIXES, "napari")
_NAMED = "named <image>_<target>"
MAX_SIZE_RATIO = 1.5
"""Voxel sizes within one folder that differ by more than this factor cause a warning."""


@dataclass(frozen=True)
class Layout:
    """All cases of one or several data folders; `targets` is the sorted union over cases.

    `members` has the names of the cases of each folder, by its path, where there are several. `validates` names the
    cases that a list of images says to validate on, None where none does, and `folds` the fold in which each
    one validates, if it says so. `stated` has what such a list says of a target, by key of `dataset_config.targets`.
    """

    root: str
    format: str
    cases: tuple[Case, ...]
    targets: tuple[str, ...]
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    validates: tuple[str, ...] | None = None
    folds: Mapping[str, int] = field(default_factory=dict)
    stated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenCase:
    """A case whose volumes are open (lazily) and fit each other.

    `spacing` has one value per spatial axis, (Z, Y, X) or (Y, X), in `unit`, which is the same for all cases of a
    folder; an unknown spacing is 1.
    """

    name: str
    image: Volume
    labels: dict[str, Volume]
    masks: dict[str, Volume]
    spacing: tuple[float, ...]
    unit: str | None = None


def discover(
    root: str | PathLike,
    *,
    format: str | None = None,
    targets: Sequence[str] | None = None,
    allow_unlabeled: bool = False,
    partial: bool = False,
) -> Layout:
    """Find images, labels and masks below a folder and pair them by name.

    A label `<image>_<target>` belongs to the image with the longest name that fits, so both parts may contain
    underscores. Names are compared case-sensitively, after Unicode normalisation (NFC). An OME-Zarr image may
    also contain labels in its own `labels/` group; a label of the same name in the folder takes precedence.

    Args:
        root: folder (or URL, for zarr) with `images/`, `labels/` and, optionally, `masks/`. With format
            "napari" also a folder of layers saved by napari: `<image>.tif`, `<image>_<target>.tif`,
            `<image>_mask.tif`.
        format: format of the images, one of `FORMATS`; by default that of `images/`.
        targets: targets to use; by default all that have a label.
        allow_unlabeled: accept images that lack the label of some target.
        partial: other folders may hold the labels that are missing here; see `volumen.data.joining`.

    Raises:
        VolumenError: a folder, an image or a label is missing, or names do not fit.
    """
    root = fspath(local_path(root))
    if format is not None and format not in FORMATS:
        raise VolumenError("--format", expected=f"one of {', '.join(FORMATS)}", found=repr(format))
    images, labels, masks = _entries(root, format)
    cases, chosen = pair_cases(
        child(root, "labels"),
        images,
        labels,
        masks,
        targets=targets,
        allow_unlabeled=allow_unlabeled,
        partial=partial,
    )
    return Layout(root, format or images[0].format, cases, chosen)


def open_cases(
    layout: Layout,
    *,
    axes: str | None = None,
    level: int = 0,
    spacing: Sequence[float] | None = None,
    rules: Mapping[str, LabelRule] | None = None,
) -> list[OpenCase]:
    """Open every volume of a layout and check that they fit each other.

    Labels of a floating type are accepted if their values are whole numbers, which is checked when they are read. A
    label whose axes have another order or direction than its image's is reoriented to the image, and each case to the
    first case. A volume that lies elsewhere in space causes a warning.

    Args:
        layout: result of `discover`.
        axes: `dataset_config.axes`, see `open_volume`.
        level: `dataset_config.ome_zarr_resolution`.
        spacing: voxel size per spatial axis, which overrides that of the files.
        rules: how the settings describe the storage of labels, by target.

    Raises:
        VolumenError: a volume cannot be opened, or shapes, channels or spacing do not fit.
    """
    cases = [_open_case(case, axes, level, rules or {}) for case in layout.cases]
    check_same_kind(cases)
    cases = with_spacing(oriented(cases), spacing)
    _warn_of_costs(cases)
    return cases


def check_same_kind(cases: Sequence[OpenCase]) -> None:
    """Refuse cases that differ in dimensions or channels.

    Raises:
        VolumenError: an image differs from the first one; names it.
    """
    first = cases[0].image
    for case in cases[1:]:
        if (len(case.image.shape), case.image.channels) != (len(first.shape), first.channels):
            raise VolumenError(
                case.image.path,
                expected=f"{_kind(first)}, as in {first.path}",
                found=_kind(case.image),
                remedy="train on images of one kind",
            )


def fit_label(image: Volume, label: Volume, *, mask: bool = False) -> Volume:
    """Check a label or mask from `as_label` against its image; return it reoriented to the image's axes.

    Raises:
        VolumenError: the shape differs, or a mask has several channels.
    """
    label = aligned_to_grid(label, image.geometry, image.shape, image.source)
    if label.shape != image.shape:
        raise VolumenError(
            label.path,
            expected=f"shape {image.shape} of {image.path}",
            found=f"{label.shape}",
            remedy="resample it to the image's grid",
        )
    if mask and label.channels != 1:
        raise VolumenError(
            label.path, expected="a mask of 1 channel", found=f"{label.channels}", remedy="save it as grey"
        )
    return label


def _kind(volume: Volume) -> str:
    return f"{len(volume.shape)}D with {counted(volume.channels, 'channel')}"


def log_remarks(cases: Sequence[OpenCase]) -> None:
    """Log the recognised forms of labels and masks, such as grey saved as RGB: one message per form."""
    files: dict[str, list[str]] = {}
    for case in cases:
        for volume in {id(v): v for v in (*case.labels.values(), *case.masks.values())}.values():
            remark = getattr(volume, "remark", "")
            if remark:
                files.setdefault(remark, []).append(volume.path)
    for remark, paths in files.items():
        more = f" (and {counted(len(paths) - 1, 'more file')})" if len(paths) > 1 else ""
        logger.warning("%s%s: %s", paths[0], more, remark)


def _open_case(
    case: Case,
    axes: str | None,
    level: int,
    rules: Mapping[str, LabelRule],
) -> OpenCase:
    image = _open_image(case, axes, level)
    ndim = len(image.shape)
    labels = {
        target: open_label(
            path, axes=axes, level=level, ndim=ndim, rule=rules.get(target, LabelRule(f"targets.{target}"))
        )
        for target, path in case.labels.items()
    }
    masks = {path: open_label(path, axes=axes, level=level, ndim=ndim) for path in set(case.masks.values())}
    labels = {target: fit_label(image, label) for target, label in labels.items()}
    fitted = {target: fit_label(image, masks[path], mask=True) for target, path in case.masks.items()}
    return OpenCase(case.name, image, labels, fitted, (1.0,) * len(image.shape))


def oriented(cases: Sequence[OpenCase]) -> list[OpenCase]:
    """Reorient each case to the first one whose orientation is known.

    Axes are permuted and reversed; a remaining rotation of 10 degrees or more causes a warning.
    """
    first = next((case.image for case in cases if case.image.geometry.is_placed), None)
    if first is None:
        return list(cases)
    turned = [_oriented(case, first) for case in cases]
    moved = [case.image for case, new in zip(cases, turned, strict=True) if new is not case]
    if moved:
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        logger.warning(
            "%s%s: the axes run to %s, and are turned to %s, as of %s",
            moved[0].source,
            more,
            moved[0].geometry.orientation,
            first.geometry.orientation,
            first.source,
        )
    return turned


def _oriented(case: OpenCase, first: Volume) -> OpenCase:
    """Return a case reoriented to a volume; unchanged if the orientations agree or one of them is not known."""
    own = case.image.geometry
    if not own.is_placed or own.frame != first.geometry.frame:
        return case
    turn, angle = nearest_turn(first.geometry, own)
    if angle > OBLIQUE_DEGREES:
        logger.warning("%s is turned by %.0f degrees against %s", case.image.source, angle, first.source)
    if turn.is_identity:
        return case
    turned = {volume: TurnedVolume(volume, turn) for volume in (*case.labels.values(), *case.masks.values())}
    return replace(
        case,
        image=TurnedVolume(case.image, turn),
        labels={name: turned[volume] for name, volume in case.labels.items()},
        masks={name: turned[volume] for name, volume in case.masks.items()},
    )


def with_spacing(cases: Sequence[OpenCase], spacing: Sequence[float] | None = None) -> list[OpenCase]:
    """Set the voxel size of every case: from the setting, else from its image, else from its labels, else 1.

    Sizes in different units are converted to that of the first case that states one.

    Args:
        cases: the cases, in the same orientation.
        spacing: `dataset_config.spacing`, or None.

    Raises:
        VolumenError: the setting does not fit, or a size that a file states is 0, below 0, infinite or no number.
    """
    ndim = len(cases[0].image.shape)
    if spacing is not None:
        if len(spacing) != ndim or not all(value > 0 for value in spacing):
            raise VolumenError(
                "dataset_config.spacing", expected=f"{ndim} positive values", found=str(list(spacing))
            )
        return [replace(case, spacing=tuple(float(value) for value in spacing), unit=None) for case in cases]
    stated = [_stated(case) for case in cases]
    if all(geometry.spacing is None for geometry in stated):
        return [replace(case, spacing=(1.0,) * ndim, unit=None) for case in cases]
    sizes, unit = common_spacings(
        [case.image.source for case in cases],
        [geometry.spacing for geometry in stated],
        [geometry.unit for geometry in stated],
    )
    return [replace(case, spacing=size, unit=unit) for case, size in zip(cases, sizes, strict=True)]


def _stated(case: OpenCase) -> Geometry:
    """Return the geometry that states the voxel size of a case; that of the image takes precedence over the labels'."""
    for volume in (case.image, *case.labels.values()):
        refuse_impossible(volume, "correct the file, or set dataset_config.spacing")
        if volume.geometry.spacing is not None:
            return volume.geometry
    return Geometry()


def warn_of_differing_sizes(cases: Sequence[OpenCase]) -> None:
    """Warn if voxel sizes differ from that of the first volume, for volumes that are not resampled."""
    first = np.array(cases[0].spacing)
    unlike = [
        case.image.source
        for case in cases
        if max(max(first / case.spacing), max(case.spacing / first)) > MAX_SIZE_RATIO
    ]
    if unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        logger.warning(
            "%s%s: the voxels have another size than in %s by more than %g times; dataset_config.target_spacing: auto"
            " resamples all volumes to one size",
            unlike[0],
            more,
            cases[0].image.source,
            MAX_SIZE_RATIO,
        )


def _open_image(case: Case, axes: str | None, level: int) -> Volume:
    """Open an image; if its shape is ambiguous, its label may determine the number of dimensions."""
    try:
        return open_volume(case.image, axes=axes, level=level)
    except AmbiguousAxesError:
        if not case.labels:
            raise
        rule = LabelRule(separate=True)  # only its shape is required
        label = open_label(next(iter(case.labels.values())), level=level, rule=rule)
        return open_volume(case.image, level=level, ndim=len(label.shape))


def _warn_of_costs(cases: Sequence[OpenCase]) -> None:
    """Warn of legal properties of files that make reading slow or images empty."""
    from volumen.data.caching.block_cache import BLOCKS
    from volumen.data.formats.nifti_volume import NiftiVolume
    from volumen.data.formats.zarr_arrays.stored_chunks import stored_blocks
    from volumen.data.formats.zarr_arrays.volume import ZarrVolume

    images = [case.image for case in cases]
    volumes = [_stored(volume) for case in cases for volume in (case.image, *case.labels.values())]
    compressed = [volume for volume in volumes if isinstance(volume, NiftiVolume) and volume.compressed]
    total = sum(volume.decoded_bytes for volume in compressed)
    if total > BLOCKS.max_bytes:
        logger.warning(
            "%d compressed NIfTI volumes hold %d MB, of which %d MB are kept decompressed: patches will "
            "decompress files again and again; gunzip them or convert them to zarr",
            len(compressed),
            total // 10**6,
            BLOCKS.max_bytes // 10**6,
        )
    for image in images:
        stored = stored_blocks(image, inside_shards=False) if not is_url(image.path) else None
        if stored is not None and len(stored.indices) < stored.total:
            missing = stored.total - len(stored.indices)
            logger.warning(
                "%s: %d of %d chunks are not stored and read as %g",
                image.path,
                missing,
                stored.total,
                stored.fill,
            )
    for volume in volumes:
        block = prod(volume.chunks) * volume.dtype.itemsize
        if isinstance(volume, ZarrVolume) and block > BLOCKS.largest:
            logger.warning("%s: every patch decodes chunks of %d MB; rechunk it", volume.path, block // 10**6)


def _stored(volume: Any) -> Any:
    """Return the volume that a view reads from, or the volume itself if it is no view."""
    while isinstance(volume, IntegralVolume | TurnedVolume):
        volume = volume.volume
    return volume


def _entries(root: str, format: str | None) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """List images, labels and masks."""
    images_folder = child(root, "images")
    if not folder_exists(images_folder):
        if format == "napari" and folder_exists(root):
            return _split_layers(root)
        refuse_file(root, f"give the folder that holds images/ and labels/, with labels {_NAMED}")
        refuse_file(images_folder, "put the images into a folder of this name")
        raise VolumenError(root, "has no images/ folder", remedy=_hint(root))
    requested = "tif" if format == "napari" else format
    listed = list_volumes(images_folder)
    images = (
        _volumes(listed) if requested is None else [entry for entry in listed if entry.format == requested]
    )
    if not images:
        _refuse_empty(images_folder, requested, listed)
    kinds = sorted({entry.format for entry in images})
    if len(kinds) > 1:
        raise VolumenError(
            images_folder,
            expected="one format",
            found=" and ".join(kinds),
            remedy=f"pass --format {kinds[0]}, or convert the others",
        )
    _refuse_duplicate_names(images)
    labels, masks = (_prefer(_list(child(root, name)), kinds[0]) for name in ("labels", "masks"))
    taken = {entry.name for entry in labels}
    return images, labels + [entry for entry in _group_labels(images) if entry.name not in taken], masks


def _list(folder: str) -> list[Entry]:
    if folder_exists(folder):
        return _volumes(list_volumes(folder))
    # Ignoring a file of that name would silently train without masks.
    refuse_file(folder, "put the volumes into a folder of this name")
    return []


def _volumes(entries: list[Entry]) -> list[Entry]:
    """Ignore PNG files beside volumes of other formats: they are pictures of these volumes."""
    return [entry for entry in entries if entry.format != "png"] or entries


def _prefer(entries: list[Entry], format: str) -> list[Entry]:
    """Of two entries with one name, retain only those of the images' format, and log this."""
    preferred = {entry.name: entry.path for entry in entries if entry.format == format}
    left_out = [entry for entry in entries if entry.format != format and entry.name in preferred]
    for entry in left_out:
        logger.warning("%s is left out: %s has the images' format", entry.path, preferred[entry.name])
    return [entry for entry in entries if entry not in left_out]


def _group_labels(images: list[Entry]) -> list[Entry]:
    """List the labels in the images' own `labels/` groups (OME-Zarr), named like those of a folder."""
    from volumen.data.formats.zarr_arrays.volume import group_labels

    return [
        Entry(f"{image.name}_{name}", "zarr", path)
        for image in images
        if image.format == "zarr"
        for name, path in group_labels(image.path).items()
    ]


def _split_layers(root: str) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Distinguish images, labels and masks by name in a folder of layers saved by napari."""
    listed = list_volumes(root)
    entries = [entry for entry in listed if entry.format == "tif"]
    if not entries:
        _refuse_empty(root, "tif", listed)
    names = {entry.name for entry in entries}
    images = [entry for entry in entries if split_label_name(entry.name, names) is None]
    _refuse_duplicate_names(images)
    rest = [entry for entry in entries if entry not in images]
    masks = [entry for entry in rest if entry.name.endswith("_mask")]
    return images, [entry for entry in rest if entry not in masks], masks


def _hint(root: str) -> str:
    if not folder_exists(root):
        return "there is no such folder: check the path"
    if PurePosixPath(root).name in ("images", "labels", "masks"):
        return f"give the folder above it, {root.rstrip('/').rsplit('/', 1)[0]}"
    names = names_in(root)
    similar = get_close_matches("images", [name.lower() for name in names], n=1)
    if similar:
        name = next(name for name in names if name.lower() == similar[0])
        return f"rename {name} to images"
    below = [name for name in names if folder_exists(child(root, name, "images"))]
    if below:
        return f"did you mean {child(root, below[0])}?"
    return f"put the images into images/ and their labels, {_NAMED}, into labels/"


def _refuse_empty(folder: str, requested: str | None, listed: list[Entry]) -> None:
    names = [name for name in names_in(folder) if not is_hidden(name)]
    kinds = [requested] if requested else list(SUFFIXES)
    endings = ", ".join(ending for kind in kinds for ending in SUFFIXES[kind])
    found = f"only {', '.join(names[:3])}{', ...' * (len(names) > 3)}" if names else "an empty folder"
    remedy = f"pass --format {listed[0].format}" if listed else "add images, or convert them"
    raise VolumenError(folder, expected=f"images ({endings})", found=found, remedy=remedy)


def _refuse_duplicate_names(images: Iterable[Entry]) -> None:
    seen: dict[str, str] = {}
    for entry in images:
        if entry.name in seen:
            raise VolumenError(
                entry.path,
                f"has the name {entry.name!r}, as {seen[entry.name]} has",
                remedy="rename or remove one of them",
            )
        seen[entry.name] = entry.path
