"""Builds the metadata of a trained model according to MONAI's bundle schema."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from volumen.handlers.final_scores import read_scores
from volumen.inference.predictor import Predictor
from volumen.inference.windows.heads import Head
from volumen.sharing.preprocessing import preprocessing_lines
from volumen.transforms.normalize import schemes_of
from volumen.version import __version__

logger = logging.getLogger(__name__)

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
REQUIRED_PACKAGES = (
    "zarr",
    "tifffile",
    "imagecodecs",
    "nibabel",
    "pytorch-ignite",
    "scipy",
    "edt",
    "numba",
    "connected-components-3d",
    "pydantic",
    "annotated-types",
    "filelock",
    "pyyaml",
    "ruamel.yaml",
    "pillow",
    "tqdm",
    "rich",
    "jinja2",
    "argcomplete",
    "fire",
    "jsonschema",
    "tensorboard",
)
CONCATENATED = "pred"
NOT_STATED = "not stated"
_PATH_KEYS = (
    "ckpt_out_base",
    "checkpoint_path",
    "data_path",
    "val_path",
    "val_volumes",
    "split_path",
    "group_by",
    "mask",
)
_FORMATS = {
    "distance": "distance",
    "vector": "vector",
    "axis": "direction",
    "tensor": "tensor",
    "field": "field",
}
_NETWORK_REFERENCES = [
    "Isensee et al. nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation."
    " Nature Methods 18, 203-211 (2021)",
    "Cardoso et al. MONAI: an open-source framework for deep learning in healthcare. arXiv:2211.02701 (2022)",
]


def build_metadata(
    predictor: Predictor,
    *,
    name: str,
    description: str = "",
    authors: str = "",
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
    joined: bool = True,
) -> dict[str, Any]:
    """Return the content of `metadata.json` for a trained network.

    The network's output for MONAI's tools is `pred`: all targets concatenated along channels. `targets` describes each
    single target in the same form. If these were listed as outputs, the Deploy SDK would request each from the network.

    Args:
        predictor: the network and the content of its checkpoint.
        name: the model's name.
        description: purpose of the model; "" for a sentence generated from its targets.
        authors: authors of the model; "" if they are not stated.
        metrics: validation metrics of the checkpoint's epoch.
        training: summary of the training data, see `training_summary`.
        joined: whether the network returns `pred`; otherwise, as in exported files, each target by its name.
    """
    heads = tuple(predictor.targets.values())
    listed = ", ".join(head.name for head in heads)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "changelog": {__version__: f"trained for {predictor.epoch or 0} epochs"},
        "monai_version": _installed("monai"),
        "pytorch_version": _installed("torch"),
        "numpy_version": _installed("numpy"),
        "required_packages_version": {package: _installed(package) for package in REQUIRED_PACKAGES},
        "supported_apps": {},
        "name": name,
        "task": f"Dense prediction of {listed} in {_dims(predictor)}D images",
        "description": description
        or f"One shared encoder predicts {listed} for every voxel of a {_dims(predictor)}D image of any size.",
        "authors": authors or NOT_STATED,
        "copyright": f"Copyright {authors}" if authors else NOT_STATED,
        "data_source": NOT_STATED,
        "data_type": "zarr, OME-Zarr, TIFF, NIfTI",
        "image_classes": f"channels: {predictor.in_channels}; {'; '.join(preprocessing_lines(predictor))}",
        "label_classes": "; ".join(_labels(head) for head in heads if head.is_probability),
        "pred_classes": "; ".join(meaning(head, predictor.config) for head in heads),
        "eval_metrics": dict(metrics or {}),
        "intended_use": "Research. Not a medical device.",
        "references": list(_NETWORK_REFERENCES),
        "network_data_format": {
            "inputs": {"image": _input(predictor)},
            "outputs": joined_output(predictor) if joined else target_outputs(predictor),
        },
        "targets": target_outputs(predictor),
        "inference": inference_facts(predictor),
        "training": dict(training or {}),
    }


def joined_output(predictor: Predictor) -> dict[str, Any]:
    """Return MONAI's description of the output of the bundle's `network_def`, a tensor of all targets."""
    heads = tuple(predictor.targets.values())
    channels = [f"{head.name}: {text}" for head in heads for text in channel_names(head, predictor.config)]
    kinds = {_format(head) for head in heads}
    kind = kinds.pop() if len(kinds) == 1 else "multitarget"
    return {CONCATENATED: _tensor(kind, channels, spatial_pattern(predictor.divisor))}


def target_outputs(predictor: Predictor) -> dict[str, Any]:
    """Return MONAI's description of each target's tensor."""
    shape = spatial_pattern(predictor.divisor)
    return {
        head.name: _tensor(_format(head), channel_names(head, predictor.config), shape)
        for head in predictor.targets.values()
    }


def spatial_pattern(divisor: tuple[int, ...]) -> list[str]:
    """Return MONAI's patterns, in n, of the valid input sizes: multiples of `divisor`, at least twice the divisor.

    With the divisor itself, the last stage would have a single voxel, over which normalisation is impossible.
    """
    return [f"{step}*(n+1)" for step in divisor]


def channel_names(head: Head, config: Mapping[str, Any]) -> list[str]:
    """Return the meaning of each channel of a head's output."""
    if head.layout is not None and any(part.kind != "scalars" for part in head.layout):
        names = [name for part in head.layout for name in part.names()]
        return [f"logit of {name}" for name in names] if head.is_probability else names
    if head.kind == "distance" and head.channels == 1:
        return [f"{_distance(head.name, config)}, in units of the smallest voxel side"]
    if head.kind == "multiclass":
        return ["logit of background", *(f"logit of class {k}" for k in range(1, head.channels))]
    if head.is_probability:
        return ["logit"] if head.channels == 1 else _numbered("logit of label", head.channels)
    return ["value"] if head.channels == 1 else _numbered("value", head.channels)


def inference_facts(predictor: Predictor) -> dict[str, Any]:
    """Return the facts that another program needs to use the network, as plain values."""
    return {
        "patch_size": list(predictor.patch_size),
        "divisor": list(predictor.divisor),
        "padding": "reflect",
        "spacing": None if predictor.spacing is None else list(predictor.spacing),
        "unit": predictor.unit,
        "orientation": predictor.orientation,
        "axes": "zyx"[-_dims(predictor) :],
        "normalization_scheme": _scheme(predictor),
        "preprocessing": preprocessing_lines(predictor),
        "intensity_properties": without_paths(
            dict(predictor.config.get("dataset_config", {}).get("intensity_properties") or {})
        ),
        "targets": {
            head.name: {"channels": head.channels, "kind": head.kind, "activation": head.activation}
            for head in predictor.targets.values()
        },
    }


def training_summary(predictor: Predictor, run_folder: Path) -> dict[str, Any]:
    """Return a summary of the training data without paths: volumes, voxels, settings.

    Args:
        predictor: the network.
        run_folder: folder of the run; its `*_split.json` is read if it exists.
    """
    config = predictor.config
    training = config.get("tr_config", {})
    summary: dict[str, Any] = {
        "epochs": predictor.epoch,
        "patch_size": list(predictor.patch_size),
        "batch_size": training.get("batch_size"),
        "optimizer": training.get("optimizer"),
        "learning_rate": training.get("initial_lr"),
        "seed": config.get("tr_setup", {}).get("seed"),
        "format": config.get("dataset_config", {}).get("format"),
        "targets": sorted(config.get("dataset_config", {}).get("targets", {})),
        "auxiliary_tasks": {name: task["type"] for name, task in config.get("auxiliary_tasks", {}).items()},
    }
    split = _read_split(run_folder, config.get("tr_setup", {}).get("model_name"))
    for part in ("train", "val"):
        regions = split.get(part)
        if isinstance(regions, dict):
            voxels = sum(math.prod(b - a for a, b in box) for boxes in regions.values() for box in boxes)
            summary[part] = {"volumes": sorted(Path(case).name for case in regions), "voxels": voxels}
    return summary


def find_preview(run_folder: Path, predictor: Predictor) -> Path | None:
    """Return the latest preview of the run that saved a checkpoint; None if there is none."""
    model_name = predictor.config.get("tr_setup", {}).get("model_name", "model")
    pictures = (run_folder / f"{model_name}_debug{suffix}" for suffix in (".gif", ".png"))
    return next((picture for picture in pictures if picture.is_file()), None)


def read_metrics(run_folder: Path, epoch: int | None) -> dict[str, float]:
    """Return the validation metrics of an epoch: those on the whole validation part if the run has them, else those
    of its row in `metrics.csv`; an empty result if there is no such row.

    Losses are excluded, since they depend on the settings of the training and cannot be compared.
    """
    path = run_folder / "metrics.csv"
    if epoch is None or not path.is_file():
        return {}
    whole = read_scores(run_folder).get(epoch)
    if whole is not None:
        return {name: value for name, value in whole["metrics"].items() if not name.startswith("loss")}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("epoch") == str(epoch)]
    if not rows:
        return {}
    return dict(_metrics(rows[-1]))


def without_paths(value: Any) -> Any:
    """Return nested plain data with paths replaced by None, since paths are private.

    Settings that name files, and those that choose a part of the data, are always cleared; all others are cleared if
    they contain an absolute path.
    """
    if isinstance(value, Mapping):
        return {
            key: None if key in _PATH_KEYS and isinstance(item, str | list) else without_paths(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and _is_absolute(value):
        return None
    return value


def to_json(content: Mapping[str, Any]) -> str:
    """Return JSON text that any parser can read: without NaN and infinity."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_absolute(text: str) -> bool:
    return (
        text.startswith(("~", "file:"))
        or PurePosixPath(text).is_absolute()
        or PureWindowsPath(text).is_absolute()
    )


def _metrics(row: Mapping[str, str | None]) -> Iterator[tuple[str, float]]:
    for column, text in row.items():
        if not text or not column.startswith("val/") or column.startswith("val/loss"):
            continue
        value = float(text)
        if math.isfinite(value):
            yield column.removeprefix("val/"), value


def _read_split(run_folder: Path, model_name: str | None) -> dict[str, Any]:
    path = run_folder / f"{model_name}_split.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        logger.warning("%s: not readable, left out of the summary", path)
        return {}
    return content if isinstance(content, dict) else {}


def _input(predictor: Predictor) -> dict[str, Any]:
    names = ["image"] if predictor.in_channels == 1 else _numbered("channel", predictor.in_channels)
    scaled = set(schemes_of(_scheme(predictor))) <= {"unit", "percentile"}
    return {
        "type": "image",
        "format": "magnitude",
        "modality": "n/a",
        "num_channels": predictor.in_channels,
        "spatial_shape": spatial_pattern(predictor.divisor),
        "dtype": "float32",
        "value_range": [0, 1] if scaled else [],
        "is_patch_data": True,
        "channel_def": {str(number): name for number, name in enumerate(names)},
    }


def _tensor(kind: str, channels: list[str], shape: list[str]) -> dict[str, Any]:
    return {
        "type": "image",
        "format": kind,
        "num_channels": len(channels),
        "spatial_shape": list(shape),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(number): text for number, text in enumerate(channels)},
    }


def _format(head: Head) -> str:
    return _FORMATS.get(head.kind, "segmentation")


def _labels(head: Head) -> str:
    if head.kind == "multiclass":
        return f"{head.name}: {', '.join(map(str, range(head.channels)))}, 0 is the background"
    return f"{head.name}: 1 where it is, 0 elsewhere"


def meaning(head: Head, config: Mapping[str, Any]) -> str:
    """Return the meaning of a head's activated output, in one line."""
    if head.kind == "binary":
        return f"{head.name}: probability, by a sigmoid of the logit"
    if head.kind == "multiclass":
        return f"{head.name}: {head.channels} classes with background, by a softmax of the logits"
    if head.kind == "multilabel":
        return f"{head.name}: {head.channels} labels, by a sigmoid of each logit"
    if head.kind == "distance":
        return f"{head.name}: {_distance(head.name, config)}"
    if head.kind == "vector":
        return f"{head.name}: vector (x, y{', z' if head.channels == 3 else ''})"
    if head.kind == "axis":
        return f"{head.name}: direction without sign (x, y{', z' if head.channels == 3 else ''})"
    if head.kind == "tensor":
        return f"{head.name}: symmetric tensor ({', '.join(channel_names(head, config))})"
    return f"{head.name}: {head.channels} value(s)"


def _distance(name: str, config: Mapping[str, Any]) -> str:
    task = config.get("auxiliary_tasks", {}).get(name, {})
    if task.get("type") != "distance_transform":
        return f"distance ({task.get('type', 'regression')})"
    sides = {"inside": "distance to the boundary, 0 outside", "outside": "distance to the boundary, 0 inside"}
    signed = "signed distance to the boundary, negative inside"
    return sides.get(task.get("distance_type", "signed"), signed)


def _numbered(word: str, count: int) -> list[str]:
    return [f"{word} {number}" for number in range(count)]


def _dims(predictor: Predictor) -> int:
    return len(predictor.patch_size)


def _scheme(predictor: Predictor) -> str | list[str]:
    return predictor.config.get("dataset_config", {}).get("normalization_scheme", "unit")


def _installed(package: str) -> str:
    """Return a package's version without the local build tag (2.13.0+cpu), which cannot be installed elsewhere."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "any"
