"""Finds the volumes of a request and chooses the output of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from volumen.data.case_names import FIRST_CHANNEL
from volumen.data.formats.channel_files import joined_path, name_without_channels
from volumen.data.formats.detection import dicom_files
from volumen.inference.output.exports import DEFAULT_SUFFIX, FileExport, format_of
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.inference.request import PredictRequest


_CHANNEL = re.compile(r"(.+)_(\d{4})")
_RAW_IMAGES = re.compile(r"images[A-Z]\w*")


@dataclass(frozen=True)
class Job:
    """One volume to predict.

    Args:
        image: the volume.
        output: the OME-Zarr group; a temporary one if files are exported.
        mask: voxels above 0 are predicted; None: all voxels.
        export: the files to write; None: the group itself is the output.
    """

    image: Volume
    output: Path
    mask: Volume | None = None
    export: FileExport | None = None

    @property
    def shown(self) -> str:
        """The path to show to the user: the group, or the record of the files."""
        return str(self.export.sidecar if self.export else self.output)


def find_jobs(
    request: PredictRequest, targets: tuple[str, ...], ndim: int, channels: int | None = None
) -> list[Job]:
    """Open the images of a request.

    Args:
        request: what to predict.
        targets: names of the outputs.
        ndim: spatial axes of the network.
        channels: files of an image, CASE_0000, CASE_0001, ..., if the network is known to need as many.

    Raises:
        VolumenError: no image, an unreadable image, or a mask that is missing or of another shape.
    """
    from volumen.data.formats.opening import open_volume

    items = volume_items(request.input, request.mask, ndim, channels)
    _, suffix = format_of(request.output, request.format)
    if suffix and [item["image"] for item in items] != [request.input]:
        raise VolumenError(request.output, expected="a folder, since there are several images", found=suffix)
    jobs = []
    for item in items:
        name = case_name(item["image"], channels)
        image = open_volume(item["image"], axes=request.axes, level=request.level)
        mask = open_mask(item["mask"], image) if "mask" in item else None
        jobs.append(make_job(image, mask, request.output, targets, request.format, name))
    return jobs


def volume_items(
    source: str, mask: str | None = None, ndim: int | None = None, channels: int | None = None
) -> list[dict[str, str]]:
    """Return the images of a path as MONAI items: {"image": path} and, if masks are given, its "mask".

    Args:
        source: an image, a folder of images, or a dataset with an `images` folder.
        mask: a volume for one image, else a folder with one per image; None for none.
        ndim: spatial axes of the network; with 3, a folder of numbered slices is one image, otherwise many. A folder
            of DICOM files is many for 2.
        channels: as for `find_jobs`; a folder of such files is none of slices.

    Raises:
        VolumenError: no image, or a mask that is missing.
    """
    if channels is None and ndim == 3 and is_stack(source):
        images = [source]
    elif channels is None and ndim == 2 and is_dicom_folder(source):
        images = [str(file) for file in dicom_files(Path(source))]
    else:
        images = image_paths(source, channels)
    if not images:
        raise VolumenError(source, "no image found", remedy="give an image, or a folder that holds some")
    if mask is None:
        return [{"image": path} for path in images]
    if images == [source]:
        return [{"image": source, "mask": mask}]
    return [{"image": path, "mask": str(_mask_of(Path(mask), volume_name(path)))} for path in images]


def open_mask(path: str | Path, image: Volume) -> Volume:
    """Open the mask of an image; a floating-point mask selects the voxels that are not 0.

    Raises:
        VolumenError: it is unreadable, of another shape, or has several channels that differ.
    """
    from volumen.data.labels.label_channels import open_mask_file
    from volumen.data.placement import aligned_to_grid

    mask = open_mask_file(path, ndim=len(image.shape))
    mask = aligned_to_grid(mask, image.geometry, image.shape, image.source)
    if mask.shape != image.shape:
        raise VolumenError(path, expected=f"shape {image.shape}, as the image", found=mask.shape)
    return mask


def make_job(
    image: Volume,
    mask: Volume | None,
    output: str,
    targets: tuple[str, ...],
    required: str | None,
    name: str | None = None,
) -> Job:
    """Return the job of an image, with the place of its output.

    Args:
        image: the volume.
        mask: voxels above 0 are predicted; None: all voxels.
        output: `NAME.zarr`, `NAME.tif` or `NAME.nii.gz` of one image, else a folder.
        targets: names of the outputs.
        required: format, or None to choose it by the output's name.
        name: of the image; None: by its path.
    """
    kind, suffix = format_of(output, required)
    folder, name = Path(output), name or volume_name(image.source)
    if suffix:
        folder, name = folder.parent, folder.name[: -len(suffix)]
    if kind == "zarr":
        return Job(image, folder / f"{name}.zarr", mask)
    export = FileExport(folder, name, targets, suffix or DEFAULT_SUFFIX[kind], plain=bool(suffix))
    return Job(image, export.working, mask, export)


def image_paths(source: str, channels: int | None = None) -> list[str]:
    """Return the images of a path: itself, those in its `images` folder, or those in the folder itself.

    Args:
        source: the path.
        channels: as for `find_jobs`.
    """
    from volumen.data.formats.detection import (
        detect_format,
        is_hidden,
        split_suffix,
        volume_folder,
    )

    path = Path(source)
    if "://" in source or not path.is_dir() or volume_folder(path):
        return [source]
    folder = path / "images" if (path / "images").is_dir() else path
    found: list[tuple[str, str]] = []
    for entry in sorted(folder.iterdir()):
        if is_hidden(entry.name):
            continue
        try:
            found.append((str(entry), detect_format(entry)))
        except VolumenError:
            # Other files are ignored, but a damaged volume must not be left out in silence.
            if split_suffix(entry.name)[1] is not None:
                raise
    # PNG files beside volumes of other formats are pictures of them.
    paths = [name for name, kind in found if kind != "png"] or [name for name, _ in found]
    return _joined_channels(paths, channels)


def _joined_channels(paths: list[str], channels: int | None = None) -> list[str]:
    """Join the files of one image's channels, CASE_0000, CASE_0001, ...; leave a folder of other names as it is."""
    parts = [_CHANNEL.fullmatch(_stem(path)) for path in paths]
    numbers = {match[2] for match in parts if match}
    if not all(parts) or len(numbers) < 2:
        return paths
    cases: dict[str, list[str]] = {}
    for path, match in zip(paths, parts, strict=True):
        assert match is not None
        cases.setdefault(match[1], []).append(path)
    # Slices are numbered too: channels are as many for every image.
    few = len(cases) < 2 and len(numbers) != channels
    if few or any(len(files) != len(numbers) for files in cases.values()):
        return paths
    return [joined_path(files) for files in cases.values()]


def is_dicom_folder(source: str) -> bool:
    """Whether a path is a folder of DICOM files."""
    from volumen.data.formats.detection import volume_folder

    return "://" not in source and Path(source).is_dir() and volume_folder(Path(source)) == "dicom"


def is_stack(source: str) -> bool:
    """Whether a path is a folder of numbered 2D slices, and no dataset with a folder of images."""
    from volumen.data.formats.slice_stack import holds_slices

    path = Path(source)
    return "://" not in source and path.is_dir() and not (path / "images").is_dir() and holds_slices(path)


def volume_name(path: str) -> str:
    """Return an image's name without folder and format: "a/b.ome.zarr" gives "b", and so does "a/b.h5:/raw"."""
    from volumen.data.formats.detection import split_inner

    place = split_inner(path)[0].rstrip("/")
    name = _stem(place)
    return name.removesuffix(FIRST_CHANNEL) if _is_channel(place, name) else name


def _stem(path: str) -> str:
    """Return the name of a path without folder, channels and format."""
    from volumen.data.formats.detection import split_suffix

    return split_suffix(name_without_channels(path.rsplit("/", 1)[-1]))[0]


def case_name(path: str, channels: int | None = None) -> str:
    """Return the name of an image that is predicted, see `volume_name`.

    Args:
        path: the image.
        channels: as for `find_jobs`; if given, a network of nnU-Net predicts, whose images end in a channel's number.
    """
    name = volume_name(path)
    return name if channels is None else name.removesuffix(FIRST_CHANNEL)


def _is_channel(path: str, name: str) -> bool:
    """Whether the name of an image ends in the number of nnU-Net's only channel, CASE_0000, which names no case.

    That is so in nnU-Net's own folders (imagesTr, imagesTs), and in another one where all of several images end so.
    """
    if not name.endswith(FIRST_CHANNEL) or name == FIRST_CHANNEL or "://" in path:
        return False
    folder = Path(path).parent
    if _RAW_IMAGES.fullmatch(folder.name):
        return True
    try:
        return folder.name != "images" and _all_first_channels(str(folder), folder.stat().st_mtime_ns)
    except OSError:
        return False


@lru_cache(maxsize=8)
def _all_first_channels(folder: str, changed: int) -> bool:
    """Whether a folder holds several images and all of their names end in the number of the first channel.

    Args:
        folder: the folder.
        changed: time of its last change, in ns; makes a changed folder another entry of the cache.
    """
    from volumen.data.formats.detection import is_hidden, split_suffix

    parts = [split_suffix(path.name) for path in Path(folder).iterdir() if not is_hidden(path.name)]
    stems = [stem for stem, kind in parts if kind is not None]
    return len(stems) > 1 and all(stem.endswith(FIRST_CHANNEL) for stem in stems)


def _mask_of(folder: Path, name: str) -> Path:
    matches = sorted(p for p in folder.iterdir() if volume_name(str(p)) == name)
    matches = matches or sorted(p for p in folder.iterdir() if volume_name(str(p)).startswith(f"{name}_"))
    if len(matches) != 1:
        raise VolumenError(
            folder, expected=f"one mask named {name} or {name}_...", found=[p.name for p in matches] or "none"
        )
    return matches[0]
