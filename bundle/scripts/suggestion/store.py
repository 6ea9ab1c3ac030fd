"""Writes accepted labels and masks: into a new data folder that links to the images, or into files of its own.

A file that the user made is never changed. A mask is written after its label, so that an interruption leaves voxels
unknown, not wrong; where both are new, the mask comes first, since a label without a mask is known everywhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from volumen.data.formats.detection import SUFFIXES
from volumen.data.formats.urls import is_url
from volumen.data.formats.volumes import Region, Volume
from volumen.data.index.label_values import stored_regions
from volumen.data.layout import Layout
from volumen.data.pairing import Case
from volumen.data.space.geometry import GRID, Geometry
from volumen.data.validity import inside_mask
from volumen.suggestion.crops import create_volume, replace_folder
from volumen.suggestion.labelled import MARK, LabelledImage, is_accepted
from volumen.utils.errors import VolumenError


@dataclass(frozen=True)
class Painted:
    """An accepted box of a target.

    Args:
        region: in voxels of the image.
        label: painted values, (channels, *region).
        written: voxels whose label is written, bool (*region).
    """

    region: Region
    label: np.ndarray
    written: np.ndarray


Boxes = Mapping[tuple[str, str], Sequence[Painted]]
"""Painted boxes by image and target."""


def write_in_place(data: Path, images: Mapping[str, LabelledImage], painted: Boxes) -> None:
    """Write labels and masks into a data folder: new files, or those of an earlier acceptance.

    Raises:
        VolumenError: files of the user would have to be changed, or the folder is no data folder of ours.
    """
    if not (data / "images").is_dir():
        raise VolumenError(
            data, expected="a data folder with images/", found="none", remedy="give -o NEW_DATA"
        )
    for (name, target), _ in painted.items():
        _refuse_foreign(images[name].files, target)
    for (name, target), boxes in painted.items():
        image, files = images[name], images[name].files
        if target in files.labels:
            _update(Path(files.labels[target]), Path(files.masks[target]), boxes)
        else:
            _create(data, image, target, boxes)


def _refuse_foreign(files: Case, target: str) -> None:
    """Refuse to change a label or a mask that no acceptance wrote.

    Raises:
        VolumenError: names the file.
    """
    for path in (files.labels.get(target), files.masks.get(target)):
        if path is not None and not is_accepted(path):
            raise VolumenError(
                path,
                "is a file of yours, which is not changed",
                remedy="give -o NEW_DATA: a new data folder gets its content together with the painted boxes",
            )
    if target in files.labels and target not in files.masks:
        raise VolumenError(
            files.labels[target],
            "has lost its mask, so it counts as known everywhere",
            remedy="give -o NEW_DATA",
        )


def _update(label: Path, mask: Path, boxes: Sequence[Painted]) -> None:
    """Add boxes to a label and a mask of an earlier acceptance."""
    import zarr

    arrays: list[Any] = [zarr.open_array(path / "0", mode="r+") for path in (label, mask)]
    largest = max(int(one.label.max(initial=0)) for one in boxes)
    if largest > np.iinfo(arrays[0].dtype).max:
        raise VolumenError(
            label, expected=f"values that fit {arrays[0].dtype}", found=largest, remedy="give -o NEW_DATA"
        )
    for one in boxes:
        _paint(arrays[0], one)
    for one in boxes:
        _unmask(arrays[1], one)


def _create(data: Path, image: LabelledImage, target: str, boxes: Sequence[Painted]) -> None:
    """Write a new label and a new mask of an image that had none."""
    for folder in ("labels", "masks"):
        (data / folder).mkdir(exist_ok=True)
    name = f"{image.name}_{target}.zarr"
    with_temporary = [data / folder / f".{name}.{uuid4().hex[:16]}.tmp" for folder in ("labels", "masks")]
    try:
        _write_label(with_temporary[0], image, target, boxes)
        _write_mask(with_temporary[1], image, target, boxes)
        replace_folder(with_temporary[1], data / "masks" / name)
        replace_folder(with_temporary[0], data / "labels" / name)
    finally:
        for path in with_temporary:
            shutil.rmtree(path, ignore_errors=True)


def new_data(
    output: Path,
    layout: Layout,
    images: Mapping[str, LabelledImage],
    painted: Boxes,
) -> None:
    """Write a data folder with links to the images, the earlier labels and masks, and those with painted boxes.

    The folder appears when it is complete.

    Args:
        output: the folder, which must not exist or be empty.
        layout: the earlier data.
        images: the images with painted boxes.
        painted: the boxes.

    Raises:
        VolumenError: the folder is not empty, or a volume is no single local file or folder, which cannot be linked.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise VolumenError(
            output, expected="a new or empty folder", found="one with content", remedy="give another -o"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{uuid4().hex[:16]}.tmp")
    try:
        for folder in ("images", "labels", "masks"):
            (temporary / folder).mkdir(parents=True)
        for case in layout.cases:
            link_volume(case.image, temporary / "images", case.name)
            for target, path in case.labels.items():
                if (case.name, target) not in painted:
                    link_volume(path, temporary / "labels", f"{case.name}_{target}")
            for target, path in case.masks.items():
                if (case.name, target) not in painted:
                    link_volume(path, temporary / "masks", f"{case.name}_{target}")
        for (name, target), boxes in painted.items():
            image = images[name]
            file = f"{name}_{target}.zarr"
            _write_label(temporary / "labels" / file, image, target, boxes)
            labelling = image.labels[target]
            if labelling.label is None or labelling.mask is not None or labelling.labelled_only:
                _write_mask(temporary / "masks" / file, image, target, boxes)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_volume(path: str, folder: Path, name: str) -> None:
    """Link to a volume under the name that pairs it.

    Raises:
        VolumenError: it is no single local file or folder.
    """
    source = Path(path)
    if is_url(path) or not source.exists():
        raise VolumenError(
            path, expected="a local file or folder, which a new data folder can link to", found="none",
            remedy="convert it to one local file, such as zarr",
        )  # fmt: skip
    suffix = next(
        (end for ends in SUFFIXES.values() for end in ends if source.name.lower().endswith(end)), ""
    )
    try:
        (folder / f"{name}{suffix}").symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError as error:
        raise VolumenError(
            folder,
            f"cannot hold a link to {path} ({error.strerror})",
            remedy="give -o on a disk that knows links",
        ) from error


def _write_label(path: Path, image: LabelledImage, target: str, boxes: Sequence[Painted]) -> None:
    """Write a label: the earlier one, and the boxes over it."""
    labelling = image.labels[target]
    dtype, fill = np.dtype(np.uint8), 0
    if labelling.label is not None:
        dtype = np.dtype(labelling.label.dtype)
        absent = stored_regions(labelling.label)[1]
        fill = int(next(iter(absent))) if len(absent) == 1 else 0
    for one in boxes:
        dtype = np.result_type(dtype, np.min_scalar_type(int(one.label.max(initial=0))))
    channels = boxes[0].label.shape[0]
    array = create_volume(
        path,
        image.image.shape,
        dtype,
        label_geometry(image),
        channels=channels,
        fill=fill,
        attributes={MARK: True},
    )
    if labelling.label is not None:
        _copy(labelling.label, array, fill, lambda block: block)
    for one in boxes:
        _paint(array, one)


def _write_mask(path: Path, image: LabelledImage, target: str, boxes: Sequence[Painted]) -> None:
    """Write a mask: the earlier one, or nothing where there was no label, and the boxes."""
    labelling = image.labels[target]
    array = create_volume(
        path, image.image.shape, np.dtype(np.uint8), label_geometry(image), attributes={MARK: True}
    )
    if labelling.label is not None and labelling.labelled_only:
        # What a person has looked at: training counts the same voxels of it, those above 0.
        for region in stored_regions(labelling.label)[0]:
            known = labelling.read(region)[1]
            if known.any():
                array[region] = known.astype(np.uint8)
    elif labelling.label is not None and labelling.mask is not None:
        _copy(labelling.mask, array, 0, lambda block: inside_mask(block)[None].astype(np.uint8))
    for one in boxes:
        _unmask(array, one)


def _copy(volume: Volume, array: Any, fill: float, convert: Any) -> None:
    """Copy the stored blocks of a volume; the others have the fill value."""
    for region in stored_regions(volume)[0]:
        block = convert(volume.read(region))
        if (block != fill).any():
            array[_place(array, region)] = block if array.ndim > len(region) else block[0]


def _paint(array: Any, one: Painted) -> None:
    place = _place(array, one.region)
    earlier = np.asarray(array[place])
    label = one.label if array.ndim > len(one.region) else one.label[0]
    array[place] = np.where(one.written, label, earlier).astype(array.dtype)


def _unmask(array: Any, one: Painted) -> None:
    array[one.region] = np.maximum(np.asarray(array[one.region]), one.written.astype(array.dtype))


def _place(array: Any, region: Region) -> tuple[slice, ...]:
    return (slice(None),) * (array.ndim - len(region)) + region


def label_geometry(image: LabelledImage) -> Geometry:
    """Return the geometry that a label of an image states: that of the image, as far as OME-Zarr can."""
    geometry = image.image.geometry
    if geometry.frame != GRID or geometry.spacing is None:
        return Geometry(geometry.spacing, geometry.unit)
    return geometry
