"""Pairs predictions with labels, and determines how each is interpreted."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from volumen.data.formats.label_view import RegionLabel
from volumen.data.labels.label_channels import region_representatives
from volumen.data.placement import aligned_to_grid, common_spacings, refuse_impossible
from volumen.data.space.geometry import Geometry
from volumen.evaluation.cases import PIECE_VOXELS, ScoredCase, image_of
from volumen.evaluation.request import EvaluateRequest
from volumen.inference.jobs import image_paths, is_stack, volume_name
from volumen.inference.output.block_log import STATE_FOLDER, read_provenance
from volumen.inference.output.ome_zarr import find_target
from volumen.inference.windows.heads import PROBABILITIES
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.evaluation.derived_truth import DerivedTruth

logger = logging.getLogger(__name__)

MANY_LABELS = 255
"""A label map without a record is interpreted as instances if it has more values than this."""


WHITE = 255
"""Foreground in a black-and-white picture; not a class, and not the number of an instance."""


@dataclass(frozen=True)
class Pairs:
    """Predictions with their labels, and the names of those without a counterpart; see `Evaluation`."""

    cases: list[ScoredCase]
    unpredicted: tuple[str, ...]
    unlabelled: tuple[str, ...]


def find_cases(request: EvaluateRequest) -> list[ScoredCase]:
    """Return the predictions with their labels, see `find_pairs`."""
    return find_pairs(request).cases


def find_pairs(request: EvaluateRequest) -> Pairs:
    """Pair predictions with labels.

    Raises:
        VolumenError: there is no pair, or the shapes of a pair differ.
    """
    for path in (request.predictions, request.labels, request.masks):
        if path is not None and "://" not in path and not Path(path).exists():
            raise VolumenError(path, "no such file or folder")
    predictions = find_predictions(Path(request.predictions))
    folder = _labels_folder(Path(request.labels))
    predictions, labels = _join_slices(
        request.predictions, str(folder), predictions, _volumes_by_name(folder)
    )
    masks = _masks(request, folder)
    beside = folder.parent / "images"
    images = _volumes_by_name(beside) if beside.is_dir() else {}
    # A single label of a single prediction may have any name.
    sources = {found.source for found in predictions}
    names = {found.name for found in predictions}
    alone = next(iter(labels.values())) if len(labels) == 1 and len(names) == 1 else None
    only_source = next(iter(sources)) if len(sources) == 1 else None
    only_mask = _only_mask(request, masks) if len(names) == 1 else None
    cases, unlabelled, used = [], [], set()
    predictions = [
        found for found in predictions if request.targets is None or found.target in request.targets
    ]
    for found in predictions:
        label_name, source = f"{found.name}_{found.target}", found.source
        path = labels.get(label_name) if found.is_label else None
        if path is None:
            label_name = f"{found.name}_{source}"
            path = labels.get(label_name)
            if path is None and source == only_source:
                path = _named_as_image(found.name, labels) or alone
        if path is None:
            unlabelled.append(label_name)
            continue
        used.add(path)
        named = (masks[name] for name in (label_name, f"{found.name}_mask", found.name) if name in masks)
        mask = next(named, only_mask)
        cases.append(_pair(found, path, mask, request, images.get(found.name)))
    if not cases:
        raise VolumenError(
            request.labels,
            expected=f"labels named like {predictions[0].name}_{predictions[0].target}",
            found=", ".join(sorted(labels)[:3]) or "none",
        )
    _warn_of_missing_masks(request, cases, masks)
    targets = {found.source for found in predictions}
    unpredicted = [
        name for name, path in labels.items() if path not in used and image_of(name, targets) is not None
    ]
    return Pairs(_in_one_unit(agreed(cases)), tuple(sorted(unpredicted)), tuple(sorted(set(unlabelled))))


def _named_as_image(name: str, labels: Mapping[str, str]) -> str | None:
    """Return the label that has its image's name, as nnU-Net's CASE.nii.gz of the image CASE_0000.nii.gz."""
    return labels.get(name) or labels.get(name.removesuffix("_0000"))


def _in_one_unit(cases: list[ScoredCase]) -> list[ScoredCase]:
    """Convert the voxel sizes of all cases to the unit of the first."""
    if all(case.spacing is None for case in cases):
        return cases
    names = [case.prediction.path for case in cases]
    sizes, unit = common_spacings(
        names, [case.spacing for case in cases], [case.unit for case in cases], "--spacing"
    )
    return [replace(case, spacing=size, unit=unit) for case, size in zip(cases, sizes, strict=True)]


def _stated(image: Geometry, volumes: Sequence[Volume]) -> Geometry:
    """Return the first geometry with a voxel size: the image's, else that of a volume.

    Raises:
        VolumenError: a volume states an impossible size.
    """
    if image.spacing is not None:
        return image
    for volume in volumes:
        refuse_impossible(volume, "correct the file, or give --spacing")
        if volume.geometry.spacing is not None:
            return volume.geometry
    return Geometry()


def _masks(request: EvaluateRequest, labels: Path) -> dict[str, str]:
    """Return the paths of the masks by name: those that the request names, else those beside the labels."""
    folder = Path(request.masks) if request.masks else labels.parent / "masks"
    return _volumes_by_name(folder) if request.masks or folder.is_dir() else {}


def _only_mask(request: EvaluateRequest, masks: Mapping[str, str]) -> str | None:
    """Return the mask of a single image, which may have any name: the only one in the request, or its slices."""
    if request.masks and is_stack(request.masks):
        return request.masks
    return next(iter(masks.values())) if request.masks and len(masks) == 1 else None


def _warn_of_missing_masks(
    request: EvaluateRequest, cases: Sequence[ScoredCase], masks: Mapping[str, str]
) -> None:
    """Warn of cases without a mask if the request names masks.

    Raises:
        VolumenError: no case has a mask.
    """
    without = [f"{case.name}_{case.target}" for case in cases if case.mask is None]
    if request.masks is None or not without:
        return
    if len(without) == len(cases):
        raise VolumenError(
            request.masks,
            expected=f"masks named like {without[0]}, {cases[0].name}_mask or {cases[0].name}",
            found=", ".join(sorted(masks)[:3]) or "none",
        )
    logger.warning("%s: no mask for %s, scored everywhere", request.masks, ", ".join(without))


def _join_slices(
    source: str, folder: str, predictions: list[Found], labels: dict[str, str]
) -> tuple[list[Found], dict[str, str]]:
    """Interpret a folder of slices as one volume, unless its files are 2D images with a label each.

    Args:
        source: folder of the predictions.
        folder: folder of the labels.
        predictions: the predictions in `source`, one per slice if it is a folder of slices.
        labels: paths of the labels in `folder` by name, likewise.
    """
    from volumen.data.formats.opening import open_volume

    paired = any(f"{found.name}_{found.target}" in labels for found in predictions)
    numbered = all(found.target.isdigit() for found in predictions)  # "scan_001": no target called 001
    recorded = any(found.recipe for found in predictions)
    if len(predictions) > 1 and not recorded and (numbered or not paired) and is_stack(source):
        predictions = [_unrecorded(source)]
    elif paired:
        return predictions, labels
    alone = len({found.name for found in predictions}) == 1
    if alone and is_stack(folder) and len(open_volume(predictions[0].path, labels=True).shape) == 3:
        labels = {volume_name(folder): folder}
    return predictions, labels


def agreed(cases: list[ScoredCase]) -> list[ScoredCase]:
    """Give all label maps of a target the same kind and number of classes, also those that lack some classes."""
    most = {
        case.target: max(
            (other.kind != "binary", other.channels) for other in cases if other.target == case.target
        )
        for case in cases
    }
    kinds = {case.target: case.kind for case in cases if case.kind != "binary"}
    return [
        replace(case, kind=kinds[case.target], channels=most[case.target][1])
        if case.kind in ("binary", "multiclass") and case.target in kinds
        else case
        for case in cases
    ]


@dataclass(frozen=True)
class Found:
    """A predicted target of an image: its path, and the record of its prediction."""

    name: str
    target: str
    path: str
    recipe: Mapping[str, Any] | None = None

    @property
    def entry(self) -> Mapping[str, Any]:
        """The entry of the target in the record; empty without a record."""
        return self.recipe["targets"][self.target] if self.recipe else {}

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings of the network's training; empty without a record."""
        return self.recipe.get("made_of", {}) if self.recipe else {}

    @property
    def task(self) -> Mapping[str, Any] | None:
        """The task of a derived target, or None for a labelled target."""
        return self.config.get("auxiliary_tasks", {}).get(self.target)

    @property
    def source(self) -> str:
        """The labelled target that provides the truth."""
        if self.entry.get("kind") == "instances" and self.recipe is not None:
            rules = self.recipe["instances"]
            head = rules["foreground"] or rules["affinities"] or rules["boundary"]
            return str(self.config.get("auxiliary_tasks", {}).get(head, {}).get("source_target", head))
        return str(self.task["source_target"]) if self.task else self.target

    @property
    def is_label(self) -> bool:
        """Whether a label with the name of the target may be the truth."""
        return self.task is None


def find_predictions(path: Path) -> list[Found]:
    """Return the predicted targets under a path that can have a truth.

    Raises:
        VolumenError: there are none.
    """
    found: list[Found] = []
    if read_provenance(path) is not None or (path / STATE_FOLDER).is_dir():
        found = _of_group(path)
    elif path.is_file():
        found = [_unrecorded(str(path))]
    elif path.is_dir():
        records = sorted(path.glob("*.volumen.json"))
        recorded: set[str] = set()
        for record in records:
            content = json.loads(record.read_text())
            name = record.name[: -len(".volumen.json")]
            for target, file in zip(content["recipe"]["targets"], content["files"], strict=True):
                recorded.add(str(path / file))
                found.append(Found(name, target, str(path / file), content["recipe"]))
        for image in image_paths(str(path)):
            if image in recorded:
                continue
            group = _of_group(Path(image))
            found += group or [_unrecorded(image)]
    found = [item for item in found if _has_truth(item)]
    if not found:
        raise VolumenError(
            path,
            "no prediction found that a label could be compared with",
            remedy="give the output of volumen predict",
        )
    return found


def _of_group(path: Path) -> list[Found]:
    if (path / STATE_FOLDER).is_dir():
        raise VolumenError(
            path, "the prediction is not finished", remedy="give the same volumen predict command again"
        )
    recipe = read_provenance(path)
    if recipe is None:
        return []
    name = volume_name(recipe["input"]["path"])
    return [Found(name, target, str(find_target(path, target)), recipe) for target in recipe["targets"]]


def _has_truth(item: Found) -> bool:
    kind = item.entry.get("kind", "binary")
    return item.task is not None or kind in (*PROBABILITIES, "instances") or _instance_mode(item) is not None


def _instance_mode(item: Found) -> str | None:
    targets = item.config.get("dataset_config", {}).get("targets", {})
    return targets.get(item.source, {}).get("instances")


def _unrecorded(path: str) -> Found:
    """Return the image and target of a volume without a record, from its name `<image>_<target>`."""
    stem = volume_name(path)
    name, _, target = stem.rpartition("_")
    return Found(name, target, path) if name and target else Found(stem, "label", path)


def _labels_folder(path: Path) -> Path:
    found = (path / name for name in ("labels", "labelsTr") if (path / name).is_dir())
    return next(found, path)


def _volumes_by_name(path: Path) -> dict[str, str]:
    return {volume_name(entry): entry for entry in image_paths(str(path))}


def _pair(
    found: Found, label_path: str, mask_path: str | None, request: EvaluateRequest, beside: str | None
) -> ScoredCase:
    """Return a case; `beside` is the image of a prediction without a record, which the report shows."""
    from volumen.data.labels.label_channels import label_rule, open_label, open_mask_file
    from volumen.data.layout import fit_label

    prediction = _open_prediction(found)
    ndim = len(prediction.shape)
    source = found.config.get("dataset_config", {}).get("targets", {}).get(found.source, {})
    rule = label_rule(found.source, source)
    label = open_label(label_path, ndim=ndim, rule=rule)
    if rule.regions and not found.task and prediction.channels == 1 and len(rule.regions) > 1:
        prediction = RegionLabel(prediction, _predicted_values(source, rule.regions))
    _log_remark(label)
    region = tuple(slice(0, n) for n in label.shape)
    entry: Mapping[str, Any] = {}
    target: Mapping[str, Any] = {}
    image = beside
    if found.recipe is not None:
        entry = found.recipe["targets"][found.target]
        region = tuple(slice(start, stop) for start, stop in found.recipe["region"])
        target = source
        image = found.recipe["input"].get("array") or found.recipe["input"]["path"]
        whole = tuple(found.recipe["input"]["shape"])
    else:
        whole = prediction.shape
    place = _place(found, prediction, region)
    # Who gives the voxel size says that the files' own geometry is not to be trusted.
    remedy = None if request.spacing else "give --spacing to compare them voxel by voxel"
    label = aligned_to_grid(label, place, whole, found.path, remedy=remedy)
    if label.shape != whole:
        raise VolumenError(
            label_path,
            expected=f"shape {whole}, as the prediction's image",
            found=label.shape,
            remedy="predict the image of this label",
        )
    mask = None if mask_path is None else fit_label(label, open_mask_file(mask_path, ndim=ndim), mask=True)
    ignore = target.get("ignore_label") if request.ignore_label is None else request.ignore_label
    kind, channels, scale = _reading(found, entry, prediction)
    predicted = channels
    if kind == "multiclass" and found.recipe is None and not scale:
        channels = max(channels, _classes_of(label, ignore))
    numbers = found.target in request.instances and kind in ("binary", "multiclass")
    if numbers or (kind == "multiclass" and found.recipe is None and _number_instances(label, predicted)):
        kind, channels = "instances", 1
    elif found.recipe is None and kind == "binary" and not scale:
        _warn_of_many_values(label, found, ignore)
    # If the recorded image states no voxel size, the prediction's own is a default and must not be used.
    others = (label,) if found.recipe and "geometry" in found.recipe["input"] else (prediction, label)
    stated = Geometry(request.spacing) if request.spacing else _stated(place, others)
    spacing = stated.spacing or (1.0,) * ndim
    classes = None if found.task else target.get("classes")
    return ScoredCase(
        found.name, found.target, kind, prediction, label, mask, region, channels, scale,
        ignore=ignore, image=image, classes=tuple(classes) if classes else None,
        source=found.source if found.task else None,
        labelled_only=bool(found.config.get("tr_setup", {}).get("compute_loss_on_labeled_only")),
        truth=None if kind == "instances" else _derivation(found, target, tuple(spacing)),
        spacing=stated.spacing, unit=stated.unit, model=_model_of(found.recipe),
        size_is_given=request.spacing is not None,
    )  # fmt: skip


def _predicted_values(source: Mapping[str, Any], regions: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return which values of a predicted label map belong to each region.

    A voxel holds the value of the last region in it; it belongs to every region that has the label that stands for
    that one.
    """
    shown, labels = source.get("region_values") or (), region_representatives(regions)
    return [
        [value for value, label in zip(shown or labels, labels, strict=True) if label in own]
        for own in regions
    ]


def _place(found: Found, prediction: Volume, region: Sequence[slice]) -> Geometry:
    """Return the geometry of the predicted image: as recorded (OME-Zarr stores no flips), else the prediction's."""
    recorded = found.recipe["input"].get("geometry") if found.recipe else None
    if recorded is not None:
        return Geometry.from_plain(recorded)
    return prediction.geometry.moved([-part.start for part in region])


def _open_prediction(found: Found) -> Volume:
    """Open a prediction; label maps of other programs are read like labels, including grey values saved as RGB."""
    from volumen.data.formats.opening import open_volume
    from volumen.data.labels.label_channels import LabelRule, one_channel

    prediction = open_volume(found.path, labels=found.recipe is None)
    if found.recipe is None and np.issubdtype(prediction.dtype, np.integer):
        prediction = one_channel(prediction, LabelRule(f"targets.{found.target}"))
        _log_remark(prediction)
    return prediction


def _log_remark(volume: Volume) -> None:
    if remark := getattr(volume, "remark", ""):
        logger.warning("%s: %s", volume.path, remark)


def _number_instances(label: Volume, channels: int) -> bool:
    """Whether label maps without a record number instances: they have many values, or each value is one component."""
    from volumen.config.detection import LEAST_INSTANCES
    from volumen.data.labels.instance_labels import look_like_instances

    if channels > MANY_LABELS:
        return True
    if channels <= LEAST_INSTANCES or label.channels > 1 or not look_like_instances([label]):
        return False
    logger.warning(
        "%s: each of its values is one connected piece, so they are scored as instances; give a model's prediction "
        "with its record if they are classes",
        label.path,
    )
    return True


def _warn_of_many_values(label: Volume, found: Found, ignore: int | None) -> None:
    """Warn if a label has several values, but the label map that is scored against it has one."""
    highest = max(int(np.where(block == ignore, 0, block).max()) for block in map(label.read, _slabs(label)))
    if 1 < highest < WHITE:
        logger.warning(
            "%s: values up to %d, but the prediction %s has 0 and 1 only: all above 0 count as foreground",
            label.path, highest, found.path,
        )  # fmt: skip


def _model_of(recipe: Mapping[str, Any] | None) -> str | None:
    """Return the model of a prediction's record: the end of its path, which names the run, and its epoch."""
    model = (recipe or {}).get("model", {})
    if not model.get("path"):
        return None
    name = "/".join(Path(model["path"]).parts[-2:])
    return name if model.get("epoch") is None else f"{name} (epoch {model['epoch']})"


def _derivation(found: Found, source: Mapping[str, Any], spacing: tuple[float, ...]) -> DerivedTruth | None:
    """Return the derivation of the truth from the source's label, or None if the label is the truth."""
    from volumen.evaluation.derived_truth import DerivedTruth

    mode = source.get("instances")
    if found.task is None and mode in (None, "foreground"):
        return None
    return DerivedTruth(found.target, found.task, mode, source.get("kind", "binary") == "binary", spacing)


def _reading(found: Found, entry: Mapping[str, Any], prediction: Volume) -> tuple[str, int, float]:
    """Return (kind, channels, divisor of stored values or 0 for labels)."""
    if found.recipe is not None:
        labels = found.recipe["dtype"] == "labels" or found.recipe["threshold"] is not None
        if entry["kind"] == "instances":
            return "instances", 1, 0.0
        if entry["kind"] not in PROBABILITIES:
            return entry["kind"], int(entry["channels"]), 1.0
        # Heads from which instances were computed are stored as probabilities even if the others are labels.
        labels = labels and found.target not in (found.recipe.get("instances") or {}).values()
        scale = 0.0 if labels else (255.0 if entry["dtype"] == "uint8" else 1.0)
        return entry["kind"], int(entry["channels"]), scale
    if np.issubdtype(prediction.dtype, np.floating):
        return ("multiclass", prediction.channels, 1.0) if prediction.channels > 1 else ("binary", 1, 1.0)
    highest = max(int(prediction.read(box).max()) for box in _slabs(prediction))
    if highest == WHITE and all(
        np.isin(prediction.read(box), (0, WHITE)).all() for box in _slabs(prediction)
    ):
        return "binary", 1, 0.0
    return ("binary", 1, 0.0) if highest <= 1 else ("multiclass", highest + 1, 0.0)


def _classes_of(label: Volume, ignore: int | None) -> int:
    """Return one more than a label's highest class; values from `WHITE` on are no classes.

    A class that only the label has is counted too, since the prediction misses it.
    """
    from volumen.data.index.label_values import label_values

    values = set(label_values(label)) - {ignore}
    return 1 + max((value for value in values if value < WHITE), default=0)


def _slabs(volume: Volume) -> Iterator[tuple[slice, ...]]:
    depth = max(1, PIECE_VOXELS // max(1, math.prod(volume.shape[1:])))
    for start in range(0, volume.shape[0], depth):
        stop = min(start + depth, volume.shape[0])
        yield (slice(start, stop), *(slice(0, n) for n in volume.shape[1:]))
