"""The validation part of a run: where it is recorded, and its prediction, which is stored below a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from volumen.data.formats.opening import open_volume
from volumen.data.resampled import ResampledVolume
from volumen.data.turned import TurnedVolume
from volumen.data.views import stored_box
from volumen.evaluation.cases import ScoredCase
from volumen.evaluation.pairing import find_cases
from volumen.evaluation.request import EvaluateRequest
from volumen.inference.checks.image import check_kind
from volumen.inference.jobs import Job, find_jobs, image_paths, make_job, volume_name
from volumen.inference.predict import output_names, predict_volume, turn_to_training
from volumen.inference.progress import Progress
from volumen.inference.resampling import resampling_to_training
from volumen.tuning.held_out import (
    HeldOut,
    experiment_of,
    held_out_regions,
    model_name,
    split_of,
    split_path,
)
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.data.sampling.split import Split
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.inference.rules import InstanceRules
    from volumen.utils.boxes import Box

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PredictedRegion:
    """A region of the validation part.

    Args:
        case: its prediction with its label; other predictions may take the place of this one.
        job: the image, and where the prediction is stored.
        box: place of the region in the image.
    """

    case: ScoredCase
    job: Job
    box: Box


def kept_checkpoints(checkpoint: Path) -> list[Path]:
    """Return the checkpoints of the epochs of a run that its folder still holds, in their order."""
    pattern = re.compile(re.escape(model_name(checkpoint)) + r"_(\d+)\.pth")
    found = [(pattern.fullmatch(path.name), path) for path in checkpoint.parent.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


@dataclass(frozen=True)
class LabelledImage:
    """An image of the validation part.

    Args:
        boxes: its regions in the validation part, on the axes and voxels that the training read.
        label: path of the label that is the truth.
        mask: path of the mask, scored where above 0; None for none.
        image: path of the image; None: that of this name in the dataset's `images` folder.
    """

    boxes: tuple[Box, ...]
    label: str
    mask: str | None = None
    image: str | None = None


def validation_part(
    checkpoint: Path, data: str | Sequence[str], truth: str, predictor: Predictor | None = None
) -> dict[str, LabelledImage]:
    """Return the images of the validation part that have a label, by name.

    Args:
        checkpoint: of the run; `<model>_split.json` is beside it.
        data: dataset with the folders `images` and `labels`; or one of another program, or several.
        truth: the labelled target.
        predictor: the network, which records how such data are read.

    Raises:
        VolumenError: no split, no validation part, an image of it is missing, or none of them is labelled.
    """
    boxes = {name: tuple(regions) for name, regions in split_of(checkpoint).val.items() if regions}
    if not boxes:
        raise VolumenError(
            split_path(checkpoint),
            "the run has no validation part",
            remedy="train with a --train-split below 1",
        )
    folders = [data] if isinstance(data, str) else list(data)
    if predictor is not None and (len(folders) > 1 or not Path(folders[0], "images").is_dir()):
        return _part_of_experiment(predictor, folders, split_of(checkpoint), truth)
    data = folders[0]
    if not Path(data).is_dir():
        raise VolumenError(data, expected="the folder with images/ and labels/ of the run", found="no folder")
    missing = sorted(set(boxes) - {volume_name(path) for path in image_paths(data)})
    if missing:
        raise VolumenError(
            data,
            expected=f"the images of the validation part, such as {missing[0]}",
            found="no such image",
            remedy="give the data of the run",
        )
    labels, masks = _volumes_by_name(Path(data, "labels")), _volumes_by_name(Path(data, "masks"))
    found = {}
    for name, regions in boxes.items():
        if label := labels.get(f"{name}_{truth}"):
            named = (masks.get(key) for key in (f"{name}_{truth}", f"{name}_mask", name))
            found[name] = LabelledImage(regions, label, next(filter(None, named), None))
    if not found:
        raise VolumenError(
            Path(data, "labels"),
            expected=f"labels of the validation part, such as {min(boxes)}_{truth}",
            found="none of them",
            remedy="give data with labels of that target",
        )
    return found


def _part_of_experiment(
    predictor: Predictor, folders: Sequence[str], split: Split, truth: str
) -> dict[str, LabelledImage]:
    """Find images and labels as the training does, in data of any kind that it reads."""
    regions: dict[str, list[HeldOut]] = {}
    for region in held_out_regions(experiment_of(predictor, folders), split):
        regions.setdefault(region.name, []).append(region)
    found = {
        name: LabelledImage(
            tuple(region.box for region in own),
            own[0].files.labels[truth],
            own[0].files.masks.get(truth),
            own[0].files.image,
        )
        for name, own in regions.items()
        if truth in own[0].files.labels
    }
    if not found:
        raise VolumenError(
            ", ".join(folders), expected=f"labels of {truth} in the validation part", found="none of them"
        )
    return found


def _volumes_by_name(folder: Path) -> dict[str, str]:
    return {volume_name(path): path for path in image_paths(str(folder))} if folder.is_dir() else {}


def untouched(
    asked: PredictRequest,
    targets: Sequence[str],
    dtype: Literal["uint8", "float16", "float32"],
    instances: InstanceRules | None = None,
) -> PredictRequest:
    """Return a request whose results are stored as the network gives them, so that settings can be tried on them.

    Args:
        asked: the settings of the windows.
        targets: heads to store.
        dtype: float32, float16 or uint8.
        instances: rules whose sources are among the targets, or None.
    """
    return replace(
        asked,
        targets=tuple(targets),
        dtype=dtype,
        instances=instances,
        threshold=None,
        min_size=0,
        keep_largest=None,
        fill_holes=0,
        pyramid=False,
        format="zarr",
    )


def predict_part(
    predictor: Predictor,
    request: PredictRequest,
    part: Mapping[str, LabelledImage],
    target: str,
    tell: ProgressCallback | None = None,
) -> list[PredictedRegion]:
    """Predict the regions of a validation part and pair each with its label.

    Args:
        predictor: the network.
        request: how; its input is the dataset, its output a folder without other content.
        part: the images of the validation part by name.
        target: the predicted target that is scored.
        tell: called with what is predicted, windows done and all windows.

    Raises:
        VolumenError: an image, label or mask that does not fit.
    """
    images = _jobs(predictor, request, part)
    found = []
    for name, image in sorted(part.items()):
        for number, box in enumerate(image.boxes):
            box = _box_in_image(predictor, images[name].image, box)
            check_kind(predictor, images[name].image)
            # Regions of one image have one name, so that each goes to a folder of its own.
            output = Path(request.output) / f"region_{number}" / f"{name}.zarr"
            job = replace(images[name], output=output)
            told = None if tell is None else Progress(name, tell)
            predict_volume(predictor, job, replace(request, region=box), progress=told)
            (case,) = find_cases(
                EvaluateRequest(
                    str(output), image.label, str(output), masks=image.mask, targets=(target,), metrics=()
                )
            )
            several = len(image.boxes) > 1
            found.append(
                PredictedRegion(replace(case, name=f"{name} {number}") if several else case, job, box)
            )
    return found


def _jobs(predictor: Predictor, request: PredictRequest, part: Mapping[str, LabelledImage]) -> dict[str, Job]:
    """Return the jobs of a part's images by name."""
    names, paths = output_names(predictor, request), {name: image.image for name, image in part.items()}
    if any(paths.values()):
        axes = predictor.config.get("dataset_config", {}).get("axes")
        level = predictor.config.get("dataset_config", {}).get("ome_zarr_resolution") or 0
        return {
            name: make_job(
                open_volume(str(path), axes=request.axes or axes, level=level),
                None,
                request.output,
                names,
                "zarr",
            )
            for name, path in paths.items()
        }
    return {
        volume_name(job.image.source): job for job in find_jobs(request, names, len(predictor.patch_size))
    }


def _box_in_image(predictor: Predictor, image: Volume, box: Box) -> Box:
    """Return where a region of the split, on the axes and voxels that the training read, lies in the image.

    Raises:
        VolumenError: the image is smaller than the region.
    """
    turn = turn_to_training(predictor, image, ())
    read: Volume = image if turn is None else TurnedVolume(image, turn)
    grid = resampling_to_training(predictor.trained_grid, read)
    read = read if grid is None else ResampledVolume(read, grid)
    if len(read.shape) != len(box) or any(stop > n for (_, stop), n in zip(box, read.shape, strict=True)):
        raise VolumenError(
            image.path,
            expected=f"the image as it was when the run began, with the region {box}",
            found=f"shape {read.shape}",
            remedy="give the data of the run",
        )
    return stored_box(read, box)
