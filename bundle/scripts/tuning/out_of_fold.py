"""Out-of-fold predictions: each fold is predicted by the network that has not seen it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from volumen.inference.ensemble import run_checkpoint
from volumen.inference.predictor import load_predictor
from volumen.inference.request import PredictRequest
from volumen.inference.settings import request_fields
from volumen.tuning.held_out import (
    ProgressCallback,
    experiment_of,
    held_out_regions,
    predict_region,
    region_paths,
    split_of,
)
from volumen.utils.device import choose_device

logger = logging.getLogger(__name__)


def predict_out_of_fold(
    member: Path, output: Path, device: str = "auto", tell: ProgressCallback | None = None
) -> list[Path]:
    """Predict the validation part of a trained fold as probabilities; what is predicted already stays.

    Args:
        member: folder of the fold's run.
        output: folder for the predictions of all folds.
        device: auto, cpu, cuda or cuda:N.
        tell: called with an image's name, windows done and all windows.

    Returns:
        The predictions, OME-Zarr groups.

    Raises:
        VolumenError: no checkpoint, or data that are not those of the run.
    """
    checkpoint = run_checkpoint(member)
    predictor = load_predictor(checkpoint, choose_device(device))
    fields: dict[str, Any] = request_fields(predictor.config.get("inference_config") or {})
    fields.update(
        threshold=None,
        min_size=0,
        keep_largest=None,
        fill_holes=0,
        instances=None,
        dtype="float16",
        pyramid=False,
    )
    request = PredictRequest(
        **{**fields, "input": "", "checkpoint": str(checkpoint), "output": "", "device": device}
    )
    regions = held_out_regions(experiment_of(predictor), split_of(checkpoint))
    paths = region_paths(output, regions, member.name)
    return [predict_region(predictor, region, request, paths[region.key], tell) for region in regions]
