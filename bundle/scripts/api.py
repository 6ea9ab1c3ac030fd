"""The Python calls behind `import volumen`: train, predict, evaluate and derive, with folders or with arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volumen.evaluation.cases import Evaluation
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate as _evaluate
from volumen.inference.array_prediction import predict_prepared_array
from volumen.inference.ensemble import load_model
from volumen.inference.predict import predict as _predict
from volumen.inference.predictor import Predictor
from volumen.inference.predictor import predict_array as _predict_array
from volumen.inference.request import PredictReport, PredictRequest
from volumen.utils.errors import VolumenError

__all__ = ["derive", "evaluate", "load", "predict", "predict_array", "train"]

PathName = str | os.PathLike[str]
Settings = Mapping[str, Mapping[str, Any]]


def train(
    data: PathName | Sequence[PathName] | None = None,
    output: PathName = "runs",
    settings: Settings | None = None,
    *,
    images: Mapping[str, Any] | None = None,
    labels: Mapping[str, Mapping[str, Any]] | None = None,
    masks: Mapping[str, Mapping[str, Any]] | None = None,
    spacing: Sequence[float] | None = None,
    device: str = "auto",
    handlers: Sequence[Any] = (),
) -> Path:
    """Train on a data folder, or on arrays in memory.

    Args:
        data: folder with `images/`, `labels/<image>_<target>` and, optionally, `masks/`, or several. None: the arrays
            below.
        output: folder for the run, which goes to `<output>/<model_name>`.
        settings: any part of the experiment's sections, as an experiment file holds them.
        images: arrays by name, (Z, Y, X) or (Y, X), or with channels first, (C, Z, Y, X); any object with `shape`,
            `dtype` and slicing, such as a zarr or dask array. Nothing is copied.
        labels: for each image's name its integer arrays by target, each of the image's spatial shape.
        masks: for each image's name its arrays by target, where the loss counts (not 0); without one everywhere.
        spacing: voxel size per spatial axis of the arrays; None: unknown, taken as 1.
        device: "auto", "cpu", "cuda" or "cuda:N".
        handlers: Ignite handlers, objects with `attach(engine)`, which come after the trainer's own.

    Returns:
        Folder of the run.

    Raises:
        VolumenError: data that do not fit each other, or a wrong setting.
    """
    from volumen.data.arrays import cases_from_arrays
    from volumen.run import train_on_cases, train_on_folder

    if (data is None) == (images is None):
        raise VolumenError(
            "train", expected="a data folder or images=", found="both" if images else "neither"
        )
    if images is None:
        assert data is not None
        for name, given in (("labels", labels), ("masks", masks), ("spacing", spacing)):
            if given is not None:
                raise VolumenError(
                    f"train: {name}", "belongs to images=", remedy="leave it out with a data folder"
                )
        return train_on_folder(data, output, settings, device=device, handlers=handlers)

    def cases(targets: Sequence[str] | None, allow_unlabeled: bool, rules: Any) -> Any:
        return cases_from_arrays(
            images,
            labels or {},
            masks or {},
            spacing=spacing,
            targets=targets,
            allow_unlabeled=allow_unlabeled,
            rules=rules,
        )

    return train_on_cases(cases, output, settings, device=device, handlers=handlers)


def load(checkpoint: PathName | Sequence[PathName], device: str = "cpu") -> Predictor:
    """Load a trained network with everything that its checkpoint says about using it.

    Args:
        checkpoint: a `.pth` file of a run, the `model.pt` of a bundle, or the folder of a run, of which folds are
            averaged; several of them are averaged too. A folder of nnU-Net v2's results works as well.
        device: torch device on which the network goes.

    Raises:
        VolumenError: no such file, not a checkpoint, or members that differ in targets or channels.
    """
    return load_model(_paths(checkpoint), device)


def _paths(checkpoint: PathName | Sequence[PathName]) -> str | tuple[str, ...]:
    if isinstance(checkpoint, str | os.PathLike):
        return os.fspath(checkpoint)
    return tuple(os.fspath(path) for path in checkpoint)


def predict(
    image: PathName, checkpoint: PathName | Sequence[PathName], output: PathName, **settings: Any
) -> PredictReport:
    """Predict an image file or every image of a folder, streamed from file to file.

    Args:
        image: an image or a folder of images.
        checkpoint: the trained network, or several, which are averaged; see `load`.
        output: `NAME.zarr`, `NAME.tif` or `NAME.nii.gz` for one image; a folder for several.
        settings: further fields of `PredictRequest`, such as `overlap` or `tta`.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    return _predict(PredictRequest(str(image), _paths(checkpoint), str(output), **settings))


def predict_array(
    predictor: Predictor | PathName, image: np.ndarray, **settings: Any
) -> dict[str, np.ndarray]:
    """Predict an image in memory.

    Args:
        predictor: what `load` returned, or the path of a checkpoint.
        image: raw image, (Z, Y, X) or (Y, X), or with channels first, (C, Z, Y, X).
        settings: `targets`, `patch_size`, `overlap`, `batch_size`, `precision` and `spacing` of
            `volumen.inference.predictor.predict_array`.

    Returns:
        Per target a float32 array (K, *space): probabilities, unit vectors, distances or tensors.

    Raises:
        VolumenError: an image of another number of axes or channels than the network takes.
    """
    model = predictor if isinstance(predictor, Predictor) else load_model(os.fspath(predictor))
    ndim = len(model.patch_size)
    array = np.asarray(image)
    if array.ndim == ndim:
        array = array[None]
    if array.ndim != ndim + 1 or array.shape[0] != model.in_channels:
        raise VolumenError(
            "image",
            expected=f"{model.in_channels} channel(s) first and {ndim} spatial axes",
            found=f"shape {np.shape(image)}",
        )
    if model.preparation is not None:
        return predict_prepared_array(model, array, **settings)
    return _predict_array(model, array, **settings)


def evaluate(predictions: PathName, labels: PathName, output: PathName, **settings: Any) -> Evaluation:
    """Score predictions against labels.

    Args:
        predictions: output of a prediction, or a folder of them.
        labels: folder with `<image>_<target>`, a data folder, or one label volume.
        output: folder named in the request; `volumen.evaluation.html.report` writes the report there.
        settings: further fields of `EvaluateRequest`, such as `metrics` or `tolerance`.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    return _evaluate(EvaluateRequest(str(predictions), str(labels), str(output), **settings))


def derive(
    label: np.ndarray,
    task: str,
    *,
    mask: np.ndarray | None = None,
    spacing: Sequence[float] | None = None,
    instances: bool = False,
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Derive a target from a whole label volume, as the training derives it from patches.

    Args:
        label: integers, (Z, Y, X) or (Y, X); 0 is background.
        task: type of the derived target, such as "distance_transform" or "surface_normals" (docs/targets.md).
        mask: where the label is known (not 0), of the label's shape; None: everywhere.
        spacing: voxel size per axis; distances are in its unit. None: 1.
        instances: whether the label numbers instances: what touches is apart.
        settings: keys of the task's type, such as `distance_type="inside"`.

    Returns:
        Values float32 (C, *space), and bool (1, *space) where they are defined.

    Raises:
        VolumenError: no such type of task, or a wrong key.

    >>> import numpy as np, volumen
    >>> distance, valid = volumen.derive(np.array([[0, 0, 1, 1, 1, 1]] * 6), "distance_transform")
    >>> distance[0, 3].tolist()
    [1.5, 0.5, -0.5, -1.5, -2.5, -3.5]
    """
    from volumen.derived.derivation import derive_target
    from volumen.derived.registry import validate_task

    label = np.asarray(label)
    known = None if mask is None else np.asarray(mask) != 0
    if known is not None and known.shape != label.shape:
        raise VolumenError("mask", expected=f"shape {label.shape}", found=f"{known.shape}")
    validate_task(task, {"type": task, **settings})
    return derive_target(
        task,
        label[None],
        known=None if known is None else known[None],
        spacing=spacing,
        instances=instances,
        **settings,
    )
