"""Says which boxes to label next: predicts the data, measures candidate boxes, chooses some and writes them."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import Volume
from volumen.inference.checks.image import check_kind
from volumen.inference.ensemble import load_model
from volumen.inference.jobs import make_job
from volumen.inference.output.block_log import read_provenance
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.predict import output_names, predict_volume
from volumen.inference.predictor import Predictor
from volumen.inference.progress import Progress
from volumen.inference.request import PredictRequest
from volumen.inference.settings import request_fields
from volumen.suggestion.choice import Candidates, Chosen, choose
from volumen.suggestion.labelled import HowOpened, LabelledImage, find_images, open_images
from volumen.suggestion.overview import write_overview
from volumen.suggestion.record import (
    OVERVIEW,
    PREDICTIONS,
    RECORD,
    TABLES,
    SuggestedBox,
    Suggestions,
    read_record,
    write_record,
)
from volumen.suggestion.request import SuggestRequest
from volumen.suggestion.subject import Subject, find_subjects
from volumen.suggestion.table import BoxTable, measure
from volumen.suggestion.to_paint import write_box
from volumen.tuning.validation_part import untouched
from volumen.utils.boxes import Box, box_text
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError
from volumen.utils.files.arrays import read_arrays
from volumen.utils.files.atomic import write_atomically

logger = logging.getLogger(__name__)

Tell = Callable[[str, int, int], None]
_NOT_ASKED = ("output", "workers", "device", "batch_size", "input", "checkpoint")
"""Fields of a request that do not change which boxes are suggested, or are recorded by their content."""
_MOST_CONSTANT = 0.5
"""Largest share of a candidate that may lie in cells without contrast, such as padding."""


def suggest(request: SuggestRequest, *, progress: Tell | None = None) -> Suggestions:
    """Suggest boxes to label, and write them into a folder; a finished folder is left as it is.

    Args:
        request: which boxes, and where they go.
        progress: called with what is done, how much of it, and the total.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    _check(request)
    predictor = load_model(request.checkpoint, choose_device(request.device), fuse=True)
    subjects = find_subjects(predictor, request.target)
    size = _box_size(request, predictor)
    how = HowOpened.of_config(predictor.config)
    images = open_images(find_images(request.input), [subject.form for subject in subjects], how)
    for image in images:
        check_kind(predictor, image.image)
    asked = _identity(request, predictor, subjects, size)
    folder = Path(request.output)
    if (folder / RECORD).is_file():
        return _earlier(folder, asked)
    outputs = predict_images(predictor, images, subjects, request, how, progress)
    predicted = {name: open_predictions(output, subjects) for name, output in outputs.items()}
    tables = {
        image.name: _table(
            image, predicted[image.name], outputs[image.name], subjects, predictor, size, folder, progress
        )
        for image in images
    }
    numbers, candidates = make_candidates(images, tables, subjects, request.max_labelled)
    chosen = choose(candidates, request.strategy, request.number, beta=request.beta, seed=request.seed)
    _say_number(len(chosen), len(candidates), request)
    boxes = tuple(
        _box(rank, one, candidates, numbers, images, tables, subjects) for rank, one in enumerate(chosen, 1)
    )
    found = Suggestions(
        asked,
        boxes,
        {subject.name: _painting(subject) for subject in subjects},
        asdict(how),
        {image.name: list(image.image.shape) for image in images},
        {image.name: image.image.geometry.plain() for image in images},
    )
    by_name = {image.name: image for image in images}
    for number, box in enumerate(boxes, 1):
        write_box(folder, box, by_name[box.volume], predicted[box.volume], subjects)
        if progress is not None:
            progress("boxes, written", number, len(boxes))
    write_overview(folder / OVERVIEW, folder, found)
    write_record(folder, found)
    return found


def _check(request: SuggestRequest) -> None:
    for flag, value, expected in (
        ("-n", request.number, "at least 1"),
        ("--beta", request.beta, "a number of at least 0"),
        ("--max-labelled", request.max_labelled, "a share from 0 to below 1"),
    ):
        wrong = value < 1 if flag == "-n" else not 0 <= value < (1 if flag == "--max-labelled" else np.inf)
        if wrong:
            raise VolumenError(flag, expected=expected, found=value)


def _box_size(request: SuggestRequest, predictor: Predictor) -> tuple[int, ...]:
    ndim = len(predictor.patch_size)
    if request.size is None:
        return tuple(max(1, side // 2) for side in predictor.patch_size)
    if len(request.size) != ndim or min(request.size) < 1:
        found = ",".join(map(str, request.size))
        raise VolumenError("--size", expected=f"{ndim} sizes of at least 1 voxel", found=found)
    return tuple(request.size)


def _identity(
    request: SuggestRequest, predictor: Predictor, subjects: Sequence[Subject], size: tuple[int, ...]
) -> dict[str, Any]:
    """Return what decides the suggestions, apart from the content of the data."""
    kept = {key: value for key, value in asdict(request).items() if key not in _NOT_ASKED}
    data = str(Path(request.input).resolve()) if "://" not in request.input else request.input
    asked = {
        **kept, "size": list(size), "target": [subject.name for subject in subjects],
        "model": predictor.checksum, "data": data,
    }  # fmt: skip
    return dict(json.loads(json.dumps(asked)))


def _earlier(folder: Path, asked: Mapping[str, Any]) -> Suggestions:
    """Return finished suggestions.

    Raises:
        VolumenError: they are those of another request.
    """
    found = read_record(folder)
    differing = sorted(key for key in asked if found.asked.get(key) != asked[key])
    if differing:
        raise VolumenError(
            folder,
            f"holds suggestions of another request ({', '.join(differing)}), perhaps painted ones",
            remedy="give another -o",
        )
    logger.info("%s: finished already, nothing to do", folder)
    return found


def predict_images(
    predictor: Predictor,
    images: Sequence[LabelledImage],
    subjects: Sequence[Subject],
    request: SuggestRequest,
    how: HowOpened,
    progress: Tell | None,
) -> dict[str, Path]:
    """Predict every image that a box could be suggested in; return the outputs by name."""
    targets = tuple(subject.name for subject in subjects)
    outputs = {}
    for image in images:
        output = Path(request.output) / PREDICTIONS / f"{image.name}.zarr"
        settings = request_fields(predictor.config.get("inference_config") or {})
        settings.pop("checkpoint", None)
        asked = PredictRequest(
            **{
                **settings,
                "input": image.files.image, "checkpoint": request.checkpoint, "output": str(output),
                "overlap": request.overlap, "tta": request.tta, "batch_size": request.batch_size,
                "workers": request.workers, "device": request.device, "axes": how.axes, "level": how.level,
                "mask": None,
            }
        )  # fmt: skip
        asked = replace(untouched(asked, targets, "uint8"), pyramid=True)
        job = make_job(image.image, None, str(output), output_names(predictor, asked), "zarr")
        counter = None if progress is None else Progress(image.name, progress)
        predict_volume(predictor, job, asked, progress=counter)
        outputs[image.name] = output
    return outputs


def open_predictions(output: Path, subjects: Sequence[Subject]) -> dict[str, Volume]:
    """Open the stored probabilities of a volume by target."""
    return {
        subject.name: open_volume(
            find_target(output, subject.name) / "0",
            axes=("c" if subject.head.channels > 1 else "") + "zyx"[-_ndim(output, subject) :],
        )
        for subject in subjects
    }


def _ndim(output: Path, subject: Subject) -> int:
    import zarr

    array: Any = zarr.open_array(find_target(output, subject.name) / "0", mode="r")
    return len(array.shape) - (subject.head.channels > 1)


def _table(
    image: LabelledImage,
    predicted: Mapping[str, Volume],
    output: Path,
    subjects: Sequence[Subject],
    predictor: Predictor,
    size: tuple[int, ...],
    folder: Path,
    progress: Tell | None,
) -> BoxTable:
    """Return the table of a volume, from an earlier call if prediction and labels are the same."""
    key = _table_key(image, output, subjects, size)
    path = folder / TABLES / f"{image.name}.npz"
    if path.is_file():
        try:
            arrays = read_arrays(path)
            if str(arrays.pop("key")) == key:
                extent = tuple(int(side) for side in arrays.pop("extent"))
                return BoxTable.from_arrays(arrays, extent)
        except (OSError, ValueError, KeyError) as error:
            logger.debug("%s is measured again: %s", path, error)

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(f"{image.name}, boxes", done, total)

    table = measure(image, predicted, subjects, predictor.normalizer, size, progress=told)
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, key=np.array(key), extent=np.array(table.extent), **table.arrays())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return table


def _table_key(image: LabelledImage, output: Path, subjects: Sequence[Subject], size: Sequence[int]) -> str:
    content = {
        "prediction": read_provenance(output),
        "labels": {name: labelling.fingerprint() for name, labelling in image.labels.items()},
        "targets": [subject.name for subject in subjects],
        "size": list(size),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def make_candidates(
    images: Sequence[LabelledImage],
    tables: Mapping[str, BoxTable],
    subjects: Sequence[Subject],
    max_labelled: float,
) -> tuple[np.ndarray, Candidates]:
    """Return the boxes that may be suggested: where a target is open, and half of the image is no padding.

    Args:
        images: the volumes.
        tables: by name.
        subjects: the targets.
        max_labelled: largest labelled share of a target that is open.

    Returns:
        The number of each candidate in its volume's table, and the candidates.

    Raises:
        VolumenError: none is left.
    """
    parts = [_of_volume(tables[image.name], subjects, max_labelled) for image in images]
    if not any(len(part["number"]) for part in parts):
        labelled = all(
            (tables[image.name].share_known(subject.name) > max_labelled).all()
            for image in images
            for subject in subjects
        )
        raise VolumenError(
            ", ".join(image.name for image in images[:3]) + (", ..." if len(images) > 3 else ""),
            "are labelled already: nothing is left to suggest"
            if labelled
            else "hold no box that is unlabelled and has contrast",
            remedy="give masks or an ignore label that say where labels are unknown, new images, or a smaller --size",
        )
    joined = {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}
    owners = np.concatenate([np.full(len(part["number"]), n) for n, part in enumerate(parts)])
    ndim = len(images[0].image.shape)
    candidates = Candidates(
        owners,
        joined["corners"].T.reshape(-1, ndim),
        np.array([tables[image.name].extent for image in images]),
        np.array([image.image.shape for image in images]),
        joined["features"].T,
        joined["entropy"],
        joined["class_entropy"],
        joined["class_share"],
    )
    return joined["number"], candidates


def _of_volume(table: BoxTable, subjects: Sequence[Subject], max_labelled: float) -> dict[str, np.ndarray]:
    """Return the columns of a volume's candidates, the boxes on the last axis."""
    opened = np.stack([table.share_known(subject.name) <= max_labelled for subject in subjects])
    usable = np.flatnonzero(opened.any(axis=0) & (table.constant <= _MOST_CONSTANT * table.voxels))
    means = np.stack([table.mean_entropy(subject.name) for subject in subjects])
    entropy = (means * opened).sum(axis=0) / np.maximum(opened.sum(axis=0), 1)
    class_entropy = [
        table.mean_class_entropy(subject.name)[subject.first :] * opened[n]
        for n, subject in enumerate(subjects)
    ]
    share = [table.share(subject.name)[subject.first :] * opened[n] for n, subject in enumerate(subjects)]
    features = [table.image_features(), means, *(table.share(subject.name) for subject in subjects)]
    columns = {
        "number": np.arange(len(table.corners)),
        "corners": table.corners.T,
        "features": np.concatenate(features),
        "entropy": entropy,
        "class_entropy": np.concatenate(class_entropy),
        "class_share": np.concatenate(share),
    }
    return {key: values[..., usable] for key, values in columns.items()}


def _say_number(found: int, candidates: int, request: SuggestRequest) -> None:
    if found < request.number:
        logger.warning(
            "only %d of %d boxes: %d candidates are unlabelled and have contrast, and boxes do not overlap",
            found, request.number, candidates,
        )  # fmt: skip


def _box(
    rank: int,
    one: Chosen,
    candidates: Candidates,
    numbers: np.ndarray,
    images: Sequence[LabelledImage],
    tables: Mapping[str, BoxTable],
    subjects: Sequence[Subject],
) -> SuggestedBox:
    image = images[int(candidates.volume[one.candidate])]
    table, row = tables[image.name], int(numbers[one.candidate])
    corner = [int(value) for value in table.corners[row]]
    box: Box = tuple((first, first + side) for first, side in zip(corner, table.extent, strict=True))
    strata = [(subject, name) for subject in subjects for name in subject.classes]
    open_means = {subject.name: float(table.mean_entropy(subject.name)[row]) for subject in subjects}
    drawn = None if one.stratum is None else strata[one.stratum]
    target = max(open_means, key=lambda name: open_means[name]) if drawn is None else drawn[0].name
    shares = {
        subject.name: dict(
            zip(subject.classes, table.share(subject.name)[subject.first :, row].tolist(), strict=True)
        )
        for subject in subjects
    }
    entropy = float(candidates.entropy[one.candidate])
    folder = "_".join([f"{rank:03d}", _file_name(image.name), *map(str, corner)])
    reason = _reason(one, drawn, entropy, shares, candidates)
    return SuggestedBox(rank, image.name, target, box, reason, entropy, shares, folder)


def _reason(
    one: Chosen,
    drawn: tuple[Subject, str] | None,
    entropy: float,
    shares: Mapping[str, Mapping[str, float]],
    candidates: Candidates,
) -> str:
    """Return why a box was chosen, in words."""
    above = int(100 * float((candidates.entropy < entropy).mean()))  # never 100: its own is not below itself
    uncertain = f"mean entropy {entropy:.3f}, above that of {above} % of the candidates"
    if drawn is not None:
        subject, name = drawn
        share = 100 * shares[subject.name][name]
        of = name if name == subject.name else f"{subject.name} {name}"
        what = "uncertain where it may be" if one.by == "entropy" else "drawn by the predicted share of"
        return f"{what} {of} (predicted share {share:.1f} %); {uncertain}"
    return f"{'uncertain' if one.by == 'entropy' else 'drawn at random'}: {uncertain}"


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _painting(subject: Subject) -> dict[str, Any]:
    """Return what the record says of a target's label."""
    form = asdict(subject.form)
    return {
        **form,
        "values": list(form["values"]),
        "classes": list(subject.classes),
        "kind": subject.head.kind,
    }


def describe(found: Suggestions) -> list[tuple[str, ...]]:
    """Return a row per box for a table: rank, volume, box, entropy, reason."""
    return [
        (str(box.rank), box.volume, box_text(box.box), f"{box.entropy:.3f}", box.reason)
        for box in found.boxes
    ]
