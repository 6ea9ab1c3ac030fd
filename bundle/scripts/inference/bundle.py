"""What `inference.yaml` and `evaluate.yaml` declare: datasets of volumes and the objects that run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from scripts.inference.command import request_fields, tell
from scripts.inference.evaluation import EvaluateRequest, Evaluation, evaluate
from scripts.inference.jobs import image_paths
from scripts.inference.predict import PredictReport, PredictRequest, predict
from scripts.inference.predictor import Predictor, load_predictor

logger = logging.getLogger(__name__)


class VolumeList(Sequence[dict[str, str]]):
    """The images of a folder as MONAI items {"image": path}; they are opened when they are predicted.

    Args:
        folder: an image, a folder of images, or a dataset with an `images` folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = str(folder)
        self.paths = image_paths(self.folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [{"image": path} for path in self.paths[index]]
        return {"image": self.paths[index]}


def concatenated_network(checkpoint: str, device: Any = "cpu") -> nn.Module:
    """Return a checkpoint's network with its heads concatenated on channels, as exports need it."""
    from scripts.networks.multihead import ConcatenatedHeads, MultiHeadDynUNet

    network = load_predictor(checkpoint, device).network
    assert isinstance(network, MultiHeadDynUNet)
    return ConcatenatedHeads(network).eval()


def predictor_patch(checkpoint: str, patch_size: Sequence[int] | None) -> tuple[int, ...]:
    """Return the window: the one given, or that of the checkpoint's training."""
    predictor: Predictor = load_predictor(checkpoint)
    return predictor.check_patch(patch_size or predictor.patch_size)


class VolumePredictor:
    """Predicts the volumes of a dataset; `run` is what the bundle's `run` calls.

    Args:
        dataset: what `VolumeList` gives.
        checkpoint: the trained network.
        output_dir: where the predictions go.
        device: device, or its name.
        settings: more fields of `PredictRequest`, under its names or those of `inference_config`.
    """

    def __init__(
        self,
        dataset: VolumeList,
        checkpoint: str,
        output_dir: str,
        device: Any = "auto",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        fields = request_fields(settings or {})
        fields.pop("checkpoint", None)
        self.request = PredictRequest(
            dataset.folder, str(checkpoint), str(output_dir), device=str(device), **fields
        )

    def run(self) -> PredictReport:
        """Predict every volume."""
        report = predict(self.request)
        tell(report)
        return report


class PredictionEvaluator:
    """Scores predictions against a dataset's labels; `run` is what the bundle's `run` calls.

    Args:
        predictions: the folder of predictions.
        dataset_dir: dataset with a `labels` folder.
        output_dir: where the report goes.
        settings: more fields of `EvaluateRequest`.
    """

    def __init__(
        self, predictions: str, dataset_dir: str, output_dir: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in (settings or {}).items()
            if value is not None
        }
        self.request = EvaluateRequest(str(predictions), str(dataset_dir), str(output_dir), **fields)

    def run(self) -> Evaluation:
        """Score the predictions and write the report."""
        evaluation = evaluate(self.request)
        logger.info("report: %s", Path(self.request.output, "report.html"))
        return evaluation
