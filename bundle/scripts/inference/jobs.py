"""Which volumes a request means, and where the prediction of each goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.errors import VolumenError
from scripts.inference.exports import DEFAULT_SUFFIX, FileExport, format_of

if TYPE_CHECKING:
    from scripts.data.volumes import Volume
    from scripts.inference.predict import PredictRequest


@dataclass(frozen=True)
class Job:
    """One volume to predict.

    Args:
        image: the volume.
        output: the OME-Zarr group, the one that is streamed into where files are wanted.
        mask: volume that is predicted where it is not 0, or None.
        export: the files wanted, or None for the group itself.
    """

    image: Volume
    output: Path
    mask: Volume | None = None
    export: FileExport | None = None

    @property
    def shown(self) -> str:
        """The path that a user looks for: the group, or the record of the files."""
        return str(self.export.sidecar if self.export else self.output)


def find_jobs(request: PredictRequest, targets: tuple[str, ...]) -> list[Job]:
    """Open the images of a request.

    Args:
        request: what to predict.
        targets: names of the outputs.

    Raises:
        VolumenError: nothing there, an unreadable image, or a mask that is missing or of another shape.
    """
    from scripts.data.volumes import open_volume

    images = image_paths(request.input)
    single = images == [request.input]
    kind, suffix = format_of(request.output, request.format)
    if not single and suffix:
        raise VolumenError(request.output, expected="a folder, since there are several images", found=suffix)
    jobs = []
    for path in images:
        image = open_volume(path, axes=request.axes, level=request.level)
        name = volume_name(path)
        mask = None
        if request.mask is not None:
            mask_path = Path(request.mask) if single else _mask_of(Path(request.mask), name)
            mask = open_volume(mask_path, ndim=len(image.shape))
            if mask.shape != image.shape:
                raise VolumenError(mask_path, expected=f"shape {image.shape}, as the image", found=mask.shape)
        folder = Path(request.output)
        if suffix:
            folder, name = folder.parent, folder.name[: -len(suffix)]
        if kind == "zarr":
            jobs.append(Job(image, folder / f"{name}.zarr", mask))
            continue
        ending = suffix or DEFAULT_SUFFIX[kind]
        export = FileExport(folder, name, targets, ending, plain=bool(suffix))
        jobs.append(Job(image, export.working, mask, export))
    if not jobs:
        raise VolumenError(
            request.input, "no image found", remedy="give an image, or a folder that holds some"
        )
    return jobs


def image_paths(source: str) -> list[str]:
    """Return the images of a path: itself, those in its `images` folder, or those in the folder itself."""
    from scripts.data.formats import detect_format

    path = Path(source)
    if "://" in source or not path.is_dir() or _is_zarr(path):
        return [source]
    folder = path / "images" if (path / "images").is_dir() else path
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        try:
            detect_format(entry)
        except VolumenError:
            continue
        found.append(str(entry))
    return found


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray", ".zattrs"))


def volume_name(path: str) -> str:
    """Return an image's name without folder and format: "a/b.ome.zarr" gives "b"."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    for suffix in (".ome.zarr", ".ome.tiff", ".ome.tif", ".nii.gz"):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return Path(name).stem if Path(name).suffix in (".zarr", ".tif", ".tiff", ".nii") else name


def _mask_of(folder: Path, name: str) -> Path:
    matches = sorted(p for p in folder.iterdir() if volume_name(str(p)) == name)
    matches = matches or sorted(p for p in folder.iterdir() if volume_name(str(p)).startswith(f"{name}_"))
    if len(matches) != 1:
        raise VolumenError(
            folder, expected=f"one mask named {name} or {name}_...", found=[p.name for p in matches] or "none"
        )
    return matches[0]
