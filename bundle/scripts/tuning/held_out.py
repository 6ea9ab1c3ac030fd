"""What a run was validated on, found through its own experiment, and the streamed prediction of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.config.experiment_file import SECTION_NAMES
from volumen.config.manager import ConfigManager
from volumen.data.formats.opening import open_volume
from volumen.data.sampling.split_file import read_split, with_cases
from volumen.data.views import stored_box
from volumen.inference.checks.image import check_kind
from volumen.inference.jobs import make_job
from volumen.inference.predict import output_names, predict_volume
from volumen.inference.progress import Progress
from volumen.utils.boxes import whole_box
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.layout import OpenCase
    from volumen.data.pairing import Case
    from volumen.data.sampling.split import Split
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.utils.boxes import Box

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HeldOut:
    """A region that a run validates on and does not train on.

    Args:
        name: name of the image.
        box: the region, in voxels of the image as the training reads it.
        stored: the same region in voxels of the stored image, whose axes may run otherwise.
        whole: whether it is the whole image.
        files: paths of image, labels and masks.
        axes, level: how the image is opened.
    """

    name: str
    box: Box
    stored: Box
    whole: bool
    files: Case
    axes: str | None
    level: int

    @property
    def key(self) -> tuple[str, Box]:
        """What makes it the same region for another run."""
        return self.name, self.box


def experiment_of(predictor: Predictor, data: str | Sequence[str] | None = None) -> ConfigManager:
    """Return the experiment that a network was trained in.

    Args:
        predictor: the network; its checkpoint records the settings.
        data: the data folder, or several; None: as the checkpoint records it.

    Raises:
        VolumenError: the checkpoint records no experiment, or the data are not there.
    """
    missing = [name for name in SECTION_NAMES if name not in predictor.config]
    if missing:
        raise VolumenError(predictor.path, f"records no {missing[0]}, as a checkpoint of volumen train does")
    sections = {name: predictor.config[name] for name in SECTION_NAMES}
    config = ConfigManager(**sections, dataset_dir=data, origin=predictor.path)
    if not config.data.folders:
        raise VolumenError(predictor.path, "does not say where its data are", remedy="give -i DATA")
    return config


def model_name(checkpoint: Path) -> str:
    """Return the run's name, with which the names of its files begin: "a/run_best.pth" gives "run"."""
    return checkpoint.stem.rpartition("_")[0] or checkpoint.stem


def split_path(checkpoint: Path) -> Path:
    """Return the file that records the split of the run of a checkpoint."""
    return checkpoint.parent / f"{model_name(checkpoint)}_split.json"


def split_of(checkpoint: Path) -> Split:
    """Return the split of the run that a checkpoint belongs to.

    Raises:
        VolumenError: there is no file with it.
    """
    path = split_path(checkpoint)
    if not path.is_file():
        raise VolumenError(
            checkpoint,
            expected=f"{path.name} beside it, which says what the run was validated on",
            found="none",
            remedy="give a checkpoint in the folder of its run",
        )
    return read_split(path)


def held_out_regions(config: ConfigManager, split: Split) -> list[HeldOut]:
    """Return the regions of a validation part with their files.

    Raises:
        VolumenError: an image of the split is not in the data, or has another shape.
    """
    opened = {case.name: case for case in config.cases}
    files = {case.name: case for case in config.layout.cases}
    settings = config.dataset_config
    found = []
    for name, boxes in with_cases(split, opened).val.items():
        if name not in opened:
            raise VolumenError(
                config.layout.root,
                expected=f"the images of the validation part, such as {name}",
                found="no such image",
                remedy="give the data of the run with -i",
            )
        for box in boxes:
            stored = _stored_box(opened[name], box)
            whole = tuple(box) == whole_box(opened[name].image.shape)
            found.append(
                HeldOut(
                    name, tuple(box), stored, whole, files[name], settings.axes, settings.ome_zarr_resolution
                )
            )
    return found


def _stored_box(case: OpenCase, box: Box) -> Box:
    image: Any = case.image
    if any(stop > size for (_, stop), size in zip(box, image.shape, strict=True)):
        raise VolumenError(
            image.path,
            expected=f"the image as it was when the run began, with the region {box}",
            found=f"shape {image.shape}",
            remedy="give the data of the run",
        )
    return stored_box(image, box)


def predict_region(
    predictor: Predictor,
    region: HeldOut,
    request: PredictRequest,
    output: Path,
    tell: ProgressCallback | None = None,
) -> Path:
    """Predict a region, streamed; one that is predicted already is left as it is.

    Args:
        predictor: the network or ensemble.
        region: what is predicted.
        request: how; its input, output and region do not count.
        output: the OME-Zarr group.
        tell: called with the image's name, windows done and all windows.

    Raises:
        VolumenError: an image that does not fit the network, or an output that is another's.
    """
    image = open_volume(region.files.image, axes=region.axes, level=region.level)
    check_kind(predictor, image)
    asked = replace(
        request,
        input=region.files.image,
        output=str(output),
        region=None if region.whole else region.stored,
        mask=None,
        format="zarr",
    )
    job = make_job(image, None, str(output), output_names(predictor, asked), "zarr")
    predict_volume(predictor, job, asked, progress=None if tell is None else Progress(region.name, tell))
    return output


def region_paths(folder: Path, regions: Sequence[HeldOut], label: str) -> Mapping[tuple[str, Box], Path]:
    """Return where the predictions of regions go: whole images side by side, parts in a folder of their fold.

    Args:
        folder: for all of them.
        regions: of one fold.
        label: name of the fold.
    """
    paths: dict[tuple[str, Box], Path] = {}
    numbers: dict[str, int] = {}
    for region in regions:
        number = numbers[region.name] = numbers.get(region.name, -1) + 1
        part = label if number == 0 else f"{label}_{number}"
        paths[region.key] = (folder if region.whole else folder / part) / f"{region.name}.zarr"
    return paths
