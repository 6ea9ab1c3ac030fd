"""Pseudo-labels: what a network is sure of where nobody labelled, by thresholds that the validation part calibrates.

They are written as a data folder of their own: links to the images, `labels/<image>_<target>.zarr`, and
`masks/<image>_<target>.zarr`, which is 1 where a pseudo-label counts. A person's labels are neither copied nor changed;
where they are known the mask is 0, and it is 0 outside of the training part.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from volumen.data.views import stored_box
from volumen.inference.ensemble import run_checkpoint
from volumen.inference.predictor import Predictor, load_predictor
from volumen.suggestion.crops import create_volume, replace_folder
from volumen.suggestion.labelled import HowOpened, LabelledImage, open_images
from volumen.suggestion.request import SuggestRequest
from volumen.suggestion.store import label_geometry, link_volume
from volumen.suggestion.subject import FULL, Subject, find_subjects
from volumen.suggestion.suggest import Tell, open_predictions, predict_images
from volumen.tuning.held_out import experiment_of, split_of
from volumen.utils.boxes import Box
from volumen.utils.device import choose_device
from volumen.utils.errors import VolumenError
from volumen.utils.files.atomic import write_atomically

logger = logging.getLogger(__name__)

RECORD = "pseudo_labels.json"
"""In the folder of pseudo-labels, written last: thresholds, and the share of the voxels that each class has."""
PRECISION = 0.95
"""Share of a class's pseudo-labels that is right on the validation part. The wrong ones are also at most the rest, 5 %,
of the voxels of all other classes: background would else be taken everywhere, as missed objects are few beside it."""
FEWEST = 100
"""Voxels of the validation part from which a precision is estimated."""
_SIDE = {2: 1024, 3: 128}
"""Voxels per axis of a block, a multiple of the chunks that are written."""

Thresholds = dict[int, int | None]
"""Least confidence by class, of `FULL`; None: no confidence is precise enough."""


def write_pseudo_labels(
    run: Path,
    output: Path,
    device: str = "auto",
    *,
    precision: float = PRECISION,
    progress: Tell | None = None,
) -> dict[str, Any]:
    """Predict the images of a run and write pseudo-labels; what an interrupted call has written stays.

    Args:
        run: folder of a trained run with a validation part.
        output: new folder for the pseudo-labels.
        device: auto, cpu, cuda or cuda:N.
        precision: share of the pseudo-labels of each class that is right on the validation part, above 0.
        progress: called with a name, steps done and all steps.

    Returns:
        The content of `RECORD`.

    Raises:
        VolumenError: no validation part, no target that pseudo-labels are possible for, or no class that is predicted
            precisely enough.
    """
    if (output / RECORD).is_file():
        return dict(json.loads((output / RECORD).read_text(encoding="utf-8")))
    checkpoint = run_checkpoint(run)
    predictor = load_predictor(checkpoint, choose_device(device))
    subjects = usable_subjects(predictor)
    config, split = experiment_of(predictor), split_of(checkpoint)
    if not any(split.val.values()):
        raise VolumenError(
            run,
            "has no validation part, on which thresholds are calibrated",
            remedy="set --train-split below 1",
        )
    how = HowOpened.of_config(predictor.config)
    views: dict[str, Any] = {case.name: case.image for case in config.cases}
    part = {
        name: {image: [stored_box(views[image], box) for box in boxes] for image, boxes in found.items()}
        for name, found in (("train", split.train), ("val", split.val))
    }
    images = [
        image
        for image in open_images(config.layout, [subject.form for subject in subjects], how)
        if image.name in {**split.train, **split.val}
    ]
    request = SuggestRequest(checkpoint=str(checkpoint), input="", output=str(output), device=device)
    outputs = predict_images(predictor, images, subjects, request, how, progress)
    predicted = {name: open_predictions(path, subjects) for name, path in outputs.items()}
    thresholds = {
        subject.name: calibrate(subject, images, predicted, part["val"], precision) for subject in subjects
    }
    if all(limit is None for limits in thresholds.values() for limit in limits.values()):
        raise VolumenError(
            run,
            expected=f"a class that is predicted with a precision of {precision:g} on the validation part",
            found="none",
            remedy="train longer, or label more",
        )
    shares: dict[str, dict[str, float]] = {}
    for subject in subjects:
        counts: dict[int, int] = {}
        for image in images:
            boxes = part["train"].get(image.name, [])
            if boxes:
                _write(
                    output,
                    subject,
                    image,
                    predicted[image.name][subject.name],
                    boxes,
                    thresholds[subject.name],
                )
        for image in images:
            for number, count in _written(output, subject, image).items():
                counts[number] = counts.get(number, 0) + count
        total = max(1, sum(counts.values()))
        shares[subject.name] = {
            str(number): counts.get(number, 0) / total for number in thresholds[subject.name]
        }
        logger.info(
            "%s: pseudo-labels of %s",
            subject.name,
            _described(thresholds[subject.name], shares[subject.name]),
        )
    _link_images(output, images)
    record = {
        "run": run.name,
        "precision": precision,
        "thresholds": {
            name: {str(number): None if limit is None else limit / FULL for number, limit in limits.items()}
            for name, limits in thresholds.items()
        },
        "shares": shares,
    }
    write_atomically(output / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    return record


def usable_subjects(predictor: Predictor) -> list[Subject]:
    """Return the targets that have pseudo-labels: one class or exclusive classes, stored in one channel.

    Raises:
        VolumenError: there is none.
    """
    subjects = [subject for subject in find_subjects(predictor, None) if _is_plain(subject)]
    if not subjects:
        raise VolumenError(
            predictor.path,
            expected="a target with one class or exclusive classes",
            found="overlapping ones",
            remedy="train without --rounds; tr_config.unlabelled learns from unlabelled voxels too",
        )
    return subjects


def _is_plain(subject: Subject) -> bool:
    head = subject.head
    return not head.values and (head.channels == 1 or head.activation == "softmax")


def decide(subject: Subject, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of each voxel, uint8 (*space), and its confidence, uint8 (*space), of `FULL`.

    Args:
        subject: the target.
        stored: probabilities uint8 (channels, *space).
    """
    if subject.head.activation == "softmax":
        return stored.argmax(axis=0).astype(np.uint8), stored.max(axis=0)
    inside = stored[0] >= (FULL + 1) // 2
    return inside.astype(np.uint8), np.where(inside, stored[0], FULL - stored[0]).astype(np.uint8)


def calibrate(
    subject: Subject,
    images: Sequence[LabelledImage],
    predicted: Mapping[str, Mapping[str, Any]],
    boxes: Mapping[str, Sequence[Box]],
    precision: float,
) -> Thresholds:
    """Return for each class the least confidence from which on predictions of it are precise enough.

    Args:
        subject: the target.
        images: the labelled images.
        predicted: probabilities by image and target.
        boxes: the validation part by image, in stored voxels.
        precision: required share of right voxels.
    """
    classes = max(2, subject.head.channels)
    counts = np.zeros((classes, FULL + 1, 2), np.int64)
    voxels = np.zeros(classes, np.int64)
    for image in images:
        labelling = image.labels[subject.name]
        for region in itertools.chain.from_iterable(map(blocks, boxes.get(image.name, ()))):
            label, known = labelling.read(region)
            if label is None or not known.any():
                continue
            truth = label[0] if subject.head.activation == "softmax" else (label[0] != 0)
            found, sure = decide(subject, np.asarray(predicted[image.name][subject.name].read(region)))
            right = (found == truth)[known]
            places = (found[known].astype(np.int64) * (FULL + 1) + sure[known]) * 2 + right
            counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
            voxels += np.bincount(truth[known].astype(np.int64), minlength=classes)
    others = voxels.sum() - voxels
    return {
        number: least_confidence(counts[number], precision, int(others[number])) for number in range(classes)
    }


def least_confidence(counts: np.ndarray, precision: float, others: int) -> int | None:
    """Return the least confidence from which on enough voxels are right; None if there is none.

    Args:
        counts: voxels by confidence, wrong and right ones, (FULL + 1, 2).
        precision: required share of right voxels among all that are at least as sure; as many voxels of other classes,
            as a share of these, may be wrong at most.
        others: voxels of other classes.
    """
    above = counts[::-1].cumsum(axis=0)[::-1]
    total = above.sum(axis=1)
    good = (total >= FEWEST) & (above[:, 0] <= (1 - precision) * np.minimum(total, others) + 1e-6)
    return int(good.argmax()) if good.any() else None


def blocks(box: Box) -> Iterator[tuple[slice, ...]]:
    """Yield the parts of a box on a grid of blocks that starts at the volume's origin."""
    side = _SIDE[len(box)]
    axes = [
        [(max(first, start), min(first + side, stop)) for first in range(start - start % side, stop, side)]
        for start, stop in box
    ]
    for spans in itertools.product(*axes):
        yield tuple(slice(*span) for span in spans)


def _write(
    output: Path,
    subject: Subject,
    image: LabelledImage,
    stored: Any,
    boxes: Sequence[Box],
    limits: Thresholds,
) -> None:
    """Write label and mask of an image; the mask last, since it says that both are complete."""
    name = f"{image.name}_{subject.name}.zarr"
    final = [output / kind / name for kind in ("labels", "masks")]
    if all(path.exists() for path in final):
        return
    table = np.full(256, FULL + 1, np.int64)
    for number, limit in limits.items():
        table[number] = FULL + 1 if limit is None else limit
    temporary = [path.with_name(f".{name}.{uuid4().hex[:16]}.tmp") for path in final]
    counts = np.zeros(256, np.int64)
    try:
        arrays = []
        for path in temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays.append(create_volume(path, image.image.shape, np.dtype(np.uint8), label_geometry(image)))
        for region in itertools.chain.from_iterable(map(blocks, boxes)):
            found, sure = decide(subject, np.asarray(stored.read(region)))
            taken = (sure >= table[found]) & ~image.labels[subject.name].read(region)[1]
            if taken.any():
                arrays[0][region] = np.where(taken, found, 0)
                arrays[1][region] = taken.astype(np.uint8)
                counts += np.bincount(found[taken], minlength=256)
        import zarr

        zarr.open_group(temporary[1], mode="r+").attrs["voxels"] = {str(n): int(counts[n]) for n in limits}
        for new, path in zip(temporary, final, strict=True):
            replace_folder(new, path)
    finally:
        for path in temporary:
            shutil.rmtree(path, ignore_errors=True)


def _written(output: Path, subject: Subject, image: LabelledImage) -> dict[int, int]:
    """Return how many voxels of each class have a pseudo-label in an image."""
    import zarr

    path = output / "masks" / f"{image.name}_{subject.name}.zarr"
    if not path.exists():
        return {}
    voxels: Any = zarr.open_group(path, mode="r").attrs["voxels"]
    return {int(number): int(count) for number, count in voxels.items()}


def _described(limits: Thresholds, shares: Mapping[str, float]) -> str:
    return ", ".join(
        f"class {number}: none is precise enough"
        if limit is None
        else f"class {number} from {limit / FULL:.2f} ({shares[str(number)]:.0%} of them)"
        for number, limit in limits.items()
    )


def _link_images(output: Path, images: Sequence[LabelledImage]) -> None:
    """Link to the images, so that the folder opens as a data folder."""
    folder = output / "images"
    folder.mkdir(exist_ok=True)
    present = {path.name.partition(".")[0] for path in folder.iterdir()}
    for image in images:
        if image.name not in present:
            try:
                link_volume(image.files.image, folder, image.name)
            except VolumenError as error:
                logger.debug("%s", error)
